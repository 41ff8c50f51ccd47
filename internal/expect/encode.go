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

	ctaHelpName = 1

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
	dirOriginal     = 0 // of those that translate nothing
	dirReply        = 1
)

const (
	create = unix.NLM_F_REQUEST | unix.NLM_F_CREATE | unix.NLM_F_EXCL
	change = unix.NLM_F_REQUEST
)

// An encoder appends the messages of this package. The zero value is ready.
type encoder struct{ nfnl.Encoder }

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
	family := nfnl.Family(p.Peer)
	e.Message(subsysConntrack, msgNew, create, seq, family)
	e.Tuple(nfnl.CTATupleOrig, family, &src, &dst)
	e.Tuple(nfnl.CTATupleReply, family, &dst, &src)
	e.BE32(nfnl.CTAStatus, uint32(anchorStatus))
	e.BE32(nfnl.CTATimeout, timeout)
	if p.Mark != 0 {
		e.BE32(nfnl.CTAMark, p.Mark)
	}
	e.help(helper)
	e.zone(nfnl.CTAZone, p.Zone)
	e.End()
}

func (e *encoder) help(helper string) {
	help := e.Nest(nfnl.CTAHelp)
	e.Str(ctaHelpName, helper)
	e.EndNest(help)
}

// renewAnchor appends the request to set the timeout, in seconds, of anchor a. It sets the
// mark too: an adopted anchor may have another one. The kernel refuses it if the anchor
// does not have this helper (ctnetlink_change_helper).
func (e *encoder) renewAnchor(seq uint32, p *cone.Permission, a anchor, helper string, timeout uint32) {
	src, dst := a.endpoints()
	family := nfnl.Family(p.Peer)
	e.Message(subsysConntrack, msgNew, change, seq, family)
	e.Tuple(nfnl.CTATupleOrig, family, &src, &dst)
	e.BE32(nfnl.CTATimeout, timeout)
	e.BE32(nfnl.CTAMark, p.Mark)
	e.help(helper)
	e.zone(nfnl.CTAZone, p.Zone)
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
	family := e.expect(seq, create, p, a)
	e.BE32(ctaExpectFlags, expectPermanent)
	if !p.Routed() {
		dir, in := uint32(dirReply), p.Int
		if p.MapTranslates { // another host may have the Key than the one that made the anchor
			dir, in.Addr = dirOriginal, a.in
		}
		nat := e.Nest(ctaExpectNAT)
		e.BE32(ctaExpectNATDir, dir)
		e.Tuple(ctaExpectNATTup, family, &in, &cone.Endpoint{}) // the kernel reads the source only
		e.EndNest(nat)
		if !p.MapTranslates { // without a function, the kernel translates nothing, and merely stores the above
			e.Str(ctaExpectFn, followMaster)
		}
	}
	e.End()
}

// renewExpect appends the request to set the timeout, in seconds, of the expectation.
func (e *encoder) renewExpect(seq uint32, p *cone.Permission, a anchor, timeout uint32) {
	e.expect(seq, change, p, a)
	e.BE32(ctaExpectTimeout, timeout)
	e.End()
}

func (e *encoder) expect(seq uint32, flags uint16, p *cone.Permission, a anchor) (family uint8) {
	src, dst := a.endpoints()
	peer := cone.Endpoint{Addr: p.Peer}
	family = nfnl.Family(p.Peer)
	e.Message(subsysExpect, msgNew, flags, seq, family)
	e.Tuple(ctaExpectMaster, family, &src, &dst)
	e.Tuple(ctaExpectTuple, family, &peer, &p.Ext)
	maskSrc := cone.Endpoint{Addr: allOnes.WithoutLow(p.HostBits)} // port 0: any source port
	e.Tuple(ctaExpectMask, family, &maskSrc, &maskDst)
	e.zone(ctaExpectZone, p.Zone)
	return family
}

// getExpect and deleteExpect append a request for the one expectation of p.
func (e *encoder) getExpect(seq uint32, k *cone.Key)    { e.oneExpect(seq, msgGet, k) }
func (e *encoder) deleteExpect(seq uint32, k *cone.Key) { e.oneExpect(seq, msgDelete, k) }

func (e *encoder) oneExpect(seq uint32, typ uint16, k *cone.Key) {
	peer := cone.Endpoint{Addr: k.Peer}
	family := nfnl.Family(k.Peer)
	e.Message(subsysExpect, typ, change, seq, family)
	e.Tuple(ctaExpectTuple, family, &peer, &k.Ext)
	e.zone(ctaExpectZone, k.Zone)
	e.End()
}

func (e *encoder) deleteAnchor(seq uint32, a anchor) {
	src, dst := a.endpoints()
	family := nfnl.Family(src.Addr)
	e.Message(subsysConntrack, msgDelete, change, seq, family)
	e.Tuple(nfnl.CTATupleOrig, family, &src, &dst)
	e.zone(nfnl.CTAZone, a.zone)
	e.End()
}
