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
	// Doubtful says that a link is no outside link though a default route uses it: flows with
	// an outside address that is none of Uplinks, those of outside links, may show that it is.
	Doubtful bool
	Uplinks  []netip.Addr
	// Routes decide by longest match whether a peer is outside; default
	// routes are among them. A peer without a route is not outside. One prefix
	// that is there twice, once outside and once not, is not.
	Routes []Route

	outside *spans // of Routes; nil before Compile
	inside  *spans // what routes by other links than outside ones lead to
}

// A Route says whether a prefix lies behind an outside link.
type Route struct {
	Prefix  netip.Prefix
	Outside bool
}

// Compile returns t made ready for SetTopology, which else does it itself: many
// routes take their time.
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

// Equal reports whether t and u, which both are compiled, give the same answers.
func (t Topology) Equal(u Topology) bool {
	return slices.Equal(t.Local, u.Local) && t.Doubtful == u.Doubtful && slices.Equal(t.Uplinks, u.Uplinks) && t.outside.equal(u.outside) && t.inside.equal(u.inside)
}

// topology is a Topology made quick to ask.
type topology struct {
	local map[Addr]struct{}
	lost  map[Addr]time.Duration // until when flows with it give nothing
	peers *spans                 // those behind outside links
	other *spans                 // those behind other links

	doubtful bool
	uplinks  map[Addr]struct{} // where doubtful
}

func compileTopology(t Topology) topology {
	t = t.Compile()
	c := topology{
		local: make(map[Addr]struct{}, len(t.Local)),
		lost:  make(map[Addr]time.Duration),
		peers: t.outside, other: t.inside,
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
func (t *topology) outside(a netip.Addr) bool { return t.peers.has(a) }

// doubts reports whether flows with an outside address may leave by a link that is not known
// as an outside link.
func (t *topology) doubts(ext Addr) bool {
	if !t.doubtful {
		return false
	}
	_, known := t.uplinks[ext]
	return !known
}

// reached reports whether a route leads to a, by whatever link.
func (t *topology) reached(a netip.Addr) bool { return t.peers.has(a) || t.other.has(a) }

// spans gives addresses numbers, as prefixes that hold them say; where none does it is 0.
// What asking costs grows with the logarithm of their number. As a set it has the addresses
// whose number is not 0. Nil is the empty set.
type spans struct{ v4, v6 []spanStart }

// A spanStart is the number of addresses from one up to that of the next one. Neighbours
// differ, so that equal spans are equal slices.
type spanStart struct {
	first  addrBits
	number int32
}

// addrBits are the bits of an address, an IPv4-mapped one for IPv4.
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
	low, high := 0, len(starts) // all before low begin at x or before, none from high on
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

// spansOf returns the set of all addresses of some prefixes.
func spansOf(prefixes []netip.Prefix) *spans {
	routes := make([]Route, len(prefixes))
	for i, p := range prefixes {
		routes[i] = Route{p, true}
	}
	return newSpans(routes)
}

// newSpans returns the set of what is outside.
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
	spans    *spans // 1 more than the place in prefixes
}

// NewPrefixTable returns the table of some prefixes. Of several with one address the first
// counts.
func NewPrefixTable(prefixes []netip.Prefix) *PrefixTable {
	blocks := make([]block, len(prefixes))
	for i, p := range prefixes {
		blocks[i] = newBlock(p, int32(i+1))
	}
	return &PrefixTable{prefixes, spansOfBlocks(blocks, func(outer, inner int32) int32 { return min(outer, inner) })}
}

// Find returns the place of the prefix that a is in, or -1.
func (t *PrefixTable) Find(a netip.Addr) int { return int(t.spans.find(a)) - 1 }

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

// spansOfBlocks returns the spans of blocks; both tells the number of an inner one from those
// of the block around it and its own.
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
	// A block comes after those that hold it; of equal ones the least number last.
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
	add := func(first addrBits, number int32) { // which is at or behind the last one
		if n := len(starts); n > 0 && starts[n-1].first == first {
			starts = starts[:n-1]
		}
		if n := len(starts); n == 0 && number != 0 || n > 0 && starts[n-1].number != number {
			starts = append(starts, spanStart{first, number})
		}
	}
	var open []block // each within the one before
	end := func() {  // of the last one: behind it the one around it counts, if any
		n := len(open) - 1
		next := open[n].last
		if next.low++; next.low == 0 {
			next.high++
		}
		if next != (addrBits{}) { // else it was the last address of all
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
