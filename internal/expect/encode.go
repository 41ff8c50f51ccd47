package expect

import (
	"encoding/binary"

	"github.com/conenatd/conenatd/internal/cone"
	"golang.org/x/sys/unix"
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
	create  = unix.NLM_F_REQUEST | unix.NLM_F_CREATE | unix.NLM_F_EXCL
	change  = unix.NLM_F_REQUEST
	headLen = unix.NLMSG_HDRLEN + 4 // nlmsghdr and nfgenmsg
)

// An encoder appends netlink messages to one buffer. The zero value is ready.
type encoder struct {
	b    []byte
	last int // offset of the last message
}

func (e *encoder) reset() { e.b, e.last = e.b[:0], 0 }

// message begins a message. Its length is set by end.
func (e *encoder) message(subsys, typ uint16, flags uint16, seq uint32, v6 bool) {
	e.last = len(e.b)
	family := byte(unix.AF_INET)
	if v6 {
		family = unix.AF_INET6
	}
	e.b = append(e.b, 0, 0, 0, 0)
	e.b = binary.NativeEndian.AppendUint16(e.b, subsys<<8|typ)
	e.b = binary.NativeEndian.AppendUint16(e.b, flags)
	e.b = binary.NativeEndian.AppendUint32(e.b, seq)
	e.b = append(e.b, 0, 0, 0, 0, family, unix.NFNETLINK_V0, 0, 0)
}

func (e *encoder) end() {
	binary.NativeEndian.PutUint32(e.b[e.last:], uint32(len(e.b)-e.last))
}

// ack asks the kernel to answer the last message even if it went well.
func (e *encoder) ack() {
	flags := binary.NativeEndian.Uint16(e.b[e.last+6:])
	binary.NativeEndian.PutUint16(e.b[e.last+6:], flags|unix.NLM_F_ACK)
}

// attr appends the header of an attribute of n bytes; the caller appends these
// and pads with pad.
func (e *encoder) attr(typ uint16, n int) {
	e.b = binary.NativeEndian.AppendUint16(e.b, uint16(4+n))
	e.b = binary.NativeEndian.AppendUint16(e.b, typ)
}

func (e *encoder) pad() {
	for len(e.b)%4 != 0 {
		e.b = append(e.b, 0)
	}
}

// nest begins a nested attribute and returns its offset for endNest.
func (e *encoder) nest(typ uint16) int {
	at := len(e.b)
	e.attr(typ|unix.NLA_F_NESTED, 0)
	return at
}

func (e *encoder) endNest(at int) {
	binary.NativeEndian.PutUint16(e.b[at:], uint16(len(e.b)-at))
}

func (e *encoder) u8(typ uint16, v byte) {
	e.attr(typ, 1)
	e.b = append(e.b, v)
	e.pad()
}

func (e *encoder) be16(typ, v uint16) {
	e.attr(typ, 2)
	e.b = binary.BigEndian.AppendUint16(e.b, v)
	e.pad()
}

func (e *encoder) be32(typ uint16, v uint32) {
	e.attr(typ, 4)
	e.b = binary.BigEndian.AppendUint32(e.b, v)
}

// str appends s with the NUL that the kernel wants.
func (e *encoder) str(typ uint16, s string) {
	e.attr(typ, len(s)+1)
	e.b = append(e.b, s...)
	e.b = append(e.b, 0)
	e.pad()
}

func (e *encoder) addr(typ4, typ6 uint16, a *cone.Addr, v6 bool) {
	if v6 {
		e.attr(typ6, 16)
		e.b = append(e.b, a[:]...)
		return
	}
	e.attr(typ4, 4)
	e.b = append(e.b, a[12:]...)
}

// tuple appends a UDP tuple. The family must be told: the mask of an IPv4
// expectation is no IPv4 address.
func (e *encoder) tuple(typ uint16, src, dst *cone.Endpoint, v6 bool) {
	t := e.nest(typ)
	ip := e.nest(ctaTupleIP)
	e.addr(ctaIPv4Src, ctaIPv6Src, &src.Addr, v6)
	e.addr(ctaIPv4Dst, ctaIPv6Dst, &dst.Addr, v6)
	e.endNest(ip)
	proto := e.nest(ctaTupleProto)
	e.u8(ctaProtoNum, unix.IPPROTO_UDP)
	e.be16(ctaProtoSrc, src.Port)
	e.be16(ctaProtoDst, dst.Port)
	e.endNest(proto)
	e.endNest(t)
}

func (e *encoder) zone(typ, zone uint16) {
	if zone != 0 {
		e.be16(typ, zone)
	}
}

// anchorStatus keeps an anchor from being dropped early.
const anchorStatus = cone.StatusConfirmed | cone.StatusAssured

// newAnchor appends the creation of the anchor a of p.
func (e *encoder) newAnchor(seq uint32, p *cone.Permission, a anchor, helper string, timeout uint32) {
	src, dst := a.endpoints()
	v6 := !p.Peer.Is4()
	e.message(subsysConntrack, msgNew, create, seq, v6)
	e.tuple(ctaTupleOrig, &src, &dst, v6)
	e.tuple(ctaTupleReply, &dst, &src, v6)
	e.be32(ctaStatus, uint32(anchorStatus))
	e.be32(ctaTimeout, timeout)
	if p.Mark != 0 {
		e.be32(ctaMark, p.Mark)
	}
	help := e.nest(ctaHelp)
	e.str(ctaHelpName, helper)
	e.endNest(help)
	e.zone(ctaZone, p.Zone)
	e.end()
}

// renewAnchor appends a change of the timeout, in seconds, of anchor a. It sets
// the mark too: an anchor that was adopted may have another.
func (e *encoder) renewAnchor(seq uint32, p *cone.Permission, a anchor, timeout uint32) {
	src, dst := a.endpoints()
	v6 := !p.Peer.Is4()
	e.message(subsysConntrack, msgNew, change, seq, v6)
	e.tuple(ctaTupleOrig, &src, &dst, v6)
	e.be32(ctaTimeout, timeout)
	e.be32(ctaMark, p.Mark)
	e.zone(ctaZone, p.Zone)
	e.end()
}

var (
	allOnes = cone.Addr{
		0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
		0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
	}
	maskSrc = cone.Endpoint{Addr: allOnes, Port: 0} // any source port
	maskDst = cone.Endpoint{Addr: allOnes, Port: 0xffff}
)

// followMaster is the expectation function that translates a child by its
// master's addresses and the saved port (nf_nat_follow_master).
const followMaster = "nat-follow-master"

// newExpect appends the creation of the expectation of p on anchor a. The
// kernel ignores a timeout here; renewExpect sets it.
func (e *encoder) newExpect(seq uint32, p *cone.Permission, a anchor) {
	v6 := e.expect(seq, create, p, a)
	e.be32(ctaExpectFlags, expectPermanent)
	if !p.Routed() {
		nat := e.nest(ctaExpectNAT)
		e.be32(ctaExpectNATDir, dirReply)
		e.tuple(ctaExpectNATTup, &p.Int, &cone.Endpoint{}, v6) // the kernel reads the source only
		e.endNest(nat)
		e.str(ctaExpectFn, followMaster)
	}
	e.end()
}

// renewExpect appends a change of the timeout, in seconds, of the expectation.
func (e *encoder) renewExpect(seq uint32, p *cone.Permission, a anchor, timeout uint32) {
	e.expect(seq, change, p, a)
	e.be32(ctaExpectTimeout, timeout)
	e.end()
}

func (e *encoder) expect(seq uint32, flags uint16, p *cone.Permission, a anchor) (v6 bool) {
	src, dst := a.endpoints()
	peer := cone.Endpoint{Addr: p.Peer}
	v6 = !p.Peer.Is4()
	e.message(subsysExpect, msgNew, flags, seq, v6)
	e.tuple(ctaExpectMaster, &src, &dst, v6)
	e.tuple(ctaExpectTuple, &peer, &p.Ext, v6)
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
	e.end()
}

func (e *encoder) deleteAnchor(seq uint32, a anchor) {
	src, dst := a.endpoints()
	v6 := !src.Addr.Is4()
	e.message(subsysConntrack, msgDelete, change, seq, v6)
	e.tuple(ctaTupleOrig, &src, &dst, v6)
	e.zone(ctaZone, a.zone)
	e.end()
}

// firstSeq and lastSeq return the sequence numbers of the first and the last
// message.
func (e *encoder) firstSeq() uint32 { return binary.NativeEndian.Uint32(e.b[8:]) }
func (e *encoder) lastSeq() uint32  { return binary.NativeEndian.Uint32(e.b[e.last+8:]) }
