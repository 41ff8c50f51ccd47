package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Two hundred thousand permissions, learned by the kernel or granted from events:
// all stand, all work, and all go.
func TestNFTManyPermissions(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent}, func(t *testing.T, mode ...string) {
		const peers = stage.Peers
		ports := 400
		if os.Getenv("CONENATD_GUEST") != "" {
			ports = 40
		}
		s := newScene(t, lab.Options{Inside: 2})
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
		s.Start(stage.Flags(mode, "--max-permissions-per-host=0", "--learn-rate=100000", "--event-buffer=67108864", "--events=all")...) // status shows each at once
		inside := func(port int) *lab.Socket { return s.InsideSocket(port%2, uint16(10_000+port)) }
		send := func(port int, wanted func(p netip.Addr) bool) {
			in := inside(port)
			defer in.Close()
			for i := range peers {
				if p := stage.Peer(i); wanted(p) {
					s.Must(in.Send(netip.AddrPortFrom(p, 9), "x"))
				}
			}
		}

		began := time.Now()
		const atOnce = 20 // ports
		for first := 0; first < ports; first += atOnce {
			for port := first; port < first+atOnce; port++ {
				send(port, func(netip.Addr) bool { return true })
			}
			s.allStand((first+atOnce)*peers, func(known map[stage.Flow]bool) {
				for port := first; port < first+atOnce; port++ {
					send(port, func(p netip.Addr) bool { return !known[stage.Flow{Port: uint16(10_000 + port), Peer: p}] })
				}
			})
		}
		took := time.Since(began)
		st := s.Status()
		t.Logf("%d permissions in %v, %.0f in a second; %+v; %d overruns, %d learned",
			ports*peers, took.Round(time.Millisecond), float64(ports*peers)/took.Seconds(), st.Latency, st.Events.Overruns, st.Tables.Map.Learned)
		if st.Permissions.Standing != ports*peers || st.Permissions.Refused != 0 {
			t.Errorf("%+v", st.Permissions)
		}
		if n := s.CountElements(); n != ports*peers {
			t.Errorf("%d elements, want %d", n, ports*peers)
		}
		for range 100 {
			port, p := rand.N(ports), stage.Peer(rand.N(peers))
			in := inside(port)
			from := s.PeerSocket(p, 0)
			s.Arrives(in, from, netip.AddrPortFrom(s.Gateway.Addr, in.Addr().Port()))
			in.Close()
			from.Close()
		}
		began = time.Now()
		s.Stop()
		t.Logf("stopped in %v", time.Since(began).Round(time.Millisecond))
		if left := s.Leftovers(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

// allStand waits until want permissions stand. If their number stops growing, it
// calls again with the known flows, because a busy machine loses packets.
func (s *scene) allStand(want int, again func(known map[stage.Flow]bool)) {
	s.T.Helper()
	last := 0
	s.Until(fmt.Sprintf("%d permissions stand", want), func() bool {
		n := s.Status().Permissions.Standing
		if n < want && n == last {
			again(s.Known())
		}
		last = n
		return n == want
	})
}
