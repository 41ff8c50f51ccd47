package userrules

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Covered has the endpoints that any of several forwards covers, arranged for fast
// lookup: the cost grows with the logarithm of their number. It is not changed once made,
// and safe for concurrent use. A nil Covered covers nothing.
type Covered struct {
	// The ranges of addresses, sorted; they may overlap.
	ranges []coveredRange
	// last has, for each range, the last address of any range in its subtree. The tree is
	// that of a binary search.
	last []netip.Addr
}

type coveredRange struct {
	cone.AddrRange
	ports []coveredPorts // sorted and disjoint
}

var everyPort = cone.PortRanges{{First: 0, Last: 0xffff}}

// Cover returns what the forwards cover.
func Cover(forwards []Forward) *Covered {
	takers, ports := newTakers(), map[cone.AddrRange][]takenPorts{}
	for _, f := range forwards {
		p := f.Ports
		if f.All {
			p = everyPort
		}
		addrs := f.Addrs
		if addrs == nil {
			addrs = everyAddr
		}
		by := takers.of(f)
		for _, a := range addrs {
			for _, r := range p {
				ports[a] = append(ports[a], takenPorts{r, by})
			}
		}
	}
	takers.sort()
	c := &Covered{}
	for _, a := range slices.SortedFunc(maps.Keys(ports), func(a, b cone.AddrRange) int {
		return cmp.Or(a.First.Compare(b.First), a.Last.Compare(b.Last))
	}) {
		c.ranges = append(c.ranges, coveredRange{a, takers.divide(ports[a])})
	}
	c.last = make([]netip.Addr, len(c.ranges))
	c.build(0, len(c.ranges))
	return c
}

var everyAddr = cone.AddrRanges{
	{First: netip.IPv4Unspecified(), Last: netip.AddrFrom4([4]byte{255, 255, 255, 255})},
	{First: netip.IPv6Unspecified(), Last: netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")},
}

// build fills in c.last for the ranges from low up to high, and returns their last address.
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

// A Part is what some forwards cover: addresses and ports, for packets from Sources, or if that
// is nil from all.
type Part struct {
	Addrs   cone.AddrRange
	Ports   cone.PortRange
	Sources cone.AddrRanges
}

// Parts yields what c covers, without ports that very many forwards divide among sources.
func (c *Covered) Parts() iter.Seq[Part] {
	return func(yield func(Part) bool) {
		if c == nil {
			return
		}
		for _, r := range c.ranges {
			var ports cone.PortRanges // for all sources
			for _, p := range r.ports {
				if p.by[0] == manyTakers {
					continue
				}
				if sources := p.sources(); sources == nil {
					ports = append(ports, p.PortRange)
				} else if !yield(Part{r.AddrRange, p.PortRange, sources}) {
					return
				}
			}
			for _, p := range ports.Merged() {
				if !yield(Part{r.AddrRange, p, nil}) {
					return
				}
			}
		}
	}
}

// Covers reports whether one of the forwards covers e.
func (c *Covered) Covers(e cone.Endpoint) bool {
	return c.leads(e, nil) != cone.NotForwarded
}

// ConflictsWith reports whether one of the forwards conflicts with p: it may lead a packet from a
// peer of p elsewhere than p does.
func (c *Covered) ConflictsWith(p cone.Permission) bool {
	return c.Forwards(p) == cone.ForwardedElsewhere
}

// Forwards says where the forwards may lead packets of the peers of p.
func (c *Covered) Forwards(p cone.Permission) cone.Forwarding { return c.leads(p.Ext, &p) }

// leads is Forwards for an endpoint. If p is nil, each forward that covers it leads elsewhere.
func (c *Covered) leads(e cone.Endpoint, p *cone.Permission) cone.Forwarding {
	if c == nil {
		return cone.NotForwarded
	}
	return c.within(0, len(c.ranges), e.Addr.Netip(), e.Port, p)
}

// within is leads for the forwards in a subtree.
func (c *Covered) within(low, high int, a netip.Addr, port uint16, p *cone.Permission) (most cone.Forwarding) {
	for low < high && most < cone.ForwardedElsewhere {
		mid := (low + high) / 2
		if c.last[mid].Compare(a) < 0 {
			return most
		}
		r := &c.ranges[mid]
		if r.First.Compare(a) > 0 {
			high = mid
			continue
		}
		if a.Compare(r.Last) <= 0 {
			most = max(most, lead(r.ports, port, p))
		}
		most = max(most, c.within(low, mid, a, port, p))
		low = mid + 1
	}
	return most
}

// Equal reports whether c and d cover the same endpoints with the same ranges.
func (c *Covered) Equal(d *Covered) bool {
	if c == nil || d == nil {
		return c == d
	}
	return slices.EqualFunc(c.ranges, d.ranges, func(a, b coveredRange) bool {
		return a.AddrRange == b.AddrRange && slices.EqualFunc(a.ports, b.ports, coveredPorts.equal)
	})
}
