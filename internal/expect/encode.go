package expect

import (
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// Subsystems, messages and attributes of nfnetlink_conntrack.h and
// nfnetlink_cthelper.h.
const (
	subsysConntrack = unix.NFNL_SUBSYS_CTNETLINK
	subsysExpect    = unix.NFNL_SUBSYS_CTNETLINK_EXP
	subsysHelper    = 9

	msgNew    = 0
	msgGet    = 1
	msgDelete = 2

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaStatus     = 3
	ctaHelp       = 5
	ctaTimeout    = 7
	ctaMark       = 8
	ctaZone       = 18

	ctaTupleIP    = 1
	ctaTupleProto = 2
	ctaIPv4Src    = 1
	ctaIPv4Dst    = 2
	ctaIPv6Src    = 3
	ctaIPv6Dst    = 4
	ctaProtoNum   = 1
	ctaProtoSrc   = 2
	ctaProtoDst   = 3
	ctaHelpName   = 1

	ctaExpectMaster  = 1
	ctaExpectTuple   = 2
	ctaExpectMask    = 3
	ctaExpectTimeout = 4
	ctaExpectHelp    = 6
	ctaExpectZone    = 7
	ctaExpectFlags   = 8
	ctaExpectNAT     = 10
	ctaExpectFn      = 11
	ctaExpectNATDir  = 1
	ctaExpectNATTup  = 2

	expectPermanent = 1
	dirReply        = 1
)

const (
	create = unix.NLM_F_REQUEST | unix.NLM_F_CREATE | unix.NLM_F_EXCL
	change = unix.NLM_F_REQUEST
)

// An encoder appends the messages of this package. The zero value is ready.
type encoder struct{ nfnl.Encoder }

// message begins a message for one of the two families.
func (e *encoder) message(subsys, typ uint16, flags uint16, seq uint32, v6 bool) {
	family := byte(unix.AF_INET)
	if v6 {
		family = unix.AF_INET6
	}
	e.Message(subsys, typ, flags, seq, family)
}

func (e *encoder) addr(typ4, typ6 uint16, a *cone.Addr, v6 bool) {
	if v6 {
		e.Attr(typ6, 16)
		e.B = append(e.B, a[:]...)
		return
	}
	e.Attr(typ4, 4)
	e.B = append(e.B, a[12:]...)
}

// tuple appends a UDP tuple. The caller gives the family: the mask of an IPv4 expectation
// is not an IPv4 address.
func (e *encoder) tuple(typ uint16, src, dst *cone.Endpoint, v6 bool) {
	t := e.Nest(typ)
	ip := e.Nest(ctaTupleIP)
	e.addr(ctaIPv4Src, ctaIPv6Src, &src.Addr, v6)
	e.addr(ctaIPv4Dst, ctaIPv6Dst, &dst.Addr, v6)
	e.EndNest(ip)
	proto := e.Nest(ctaTupleProto)
	e.U8(ctaProtoNum, unix.IPPROTO_UDP)
	e.BE16(ctaProtoSrc, src.Port)
	e.BE16(ctaProtoDst, dst.Port)
	e.EndNest(proto)
	e.EndNest(t)
}

func (e *encoder) zone(typ, zone uint16) {
	if zone != 0 {
		e.BE16(typ, zone)
	}
}

// anchorStatus keeps an anchor from being dropped early.
const anchorStatus = cone.StatusConfirmed | cone.StatusAssured

// newAnchor appends the request to create the anchor a of p.
func (e *encoder) newAnchor(seq uint32, p *cone.Permission, a anchor, helper string, timeout uint32) {
	src, dst := a.endpoints()
	v6 := !p.Peer.Is4()
	e.message(subsysConntrack, msgNew, create, seq, v6)
	e.tuple(ctaTupleOrig, &src, &dst, v6)
	e.tuple(ctaTupleReply, &dst, &src, v6)
	e.BE32(ctaStatus, uint32(anchorStatus))
	e.BE32(ctaTimeout, timeout)
	if p.Mark != 0 {
		e.BE32(ctaMark, p.Mark)
	}
	e.help(helper)
	e.zone(ctaZone, p.Zone)
	e.End()
}

func (e *encoder) help(helper string) {
	help := e.Nest(ctaHelp)
	e.Str(ctaHelpName, helper)
	e.EndNest(help)
}

// renewAnchor appends the request to set the timeout, in seconds, of anchor a. It sets the
// mark too: an adopted anchor may have another one. The kernel refuses it if the anchor
// does not have this helper (ctnetlink_change_helper).
func (e *encoder) renewAnchor(seq uint32, p *cone.Permission, a anchor, helper string, timeout uint32) {
	src, dst := a.endpoints()
	v6 := !p.Peer.Is4()
	e.message(subsysConntrack, msgNew, change, seq, v6)
	e.tuple(ctaTupleOrig, &src, &dst, v6)
	e.BE32(ctaTimeout, timeout)
	e.BE32(ctaMark, p.Mark)
	e.help(helper)
	e.zone(ctaZone, p.Zone)
	e.End()
}

var (
	allOnes = cone.Addr{
		0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
		0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
	}
	maskDst = cone.Endpoint{Addr: allOnes, Port: 0xffff}
)

// followMaster is the expectation function that translates a child by its
// master's addresses and the saved port (nf_nat_follow_master).
const followMaster = "nat-follow-master"

// newExpect appends the request to create the expectation of p on anchor a. The kernel
// ignores a timeout here; renewExpect sets it.
func (e *encoder) newExpect(seq uint32, p *cone.Permission, a anchor) {
	v6 := e.expect(seq, create, p, a)
	e.BE32(ctaExpectFlags, expectPermanent)
	if !p.Routed() {
		nat := e.Nest(ctaExpectNAT)
		e.BE32(ctaExpectNATDir, dirReply)
		e.tuple(ctaExpectNATTup, &p.Int, &cone.Endpoint{}, v6) // the kernel reads the source only
		e.EndNest(nat)
		e.Str(ctaExpectFn, followMaster)
	}
	e.End()
}

// renewExpect appends the request to set the timeout, in seconds, of the expectation.
func (e *encoder) renewExpect(seq uint32, p *cone.Permission, a anchor, timeout uint32) {
	e.expect(seq, change, p, a)
	e.BE32(ctaExpectTimeout, timeout)
	e.End()
}

func (e *encoder) expect(seq uint32, flags uint16, p *cone.Permission, a anchor) (v6 bool) {
	src, dst := a.endpoints()
	peer := cone.Endpoint{Addr: p.Peer}
	v6 = !p.Peer.Is4()
	e.message(subsysExpect, msgNew, flags, seq, v6)
	e.tuple(ctaExpectMaster, &src, &dst, v6)
	e.tuple(ctaExpectTuple, &peer, &p.Ext, v6)
	maskSrc := cone.Endpoint{Addr: allOnes.WithoutLow(p.Wild)} // port 0: any source port
	e.tuple(ctaExpectMask, &maskSrc, &maskDst, v6)
	e.zone(ctaExpectZone, p.Zone)
	return v6
}

// getExpect and deleteExpect append a request for the one expectation of p.
func (e *encoder) getExpect(seq uint32, k *cone.Key)    { e.oneExpect(seq, msgGet, k) }
func (e *encoder) deleteExpect(seq uint32, k *cone.Key) { e.oneExpect(seq, msgDelete, k) }

func (e *encoder) oneExpect(seq uint32, typ uint16, k *cone.Key) {
	peer := cone.Endpoint{Addr: k.Peer}
	v6 := !k.Peer.Is4()
	e.message(subsysExpect, typ, change, seq, v6)
	e.tuple(ctaExpectTuple, &peer, &k.Ext, v6)
	e.zone(ctaExpectZone, k.Zone)
	e.End()
}

func (e *encoder) deleteAnchor(seq uint32, a anchor) {
	src, dst := a.endpoints()
	v6 := !src.Addr.Is4()
	e.message(subsysConntrack, msgDelete, change, seq, v6)
	e.tuple(ctaTupleOrig, &src, &dst, v6)
	e.zone(ctaZone, a.zone)
	e.End()
}
