package cone

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
	"time"
)

// A Topology is what the model must know of the gateway's links.
type Topology struct {
	// Local are the gateway's own addresses.
	Local []netip.Addr
	// Doubtful says that a default route uses a link that is not an outside link. Flows
	// with an outside address that is not in Uplinks, the addresses of outside links, may
	// show that it is one.
	Doubtful bool
	Uplinks  []netip.Addr
	// Routes decide by longest match whether a peer is outside; default routes are among
	// them. A peer without a route is not outside. A prefix that is listed both as outside
	// and as not outside is not outside.
	Routes []Route

	outside *spans // of Routes; nil before Compile
	inside  *spans // destinations of routes by links that are not outside links
}

// A Route says whether a prefix lies behind an outside link.
type Route struct {
	Prefix  netip.Prefix
	Outside bool
}

// Compile returns t prepared for SetTopology. SetTopology does it otherwise, but with many
// routes it takes time.
func (t Topology) Compile() Topology {
	if t.outside == nil {
		var inside []netip.Prefix
		for _, r := range t.Routes {
			if !r.Outside {
				inside = append(inside, r.Prefix)
			}
		}
		t.outside, t.inside, t.Routes = newSpans(t.Routes), spansOf(inside), nil
	}
	return t
}

// Equal reports whether t and u, which must be compiled, give the same answers.
func (t Topology) Equal(u Topology) bool {
	return slices.Equal(t.Local, u.Local) && t.Doubtful == u.Doubtful && slices.Equal(t.Uplinks, u.Uplinks) && t.outside.equal(u.outside) && t.inside.equal(u.inside)
}

// topology is a Topology prepared for fast look-ups.
type topology struct {
	local        map[Addr]struct{}
	lost         map[Addr]time.Duration // lost addresses: until when their flows give nothing
	outsideLinks *spans                 // addresses behind outside links
	otherLinks   *spans                 // addresses behind other links

	doubtful bool
	uplinks  map[Addr]struct{} // set if doubtful
}

func compileTopology(t Topology) topology {
	t = t.Compile()
	c := topology{
		local:        make(map[Addr]struct{}, len(t.Local)),
		lost:         make(map[Addr]time.Duration),
		outsideLinks: t.outside, otherLinks: t.inside,
	}
	for _, a := range t.Local {
		c.local[AddrFrom(a)] = struct{}{}
	}
	if t.Doubtful {
		c.doubtful, c.uplinks = true, make(map[Addr]struct{}, len(t.Uplinks))
		for _, a := range t.Uplinks {
			c.uplinks[AddrFrom(a)] = struct{}{}
		}
	}
	return c
}

// outside reports whether a lies behind an outside link.
func (t *topology) outside(a netip.Addr) bool { return t.outsideLinks.has(a) }

// doubts reports whether flows with the outside address ext may leave by a link that is not
// known as an outside link.
func (t *topology) doubts(ext Addr) bool {
	if !t.doubtful {
		return false
	}
	_, known := t.uplinks[ext]
	return !known
}

// reached reports whether a route by any link leads to a.
func (t *topology) reached(a netip.Addr) bool { return t.outsideLinks.has(a) || t.otherLinks.has(a) }

// spans maps each address to the number of the prefix that holds it, or to 0 if none does.
// The cost of a look-up grows with the logarithm of its size. As a set it has the addresses
// whose number is not 0. Nil is the empty set.
type spans struct{ v4, v6 []spanStart }

// A spanStart gives number to the addresses from first up to the next spanStart. Neighbours
// have different numbers, so that equal spans are equal slices.
type spanStart struct {
	first  addrBits
	number int32
}

// addrBits are the bits of an address, of an IPv4 address in its IPv4-mapped form.
type addrBits struct{ high, low uint64 }

func bitsOf(a netip.Addr) addrBits {
	b := a.As16()
	return addrBits{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

func (a addrBits) compare(b addrBits) int {
	if a.high != b.high {
		return cmp.Compare(a.high, b.high)
	}
	return cmp.Compare(a.low, b.low)
}

// has reports whether a is in the set.
func (s *spans) has(a netip.Addr) bool { return s.find(a) != 0 }

// find returns the number of a.
func (s *spans) find(a netip.Addr) int32 {
	if s == nil {
		return 0
	}
	starts := s.v6
	if a.Is4() {
		starts = s.v4
	}
	x := bitsOf(a)
	low, high := 0, len(starts) // starts before low are at x or below, those from high on above x
	for low < high {
		if mid := (low + high) / 2; starts[mid].first.compare(x) <= 0 {
			low = mid + 1
		} else {
			high = mid
		}
	}
	if low == 0 {
		return 0
	}
	return starts[low-1].number
}

func (s *spans) equal(t *spans) bool {
	if s == nil || t == nil {
		return s == t
	}
	return slices.Equal(s.v4, t.v4) && slices.Equal(s.v6, t.v6)
}

// spansOf returns the set of the addresses in some prefixes.
func spansOf(prefixes []netip.Prefix) *spans {
	routes := make([]Route, len(prefixes))
	for i, p := range prefixes {
		routes[i] = Route{p, true}
	}
	return newSpans(routes)
}

// newSpans returns the set of addresses that routes lead outside.
func newSpans(routes []Route) *spans {
	blocks := make([]block, len(routes))
	for i, r := range routes {
		blocks[i] = newBlock(r.Prefix, 0)
		if r.Outside {
			blocks[i].number = 1
		}
	}
	return spansOfBlocks(blocks, func(_, inner int32) int32 { return inner })
}

// A PrefixTable finds the prefix that an address is in.
type PrefixTable struct {
	prefixes []netip.Prefix
	spans    *spans // the index in prefixes plus 1
}

// NewPrefixTable returns the table of some prefixes. If several hold an address, the first
// of them counts.
func NewPrefixTable(prefixes []netip.Prefix) *PrefixTable {
	blocks := make([]block, len(prefixes))
	for i, p := range prefixes {
		blocks[i] = newBlock(p, int32(i+1))
	}
	return &PrefixTable{prefixes, spansOfBlocks(blocks, func(outer, inner int32) int32 { return min(outer, inner) })}
}

// Find returns the index of the prefix that holds a, or -1.
func (t *PrefixTable) Find(a netip.Addr) int { return int(t.spans.find(a)) - 1 }

// Holds reports whether one of the prefixes holds a.
func (t *PrefixTable) Holds(a Addr) bool { return t.spans.has(a.Netip()) }

// A block holds the addresses of a prefix.
type block struct {
	first, last addrBits
	is4         bool
	number      int32
}

func newBlock(p netip.Prefix, number int32) block {
	a, bits, is4 := bitsOf(p.Addr()), p.Bits(), p.Addr().Is4()
	if is4 {
		bits += 96
	}
	host := addrBits{^uint64(0) >> min(bits, 64), ^uint64(0) >> max(bits-64, 0)} // a shift by 64 leaves 0
	return block{
		first: addrBits{a.high &^ host.high, a.low &^ host.low}, last: addrBits{a.high | host.high, a.low | host.low},
		is4: is4, number: number,
	}
}

// spansOfBlocks returns the spans of blocks. both computes the number of a block inside
// another one from the numbers of the two.
func spansOfBlocks(blocks []block, both func(outer, inner int32) int32) *spans {
	var v4, v6 []block
	for _, b := range blocks {
		if b.is4 {
			v4 = append(v4, b)
		} else {
			v6 = append(v6, b)
		}
	}
	return &spans{startsOf(v4, both), startsOf(v6, both)}
}

// startsOf returns the starts for the blocks of one family.
func startsOf(blocks []block, both func(outer, inner int32) int32) []spanStart {
	// Sort a block after those that hold it, and equal blocks by falling number.
	slices.SortFunc(blocks, func(a, b block) int {
		c := a.first.compare(b.first)
		if c == 0 {
			c = b.last.compare(a.last)
		}
		if c == 0 {
			c = cmp.Compare(b.number, a.number)
		}
		return c
	})
	var starts []spanStart
	add := func(first addrBits, number int32) { // first is not below the last start
		if n := len(starts); n > 0 && starts[n-1].first == first {
			starts = starts[:n-1]
		}
		if n := len(starts); n == 0 && number != 0 || n > 0 && starts[n-1].number != number {
			starts = append(starts, spanStart{first, number})
		}
	}
	var open []block // each inside the one before
	end := func() {  // closes the last one: after it the block around it counts, if any
		n := len(open) - 1
		next := open[n].last
		if next.low++; next.low == 0 {
			next.high++
		}
		if next != (addrBits{}) { // else the block ends with the very last address
			around := int32(0)
			if n > 0 {
				around = open[n-1].number
			}
			add(next, around)
		}
		open = open[:n]
	}
	for _, b := range blocks {
		for len(open) > 0 && open[len(open)-1].last.compare(b.first) < 0 {
			end()
		}
		if n := len(open); n > 0 {
			b.number = both(open[n-1].number, b.number)
		}
		open = append(open, b)
		add(b.first, b.number)
	}
	for len(open) > 0 {
		end()
	}
	return slices.Clip(starts)
}
