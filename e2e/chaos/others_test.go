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
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// Others use conntrack too.

// expectations lets a rule of somebody else's expect flows from the peers of guests,
// about n, and returns how many there are.
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

// others are entries of conntrack that have nothing to do with the daemon.
type others struct {
	s    *stage.Scene
	conn *conntrack.Conn
	mark uint32
}

func newOthers(s *stage.Scene) *others {
	s.T.Helper()
	c, err := conntrack.Dial(&netlink.Config{NetNS: s.Gateway.FD()})
	s.Must(err)
	s.T.Cleanup(func() { c.Close() })
	return &others{s, c, 47}
}

// fill makes as many as conntrack has room for. What is there is assured first: the
// kernel makes room by dropping flows that are not.
func (o *others) fill() {
	o.s.T.Helper()
	there, err := o.conn.Dump(nil)
	o.s.Must(err)
	for _, f := range there {
		if !f.Status.Assured() {
			o.s.Must(o.conn.Update(conntrack.Flow{TupleOrig: f.TupleOrig, Status: f.Status | conntrack.StatusAssured}))
		}
	}
	c, err := nfnl.Dial(o.s.Gateway.FD())
	o.s.Must(err)
	defer c.Close()
	var e nfnl.Encoder
	const atOnce = 512
	for i, full := 0, false; !full; i += atOnce {
		e.Reset()
		seq := c.NextSeq(atOnce)
		for n := range atOnce {
			from := netip.AddrPortFrom(stage.Peer((i+n)>>16), uint16(i+n))
			o.entry(&e, seq+uint32(n), from, netip.AddrPortFrom(lab.PeerA, 443))
		}
		o.s.Must(c.Exchange(&e, func(_ uint32, err error) {
			if full = errors.Is(err, unix.ENOMEM); !full {
				o.s.T.Fatal(err)
			}
		}, nil))
	}
}

// entry appends the creation of a TCP connection.
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
