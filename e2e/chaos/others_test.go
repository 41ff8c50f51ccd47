package chaos

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strconv"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// Other users of conntrack.

// expectations makes about n expectations with a user's nftables rule, for flows
// from the peers of guests, and returns their number.
func expectations(s *stage.Scene, n int) int {
	s.T.Helper()
	const first = 40_000
	rules := "table ip others {\n"
	chain := "chain c { type filter hook forward priority 0; "
	for i := range n / stage.Peers {
		port := strconv.Itoa(first + i)
		rules += "ct expectation e" + port + " { protocol udp; dport " + port + "; timeout 10m; size 1; l3proto ip; }\n"
		chain += `iifname "guest0" udp dport ` + port + ` ct expectation set "e` + port + "\"\n"
	}
	s.Must(s.NFT(rules + chain + "}\n}\n"))
	guest := s.Socket(s.Guest.Namespace, s.Guest.Addr, 5060)
	want := n / stage.Peers * stage.Peers
	s.Until("others expect what they want", func() bool {
		for i := range want {
			s.Must(guest.Send(netip.AddrPortFrom(stage.Peer(i%stage.Peers), uint16(first+i/stage.Peers)), "x"))
		}
		return len(s.ConntrackList("expect")) == want
	})
	return want
}

// others are conntrack entries that have nothing to do with the daemon.
type others struct {
	s    *stage.Scene
	conn *conntrack.Conn
	mark uint32
	made int // number of attempts
}

func newOthers(s *stage.Scene) *others {
	s.T.Helper()
	c, err := conntrack.Dial(&netlink.Config{NetNS: s.Gateway.FD()})
	s.Must(err)
	s.T.Cleanup(func() { c.Close() })
	return &others{s: s, conn: c, mark: 47}
}

// udp returns all UDP flows; the kernel filters out other entries.
func (o *others) udp() (all []cone.Flow) {
	o.s.T.Helper()
	q, err := ctwatch.DialQueries(ctwatch.Config{NetNS: o.s.Gateway.FD()})
	o.s.Must(err)
	defer q.Close()
	o.s.Must(q.Dump(func(f *cone.Flow) { all = append(all, *f) }))
	return all
}

// most makes others until conntrack has room for only a few thousand more entries.
// That is slow; fill then does the rest quickly.
func (o *others) most() {
	o.s.T.Helper()
	const room = 4096
	o.add(func() bool { return sysctl(o.s, "nf_conntrack_count") > sysctl(o.s, "nf_conntrack_max")-room })
}

// fill makes as many as conntrack has room for. It first makes UDP flows assured,
// because a full table drops entries that are not.
func (o *others) fill() {
	o.s.T.Helper()
	for _, f := range o.udp() {
		if !f.Status.Has(cone.StatusAssured) {
			o.s.Must(o.conn.Update(conntrack.Flow{
				TupleOrig: conntrack.Tuple{
					IP:    conntrack.IPTuple{SourceAddress: f.Src.Addr.Netip(), DestinationAddress: f.Dst.Addr.Netip()},
					Proto: conntrack.ProtoTuple{Protocol: unix.IPPROTO_UDP, SourcePort: f.Src.Port, DestinationPort: f.Dst.Port},
				},
				Status: conntrack.StatusConfirmed | conntrack.StatusAssured | conntrack.Status(f.Status),
			}))
		}
	}
	o.add(func() bool { return false })
}

// add makes others until conntrack is full, or enough says so.
func (o *others) add(enough func() bool) {
	o.s.T.Helper()
	c, err := nfnl.Dial(o.s.Gateway.FD())
	o.s.Must(err)
	defer c.Close()
	var e nfnl.Encoder
	const atOnce = 512
	for full := false; !full && !enough(); o.made += atOnce {
		e.Reset()
		seq := c.NextSeq(atOnce)
		for n := range atOnce {
			i := o.made + n
			from := netip.AddrPortFrom(stage.Peer(i>>16), uint16(i))
			o.entry(&e, seq+uint32(n), from, netip.AddrPortFrom(lab.PeerA, 443))
		}
		o.s.Must(c.Exchange(&e, func(_ uint32, err error) {
			if full = errors.Is(err, unix.ENOMEM); !full {
				o.s.T.Fatal(err)
			}
		}, nil))
	}
}

// entry appends a message that creates a TCP entry.
func (o *others) entry(e *nfnl.Encoder, seq uint32, from, to netip.AddrPort) {
	const (
		create                                  = unix.NLM_F_REQUEST | unix.NLM_F_CREATE
		msgNew                                  = 0
		tupleOrig, tupleReply                   = 1, 2
		status, timeout, mark                   = 3, 7, 8
		tupleIP, tupleProto                     = 1, 2
		ipSource, ipDestination                 = 1, 2
		protoNum, protoSource, protoDestination = 1, 2, 3
	)
	e.Message(unix.NFNL_SUBSYS_CTNETLINK, msgNew, create, seq, unix.AF_INET)
	for typ, ends := range map[uint16][2]netip.AddrPort{tupleOrig: {from, to}, tupleReply: {to, from}} {
		t := e.Nest(typ)
		ip := e.Nest(tupleIP)
		for i, x := range ends {
			a := x.Addr().As4()
			e.BE32(uint16(ipSource+i), binary.BigEndian.Uint32(a[:]))
		}
		e.EndNest(ip)
		proto := e.Nest(tupleProto)
		e.U8(protoNum, unix.IPPROTO_TCP)
		e.BE16(protoSource, ends[0].Port())
		e.BE16(protoDestination, ends[1].Port())
		e.EndNest(proto)
		e.EndNest(t)
	}
	e.BE32(status, uint32(conntrack.StatusConfirmed|conntrack.StatusAssured))
	e.BE32(timeout, 600)
	e.BE32(mark, o.mark)
	e.End()
}

// end ends all of them.
func (o *others) end() {
	o.s.T.Helper()
	o.s.Must(o.conn.FlushFilter(conntrack.NewFilter().Mark(o.mark)))
}
