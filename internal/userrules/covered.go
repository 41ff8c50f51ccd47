package userrules

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Covered is what any of some forwards covers, made quick to ask: what a look-up
// costs grows with the logarithm of their number. It is not changed once made, and
// safe for concurrent use. Nil covers nothing.
type Covered struct {
	// By range of addresses, sorted; ranges may overlap.
	ranges []coveredRange
	// last of a range is the last address of all of its half of the tree, which is
	// that of a binary search.
	last []netip.Addr
}

type coveredRange struct {
	AddrRange
	ports []PortRange // sorted and disjoint
}

var everyPort = []PortRange{{0, 0xffff}}

// Cover returns what the forwards cover.
func Cover(forwards []Forward) *Covered {
	ports := map[AddrRange][]PortRange{}
	for _, f := range forwards {
		p := f.Ports
		if f.All {
			p = everyPort
		}
		addrs := f.Addrs
		if addrs == nil {
			addrs = everyAddr
		}
		for _, a := range addrs {
			ports[a] = append(ports[a], p...)
		}
	}
	c := &Covered{}
	for a, p := range ports {
		c.ranges = append(c.ranges, coveredRange{a, merge(p)})
	}
	slices.SortFunc(c.ranges, func(a, b coveredRange) int {
		return cmp.Or(a.First.Compare(b.First), a.Last.Compare(b.Last))
	})
	c.last = make([]netip.Addr, len(c.ranges))
	c.build(0, len(c.ranges))
	return c
}

var everyAddr = []AddrRange{
	{netip.IPv4Unspecified(), netip.AddrFrom4([4]byte{255, 255, 255, 255})},
	{netip.IPv6Unspecified(), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")},
}

// build fills in c.last from low up to high and returns the last address there.
func (c *Covered) build(low, high int) (last netip.Addr) {
	if low == high {
		return netip.Addr{}
	}
	mid := (low + high) / 2
	last = c.ranges[mid].Last
	for _, l := range []netip.Addr{c.build(low, mid), c.build(mid+1, high)} {
		if l.Compare(last) > 0 {
			last = l
		}
	}
	c.last[mid] = last
	return last
}

// Ranges yields what c covers, as addresses and ports.
func (c *Covered) Ranges() iter.Seq2[AddrRange, PortRange] {
	return func(yield func(AddrRange, PortRange) bool) {
		if c == nil {
			return
		}
		for _, r := range c.ranges {
			for _, p := range r.ports {
				if !yield(r.AddrRange, p) {
					return
				}
			}
		}
	}
}

// Covers reports whether one of the forwards covers e.
func (c *Covered) Covers(e cone.Endpoint) bool {
	return c != nil && c.covers(0, len(c.ranges), e.Addr.Netip(), e.Port)
}

func (c *Covered) covers(low, high int, a netip.Addr, port uint16) bool {
	for low < high {
		mid := (low + high) / 2
		if c.last[mid].Compare(a) < 0 {
			return false
		}
		r := &c.ranges[mid]
		if r.First.Compare(a) > 0 {
			high = mid
			continue
		}
		if a.Compare(r.Last) <= 0 && hasPort(r.ports, port) || c.covers(low, mid, a, port) {
			return true
		}
		low = mid + 1
	}
	return false
}

// hasPort reports whether a port is in sorted, disjoint ranges.
func hasPort(ranges []PortRange, port uint16) bool {
	_, found := slices.BinarySearchFunc(ranges, port, func(r PortRange, port uint16) int {
		switch {
		case r.Last < port:
			return -1
		case r.First > port:
			return 1
		}
		return 0
	})
	return found
}

// Equal reports whether both cover the same by the same ranges.
func (c *Covered) Equal(d *Covered) bool {
	if c == nil || d == nil {
		return c == d
	}
	return slices.EqualFunc(c.ranges, d.ranges, func(a, b coveredRange) bool {
		return a.AddrRange == b.AddrRange && slices.Equal(a.ports, b.ports)
	})
}

// merge sorts ranges and joins those that touch.
func merge(ranges []PortRange) []PortRange {
	slices.SortFunc(ranges, func(a, b PortRange) int { return int(a.First) - int(b.First) })
	var out []PortRange
	for _, r := range ranges {
		if n := len(out); n > 0 && int(r.First) <= int(out[n-1].Last)+1 {
			out[n-1].Last = max(out[n-1].Last, r.Last)
		} else if r.First <= r.Last {
			out = append(out, r)
		}
	}
	return out
}
