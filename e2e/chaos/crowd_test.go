package chaos

import (
	"net/netip"
	"sync/atomic"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A crowd is a set of unanswered flows of the first inside host. No two flows of a
// port have the same peer.
type crowd struct {
	*stage.Scene
	flood *lab.Flood

	sending atomic.Int64 // flows that send now, under load
	stop    func() int   // ends the load
}

const (
	crowdPort   = 20_000 // the first
	crowdPeer   = 100    // the first
	peersOnPort = 50     // of the 64 that expectations allow
)

// flow returns flow i of a crowd.
func flow(i int) stage.Flow {
	return stage.Flow{Port: uint16(crowdPort + i/peersOnPort), Peer: stage.Peer(crowdPeer + i%peersOnPort)}
}

// newCrowd makes a crowd of n flows that has not sent yet.
func newCrowd(s *stage.Scene, n int) *crowd {
	s.T.Helper()
	f := s.Flood(n, true)
	for i := range n {
		f.Aim(i, netip.AddrPortFrom(s.Inside(0).Addr, flow(i).Port), netip.AddrPortFrom(flow(i).Peer, 9))
	}
	return &crowd{Scene: s, flood: f}
}

// known lets the whole crowd send until the daemon lists each of its flows, and
// nothing else.
func (c *crowd) known() {
	c.T.Helper()
	c.Until("all flows have their claim", func() bool {
		c.Must(c.flood.Send(0, c.flood.Len())) // a busy machine loses packets
		return len(c.List()) == c.flood.Len()
	})
}

// children checks that the peers of the first and the last flow get in from other
// ports.
func (c *crowd) children(ext string) {
	c.T.Helper()
	for _, i := range []int{0, c.flood.Len() - 1} {
		in := c.InsideSocket(0, flow(i).Port)
		c.Arrives(in, c.PeerSocket(flow(i).Peer, 7000), netip.AddrPortFrom(netip.MustParseAddr(ext), flow(i).Port))
	}
}
