package expect

import (
	"math/bits"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// An expectation is one entry of the kernel's table, ours or not.
type expectation struct {
	master    [2]cone.Endpoint // original direction of its master
	src, dst  cone.Endpoint
	nat       cone.Endpoint // where it leads a child; zero without NAT
	zone      uint16        // of the master
	mark      uint32        // of the master
	flags     uint32
	timeout   uint32 // seconds left
	hostBits  uint8  // low bits of src that the mask does not cover
	masterUDP bool
	udp       bool
	related   bool     // it translates nothing, because a map does
	helper    [16]byte // of its master, NF_CT_HELPER_NAME_LEN; zero if that has none
}

// ours reports whether conenatd made x: x has all that newExpect would write.
func (x *expectation) ours() bool {
	p, a := x.permission(), x.anchor()
	return x.udp && x.masterUDP && x.flags&expectPermanent != 0 && x.src.Port == 0 &&
		cone.IsAnchor(x.master[0], x.master[1]) && a == anchorOf(&p, a.flipped)
}

// stands reports whether x is the expectation of p on a. Its master must have a helper:
// without one it would not be known as an anchor. If a map translates, any host may have made it.
func (x *expectation) stands(p *cone.Permission, a anchor) bool {
	old := x.permission()
	return x.ours() && x.helped() && old.Key == p.Key && x.anchor() == a &&
		old.MapTranslates == p.MapTranslates && (p.MapTranslates || old.Int == p.Int)
}

func (x *expectation) helped() bool { return x.helper != [16]byte{} }

// foreign returns what x, which is not ours, says about the helper that made it.
func (x *expectation) foreign() cone.Foreign {
	y := cone.Foreign{MasterSrc: x.master[0].Addr, MasterDst: x.master[1].Addr, Int: x.nat.Addr}
	if x.hostBits == 0 {
		y.Peer = x.src.Addr
	}
	return y
}

// left is how long the expectation has left.
func (x *expectation) left() time.Duration { return time.Duration(x.timeout) * time.Second }

// permission returns the permission that x, which must be ours, carries.
func (x *expectation) permission() cone.Permission {
	p := cone.Permission{
		Key:  cone.Key{Ext: x.dst, Peer: x.src.Addr, Zone: x.zone, HostBits: x.hostBits},
		Int:  x.nat,
		Mark: x.mark,
	}
	if x.nat == (cone.Endpoint{}) {
		p.Int = x.dst
	}
	p.MapTranslates = x.related
	return p
}

func (x *expectation) anchor() anchor {
	return anchorAt(x.master[0], x.master[1], x.zone)
}

// parseExpectation decodes the attributes that ctnetlink_exp_dump_expect sends, without the
// netlink header. It skips unknown attributes. The kernel sends neither zone nor mark.
func parseExpectation(b []byte) (x expectation, ok bool) {
	if len(b) < nfnl.FamilyHeaderLen {
		return x, false
	}
	family := b[0]
	var master, from, mask, nat nfnl.Tuple
	ok = nfnl.EachAttribute(b[nfnl.FamilyHeaderLen:], func(typ uint16, v []byte) bool {
		ok := true
		switch typ {
		case ctaExpectMaster:
			ok = master.Parse(v, family)
		case ctaExpectTuple:
			ok = from.Parse(v, family)
		case ctaExpectMask:
			ok = mask.Parse(v, family)
			x.hostBits = lowZeros(mask.Src.Addr)
		case ctaExpectNAT:
			sound := true
			ok = nfnl.Attributes(v, func(typ uint16, v []byte) {
				switch typ {
				case ctaExpectNATTup:
					sound = sound && nat.Parse(v, family)
				case ctaExpectNATDir:
					dir, ok := nfnl.BE32(v)
					x.related, sound = dir == dirOriginal, sound && ok
				}
			}) && sound
		case ctaExpectHelp:
			copy(x.helper[:], v)
		case ctaExpectFlags:
			x.flags, ok = nfnl.BE32(v)
		case ctaExpectTimeout:
			x.timeout, ok = nfnl.BE32(v)
		}
		return ok
	})
	if !ok {
		return x, false
	}
	x.master, x.masterUDP = [2]cone.Endpoint{master.Src, master.Dst}, master.Proto == unix.IPPROTO_UDP
	x.src, x.dst, x.udp = from.Src, from.Dst, from.Proto == unix.IPPROTO_UDP
	x.nat = nat.Src
	return x, true
}

// lowZeros returns how many low bits of a mask are zero.
func lowZeros(a cone.Addr) (n uint8) {
	for i := len(a) - 1; i >= 0; i-- {
		z := bits.TrailingZeros8(a[i])
		n += uint8(z)
		if z < 8 {
			break
		}
	}
	return n
}
