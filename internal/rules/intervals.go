package rules

import (
	"math"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/conenatd/conenatd/internal/cone"
)

// notUnicast are the IPv4 prefixes whose addresses cannot be peers.
var notUnicast = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"), // multicast, reserved, broadcast
}

// intervals returns the elements of a set with the addresses of the IPv4 prefixes.
func intervals(all []netip.Prefix) []nftables.SetElement { return ipFamilies[0].intervals(all) }

// intervals returns the elements of a set with the addresses of those prefixes that are of
// the family.
func (f *ipFamily) intervals(all []netip.Prefix) []nftables.SetElement {
	ranges := make(cone.AddrRanges, 0, len(all))
	for _, p := range all {
		ranges = append(ranges, cone.RangeOf(p))
	}
	return f.rangeIntervals(ranges)
}

// rangeIntervals returns the elements of a set with the addresses of those ranges that are of the
// family. Each interval has one element for its first address and one for the address behind its
// last; the second is missing if the interval ends with the address space.
func (f *ipFamily) rangeIntervals(all cone.AddrRanges) (es []nftables.SetElement) {
	all = slices.DeleteFunc(slices.Clone(all), func(r cone.AddrRange) bool { return !f.has(r) })
	for _, r := range all.Merged() {
		es = append(es, nftables.SetElement{Key: r.First.AsSlice()})
		if behind := r.Last.Next(); behind.IsValid() {
			es = append(es, nftables.SetElement{Key: behind.AsSlice(), IntervalEnd: true})
		}
	}
	return es
}

// addrSet returns the set with that name, which has the prefixes that are of the family.
func (l *layout) addrSet(name string, f *ipFamily, all []netip.Prefix) *set {
	s := l.named(name)
	if s == nil {
		s = l.set(name, f.addr)
		s.Interval, s.elements = true, f.intervals(all)
	}
	return s
}

// prefixes are IPv4 prefixes to match addresses against. A single prefix is compared
// directly, which is cheaper than a set lookup.
type prefixes struct {
	set *set
	one netip.Prefix
}

func (l *layout) prefixes(name string, all []netip.Prefix) *prefixes {
	all = slices.DeleteFunc(slices.Clone(all), func(p netip.Prefix) bool { return !p.Addr().Is4() })
	if len(all) == 1 {
		return &prefixes{one: all[0].Masked()}
	}
	s := l.set(name, nftables.TypeIPAddr)
	s.Interval, s.elements = true, intervals(all)
	return &prefixes{set: s}
}

// has matches if the address is in one of the prefixes, hasNot if it is in none. For a nil
// p hasNot is empty, so it always matches.
func (p *prefixes) has(addr operand) exprs { return p.test(addr, true) }

func (p *prefixes) hasNot(addr operand) exprs {
	if p == nil {
		return nil
	}
	return p.test(addr, false)
}

func (p *prefixes) test(addr operand, in bool) exprs {
	if p.set != nil {
		return addr.lookup(p.set, !in)
	}
	return addr.inPrefix(p.one, in)
}

// inPrefix matches if the address is in p, or with in false if it is not. If p ends at a
// byte boundary, only those bytes of a packet field are loaded, as nft does it.
func (o operand) inPrefix(p netip.Prefix, in bool) exprs {
	op := expr.CmpOpNeq
	if in {
		op = expr.CmpOpEq
	}
	addr, bits := p.Masked().Addr().AsSlice(), p.Bits()
	if field, ok := o.load(0)[0].(*expr.Payload); ok && bits > 0 && bits%8 == 0 {
		field.Len = uint32(bits / 8)
		return exprs{field, &expr.Cmp{Op: op, Register: register(0), Data: addr[:bits/8]}}
	}
	if bits < 8*len(addr) {
		o = o.and(net.CIDRMask(bits, 8*len(addr)))
	}
	return o.compare(op, addr)
}

// setPorts fills s with ports, as intervals if there are many: to insert into a set of
// single ports, the kernel (nft_bitmap) takes a time that grows with the number of ports.
func (s *set) setPorts(ports []uint16) {
	ports = slices.Compact(slices.Sorted(slices.Values(ports)))
	if len(ports) > fewPorts {
		var ranges cone.PortRanges
		for _, p := range ports {
			ranges = append(ranges, cone.PortRange{First: p, Last: p})
		}
		s.setPortRanges(ranges)
		return
	}
	for _, p := range ports {
		s.elements = append(s.elements, nftables.SetElement{Key: be16(p)})
	}
}

// setPortRanges fills s with ranges of ports, as intervals.
func (s *set) setPortRanges(ranges cone.PortRanges) {
	s.Interval = true
	for _, r := range ranges.Merged() {
		s.elements = append(s.elements, nftables.SetElement{Key: be16(r.First)})
		if r.Last != math.MaxUint16 {
			s.elements = append(s.elements, nftables.SetElement{Key: be16(r.Last + 1), IntervalEnd: true})
		}
	}
}

// Up to fewPorts ports are looked up faster as single elements.
const fewPorts = 256
