package cone

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// A PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// Text names the ports, as the configuration does: "5060" or "10000-20000".
func (r PortRange) Text() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return strconv.Itoa(int(r.First)) + "-" + strconv.Itoa(int(r.Last))
}

// ParsePortRange reads one port, or two with a dash between them, as Text writes them.
func ParsePortRange(text string) (r PortRange, ok bool) {
	first, last, many := strings.Cut(text, "-")
	if !many {
		last = first
	}
	a, err := strconv.ParseUint(first, 10, 16)
	b, err2 := strconv.ParseUint(last, 10, 16)
	return PortRange{uint16(a), uint16(b)}, err == nil && err2 == nil && a <= b
}

// Has reports whether port p is in the range.
func (r PortRange) Has(p uint16) bool { return r.First <= p && p <= r.Last }

// Len returns the number of ports in r.
func (r PortRange) Len() int { return int(r.Last) - int(r.First) + 1 }

// Overlaps reports whether two ranges have a port in common.
func (r PortRange) Overlaps(o PortRange) bool { return r.First <= o.Last && o.First <= r.Last }

// PortRanges are several ranges of ports, in any order.
type PortRanges []PortRange

// Text names the ranges, with commas between them.
func (all PortRanges) Text() string {
	texts := make([]string, len(all))
	for i, r := range all {
		texts[i] = r.Text()
	}
	return strings.Join(texts, ",")
}

// Has reports whether port p is in one of the ranges.
func (all PortRanges) Has(p uint16) bool {
	return slices.ContainsFunc(all, func(r PortRange) bool { return r.Has(p) })
}

// Len returns the sum of the numbers of ports.
func (all PortRanges) Len() (n int) {
	for _, r := range all {
		n += r.Len()
	}
	return n
}

// Overlaps reports whether a port is in a range of both.
func (all PortRanges) Overlaps(others PortRanges) bool {
	return slices.ContainsFunc(all, func(r PortRange) bool { return slices.ContainsFunc(others, r.Overlaps) })
}

// Merged returns the ports of all ranges, sorted; ranges that touch are joined, and those whose
// ends are the wrong way round may be left out. It does not change all.
func (all PortRanges) Merged() (merged PortRanges) {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b PortRange) int { return cmp.Compare(a.First, b.First) })
	for _, r := range all {
		if n := len(merged); n > 0 && int(r.First) <= int(merged[n-1].Last)+1 {
			merged[n-1].Last = max(merged[n-1].Last, r.Last)
		} else if r.First <= r.Last {
			merged = append(merged, r)
		}
	}
	return merged
}

// An AddrRange is a range of addresses of one family, both ends included.
type AddrRange struct{ First, Last netip.Addr }

// RangeOf returns the addresses of a prefix.
func RangeOf(p netip.Prefix) AddrRange {
	first := p.Masked().Addr()
	last := first.AsSlice()
	for bit := p.Bits(); bit < 8*len(last); bit++ {
		last[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(last)
	return AddrRange{first, a}
}

// Has reports whether a is in the range.
func (r AddrRange) Has(a netip.Addr) bool {
	return r.First.BitLen() == a.BitLen() && r.First.Compare(a) <= 0 && a.Compare(r.Last) <= 0
}

// Overlaps reports whether two ranges have an address in common.
func (r AddrRange) Overlaps(o AddrRange) bool { return r.Has(o.First) || o.Has(r.First) }

// Few reports whether there are at most that many addresses.
func (r AddrRange) Few(most int) bool {
	for a := r.First; most > 0 && a.IsValid(); a, most = a.Next(), most-1 {
		if a == r.Last {
			return true
		}
	}
	return false
}

// Prefixes returns the prefixes that make up the range.
func (r AddrRange) Prefixes() (all []netip.Prefix) {
	for a := r.First; a.IsValid() && a.Compare(r.Last) <= 0; {
		p := netip.PrefixFrom(a, a.BitLen())
		for p.Bits() > 0 {
			wider := netip.PrefixFrom(a, p.Bits()-1)
			if wider.Masked().Addr() != a || RangeOf(wider).Last.Compare(r.Last) > 0 {
				break
			}
			p = wider
		}
		all = append(all, p)
		a = RangeOf(p).Last.Next()
	}
	return all
}

// AddrRanges are several ranges of addresses, in any order.
type AddrRanges []AddrRange

// Has reports whether a is in one of the ranges.
func (all AddrRanges) Has(a netip.Addr) bool {
	return slices.ContainsFunc(all, func(r AddrRange) bool { return r.Has(a) })
}

// Merged returns the addresses of all ranges, sorted and disjoint, those of IPv4 first. It does
// not change all. It returns nil for nil.
func (all AddrRanges) Merged() AddrRanges {
	if len(all) < 2 {
		return slices.Clip(all)
	}
	all = slices.SortedFunc(slices.Values(all), func(a, b AddrRange) int { return a.First.Compare(b.First) })
	merged := all[:1]
	for _, r := range all[1:] {
		last := &merged[len(merged)-1].Last
		switch {
		case last.BitLen() != r.First.BitLen(), last.Less(r.First) && last.Next() != r.First:
			merged = append(merged, r)
		case last.Less(r.Last):
			*last = r.Last
		}
	}
	return slices.Clip(merged)
}
