package nfnl

import (
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// Attributes of conntrack entries (linux/netfilter/nfnetlink_conntrack.h). Their values are
// in network byte order.
const (
	CTATupleOrig     = 1
	CTATupleReply    = 2
	CTAStatus        = 3
	CTAHelp          = 5
	CTATimeout       = 7
	CTAMark          = 8
	CTACountersOrig  = 9
	CTACountersReply = 10
	CTAID            = 12
	CTATupleMaster   = 14
	CTAZone          = 18
	CTALabels        = 22
	CTAFilter        = 25
)

// Attributes within a tuple.
const (
	CTATupleIP    = 1
	CTATupleProto = 2
	CTATupleZone  = 3

	CTAIPv4Src = 1
	CTAIPv4Dst = 2
	CTAIPv6Src = 3
	CTAIPv6Dst = 4

	CTAProtoNum     = 1
	CTAProtoSrcPort = 2
	CTAProtoDstPort = 3
)

// A Tuple is one direction of a conntrack entry, or what an expectation waits for
// (ctnetlink_dump_tuples).
type Tuple struct {
	Src, Dst cone.Endpoint
	Zone     uint16 // of this direction alone; 0 if both have the same
	Proto    uint8  // such as unix.IPPROTO_UDP; 0 if there is no tuple

	sport, dport bool // present
}

// HasPorts reports whether both ports were there. A tuple without them is valid: the master
// of an expected flow need not be UDP.
func (t *Tuple) HasPorts() bool { return t.sport && t.dport }

// Parse decodes a tuple of a message for family. It returns false for what the kernel does
// not write. t must be empty: a tuple that comes twice is refused. It does not allocate.
func (t *Tuple) Parse(b []byte, family uint8) bool {
	if t.Proto != 0 {
		return false
	}
	var haveIP bool
	return EachAttribute(b, func(typ uint16, val []byte) bool {
		ok := true
		switch typ {
		case CTATupleIP:
			ok = t.parseIP(val, family)
			haveIP = true
		case CTATupleProto:
			ok = t.parseProto(val)
		case CTATupleZone:
			t.Zone, ok = BE16(val)
		}
		return ok
	}) && haveIP && t.Proto != 0
}

func (t *Tuple) parseIP(b []byte, family uint8) bool {
	var src, dst bool
	return EachAttribute(b, func(typ uint16, val []byte) bool {
		switch {
		case family == unix.AF_INET && (typ == CTAIPv4Src || typ == CTAIPv4Dst):
			if len(val) != 4 {
				return false
			}
			if typ == CTAIPv4Src {
				t.Src.Addr, src = cone.AddrFrom4([4]byte(val)), true
			} else {
				t.Dst.Addr, dst = cone.AddrFrom4([4]byte(val)), true
			}
		case family == unix.AF_INET6 && (typ == CTAIPv6Src || typ == CTAIPv6Dst):
			if len(val) != 16 {
				return false
			}
			if typ == CTAIPv6Src {
				t.Src.Addr, src = cone.Addr(val), true
			} else {
				t.Dst.Addr, dst = cone.Addr(val), true
			}
		}
		return true
	}) && src && dst
}

func (t *Tuple) parseProto(b []byte) bool {
	if t.Proto != 0 {
		return false
	}
	return EachAttribute(b, func(typ uint16, val []byte) bool {
		ok := true
		switch typ {
		case CTAProtoNum:
			if ok = len(val) == 1; ok {
				t.Proto = val[0]
			}
		case CTAProtoSrcPort:
			t.Src.Port, ok = BE16(val)
			t.sport = true
		case CTAProtoDstPort:
			t.Dst.Port, ok = BE16(val)
			t.dport = true
		}
		return ok
	}) && t.Proto != 0
}

// Family returns the family of the messages about an address: unix.AF_INET or
// unix.AF_INET6.
func Family(a cone.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// Tuple appends a UDP tuple. The caller gives the family: the mask of an IPv4 expectation
// is not an IPv4 address.
func (e *Encoder) Tuple(typ uint16, family uint8, src, dst *cone.Endpoint) {
	t := e.Nest(typ)
	ip := e.Nest(CTATupleIP)
	if family == unix.AF_INET6 {
		e.Bytes(CTAIPv6Src, src.Addr[:])
		e.Bytes(CTAIPv6Dst, dst.Addr[:])
	} else {
		e.Bytes(CTAIPv4Src, src.Addr[12:])
		e.Bytes(CTAIPv4Dst, dst.Addr[12:])
	}
	e.EndNest(ip)
	proto := e.Nest(CTATupleProto)
	e.U8(CTAProtoNum, unix.IPPROTO_UDP)
	e.BE16(CTAProtoSrcPort, src.Port)
	e.BE16(CTAProtoDstPort, dst.Port)
	e.EndNest(proto)
	e.EndNest(t)
}
