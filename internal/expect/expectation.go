package expect

import (
	"encoding/binary"
	"math/bits"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
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
	wild      uint8  // low bits of src that the mask does not cover
	masterUDP bool
	udp       bool
	helper    [16]byte // of its master, NF_CT_HELPER_NAME_LEN; zero if that has none
}

// ours reports whether conenatd made x: x has all that newExpect would write.
func (x *expectation) ours() bool {
	p, a := x.permission(), x.anchor()
	return x.udp && x.masterUDP && x.flags&expectPermanent != 0 && x.src.Port == 0 &&
		cone.IsAnchor(x.master[0], x.master[1]) && a == anchorOf(&p, a.flipped)
}

// stands reports whether x is the expectation of p on a. Its master must have a helper:
// without one it would not be known as an anchor.
func (x *expectation) stands(p *cone.Permission, a anchor) bool {
	old := x.permission()
	return x.ours() && x.helped() && old.Key == p.Key && old.Int == p.Int && x.anchor() == a
}

func (x *expectation) helped() bool { return x.helper != [16]byte{} }

// foreign returns what x, which is not ours, says about the helper that made it.
func (x *expectation) foreign() Foreign {
	y := Foreign{MasterSrc: x.master[0].Addr, MasterDst: x.master[1].Addr, Int: x.nat.Addr}
	if x.wild == 0 {
		y.Peer = x.src.Addr
	}
	return y
}

// left is how long the expectation has left.
func (x *expectation) left() time.Duration { return time.Duration(x.timeout) * time.Second }

// permission returns the permission that x, which must be ours, carries.
func (x *expectation) permission() cone.Permission {
	p := cone.Permission{
		Key:  cone.Key{Ext: x.dst, Peer: x.src.Addr, Zone: x.zone, Wild: x.wild},
		Int:  x.nat,
		Mark: x.mark,
	}
	if x.nat == (cone.Endpoint{}) {
		p.Int = x.dst
	}
	return p
}

func (x *expectation) anchor() anchor {
	return anchorAt(x.master[0], x.master[1], x.zone)
}

// parseExpectation decodes the attributes that ctnetlink_exp_dump_expect sends, without the
// netlink header. It skips unknown attributes. The kernel sends neither zone nor mark.
func parseExpectation(b []byte) (x expectation, ok bool) {
	if len(b) < 4 {
		return x, false
	}
	ok = eachAttr(b[4:], func(typ uint16, v []byte) bool {
		var fine bool
		switch typ {
		case ctaExpectMaster:
			x.master[0], x.master[1], x.masterUDP, fine = parseTuple(v)
		case ctaExpectTuple:
			x.src, x.dst, x.udp, fine = parseTuple(v)
		case ctaExpectMask:
			mask, _, _, ok := parseTuple(v)
			x.wild, fine = lowZeros(mask.Addr), ok
		case ctaExpectNAT:
			fine = eachAttr(v, func(typ uint16, v []byte) bool {
				fine := true
				if typ == ctaExpectNATTup {
					x.nat, _, _, fine = parseTuple(v)
				}
				return fine
			})
		case ctaExpectHelp:
			copy(x.helper[:], v)
			fine = true
		case ctaExpectFlags:
			x.flags, fine = be32(v)
		case ctaExpectTimeout:
			x.timeout, fine = be32(v)
		default:
			fine = true
		}
		return fine
	})
	return x, ok
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

func be16(v []byte) (uint16, bool) {
	if len(v) < 2 {
		return 0, false
	}
	return binary.BigEndian.Uint16(v), true
}

func be32(v []byte) (uint32, bool) {
	if len(v) < 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(v), true
}

// parseTuple decodes a tuple. udp is false for other protocols.
func parseTuple(b []byte) (src, dst cone.Endpoint, udp, ok bool) {
	ok = eachAttr(b, func(typ uint16, v []byte) bool {
		switch typ {
		case ctaTupleIP:
			return eachAttr(v, func(typ uint16, v []byte) bool {
				switch {
				case typ == ctaIPv4Src && len(v) == 4:
					src.Addr = cone.AddrFrom4([4]byte(v))
				case typ == ctaIPv4Dst && len(v) == 4:
					dst.Addr = cone.AddrFrom4([4]byte(v))
				case typ == ctaIPv6Src && len(v) == 16:
					src.Addr = cone.Addr(v)
				case typ == ctaIPv6Dst && len(v) == 16:
					dst.Addr = cone.Addr(v)
				}
				return true
			})
		case ctaTupleProto:
			return eachAttr(v, func(typ uint16, v []byte) bool {
				switch {
				case typ == ctaProtoNum && len(v) == 1:
					udp = v[0] == unix.IPPROTO_UDP
				case typ == ctaProtoSrc && len(v) == 2:
					src.Port = binary.BigEndian.Uint16(v)
				case typ == ctaProtoDst && len(v) == 2:
					dst.Port = binary.BigEndian.Uint16(v)
				}
				return true
			})
		}
		return true
	})
	return src, dst, udp, ok
}

// eachAttr calls f for every attribute in b until f returns false, and reports whether all
// of b was well formed and accepted by f.
func eachAttr(b []byte, f func(typ uint16, value []byte) bool) bool {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return false
		}
		typ := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		if !f(typ, b[4:n]) {
			return false
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return true
}
