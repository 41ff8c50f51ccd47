package userrules

import (
	"cmp"
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
	"sort"

	"github.com/conenatd/conenatd/internal/cone"
)

// A taker says whose packets forwards take, and where they send them.
type taker struct {
	sources cone.AddrRanges // sorted and disjoint; nil stands for any
	to      forwardTo       // for all sources
	tos     []forwardTo     // for each range of sources, if they are several; nil otherwise
}

// A forwardTo has To and ToPrefix of a Forward.
type forwardTo struct {
	to     netip.AddrPort
	prefix netip.Prefix
}

// LeadsTo returns the endpoint to which the rule sends packets to an outside endpoint that it covers,
// or an invalid one if that is not known.
func (f Forward) LeadsTo(ext netip.AddrPort) netip.AddrPort {
	return forwardTo{f.To, f.ToPrefix}.of(cone.EndpointFrom(ext))
}

// of is LeadsTo.
func (d forwardTo) of(ext cone.Endpoint) netip.AddrPort {
	switch {
	case d.to.IsValid():
		return netip.AddrPortFrom(d.to.Addr(), cmp.Or(d.to.Port(), ext.Port))
	case !d.prefix.IsValid():
		return netip.AddrPort{}
	}
	addr, low := d.prefix.Masked().Addr().AsSlice(), ext.Addr.Netip().AsSlice()
	if len(addr) != len(low) {
		return netip.AddrPort{}
	}
	for i := range addr {
		addr[i] |= low[i] & byte(0xff>>min(8, max(0, d.prefix.Bits()-8*i)))
	}
	to, _ := netip.AddrFromSlice(addr)
	return netip.AddrPortFrom(to, ext.Port)
}

func (d forwardTo) compare(o forwardTo) int {
	return cmp.Or(d.to.Compare(o.to), d.prefix.Compare(o.prefix))
}

// anyTaker takes packets of everybody and sends them to an unknown endpoint. manyTakers stands
// for more than can be told apart, and counts as one that does.
var anyTaker, manyTakers = &taker{}, &taker{}

func (t *taker) equal(o *taker) bool {
	return t == o || t.to == o.to && slices.Equal(t.tos, o.tos) && sameList(t.sources, o.sources) && t != manyTakers && o != manyTakers
}

func (t *taker) compare(o *taker) int {
	return cmp.Or(t.to.compare(o.to), slices.CompareFunc(t.sources, o.sources, func(a, b cone.AddrRange) int {
		return cmp.Or(a.First.Compare(b.First), a.Last.Compare(b.Last))
	}))
}

// leads says where the taker may send packets of p's peers.
func (t *taker) leads(p *cone.Permission) cone.Forwarding {
	where := func(to forwardTo) cone.Forwarding {
		if to.of(p.Ext) != p.Int.Netip() {
			return cone.ForwardedElsewhere
		}
		return cone.ForwardedHere
	}
	if t.sources == nil {
		return where(t.to)
	}
	most := cone.NotForwarded
	peers := p.Peers()
	first, last := peers.Addr(), cone.RangeOf(peers).Last
	for i := sort.Search(len(t.sources), func(i int) bool { return !t.sources[i].Last.Less(first) }); i < len(t.sources); i++ {
		switch {
		case last.Less(t.sources[i].First):
			return most
		case t.tos == nil:
			return where(t.to)
		}
		most = max(most, where(t.tos[i]))
	}
	return most
}

// takers are those of one Covered.
type takers struct {
	lists  listNumbers // of sources
	all    map[takerKey]*taker
	order  map[*taker]int    // by what they have, so that it is the same for the same forwards
	merged map[string]*taker // by the takers that it stands for
	steps  int
}

type takerKey struct {
	list int // 0 stands for all sources
	to   forwardTo
}

func newTakers() *takers {
	return &takers{
		all: map[takerKey]*taker{}, order: map[*taker]int{}, merged: map[string]*taker{},
	}
}

// of returns the taker of f; forwards that are alike share one.
func (s *takers) of(f Forward) *taker {
	to := forwardTo{f.To, f.ToPrefix}
	if f.Sources == nil && to == (forwardTo{}) {
		return anyTaker
	}
	key := takerKey{s.lists.of(f.Sources), to}
	if s.all[key] == nil {
		s.all[key] = &taker{sources: f.Sources, to: to}
	}
	return s.all[key]
}

// sort sets the order of the takers, once all are known.
func (s *takers) sort() {
	for i, t := range slices.SortedFunc(maps.Values(s.all), (*taker).compare) {
		s.order[t] = i
	}
}

const (
	// mostTakers limits how many takers of one port a lookup asks. More of them become one.
	mostTakers = 64
	// mostMerged limits the ranges of sources that these have together, and so what they cost. Beyond
	// it they take all packets.
	mostMerged = 1 << 18
)

// together returns the takers that cover the same ports.
func (s *takers) together(active map[*taker]int) (by []*taker) {
	if active[anyTaker] > 0 {
		return []*taker{anyTaker}
	}
	if len(active) > mostTakers {
		s.steps += len(active)
	}
	if len(active) > mostTakers && s.steps > mostMerged {
		return []*taker{manyTakers}
	}
	by = slices.SortedFunc(maps.Keys(active), func(a, b *taker) int { return s.order[a] - s.order[b] })
	if len(by) > mostTakers {
		return []*taker{s.merge(by)}
	}
	return by
}

// merge returns a taker that stands for all.
func (s *takers) merge(all []*taker) *taker {
	var key []byte
	ranges := 0
	for _, t := range all {
		key = binary.AppendUvarint(key, uint64(s.order[t]))
		ranges += len(t.sources)
	}
	if t := s.merged[string(key)]; t != nil {
		return t
	}
	if s.steps += ranges; s.steps > mostMerged {
		return manyTakers
	}
	// An edge is where the sources of a taker begin (add 1), or the first address after them (-1).
	type edge struct {
		at  netip.Addr
		to  forwardTo
		add int
	}
	var edges []edge
	for _, t := range all {
		sources := t.sources
		if sources == nil {
			sources = everyAddr
		}
		for _, r := range sources {
			edges = append(edges, edge{r.First, t.to, 1})
			if next := r.Last.Next(); next.IsValid() {
				edges = append(edges, edge{next, t.to, -1})
			}
		}
	}
	slices.SortFunc(edges, func(a, b edge) int { return a.at.Compare(b.at) })
	t, active := &taker{sources: cone.AddrRanges{}, tos: []forwardTo{}}, map[forwardTo]int{}
	for i, e := range edges {
		if i > 0 && edges[i-1].at.BitLen() != e.at.BitLen() {
			clear(active) // those to the end of the other family
		}
		if active[e.to] += e.add; active[e.to] == 0 {
			delete(active, e.to)
		}
		var last netip.Addr
		switch {
		case i+1 < len(edges) && edges[i+1].at == e.at, len(active) == 0:
			continue
		case i+1 < len(edges) && edges[i+1].at.BitLen() == e.at.BitLen():
			last = edges[i+1].at.Prev()
		case e.at.Is4():
			last = everyAddr[0].Last
		default:
			last = everyAddr[1].Last
		}
		var to forwardTo // unknown, if there are several
		if len(active) == 1 {
			for only := range active {
				to = only
			}
		}
		if n := len(t.sources); n > 0 && t.sources[n-1].Last.Next() == e.at && t.tos[n-1] == to {
			t.sources[n-1].Last = last
			continue
		}
		t.sources, t.tos = append(t.sources, cone.AddrRange{First: e.at, Last: last}), append(t.tos, to)
	}
	s.merged[string(key)] = t
	return t
}

// coveredPorts are ports that the same forwards cover.
type coveredPorts struct {
	cone.PortRange
	by []*taker // in order
}

func (c coveredPorts) equal(d coveredPorts) bool {
	return c.PortRange == d.PortRange && slices.EqualFunc(c.by, d.by, (*taker).equal)
}

// sources returns whose packets the forwards take; nil stands for everybody's.
func (c coveredPorts) sources() (all cone.AddrRanges) {
	for _, t := range c.by {
		if t.sources == nil {
			return nil
		}
		all = append(all, t.sources...)
	}
	return all
}

// lead says where forwards of the port may lead packets of p's peers. If p is nil, each forward of
// the port leads elsewhere.
func lead(ports []coveredPorts, port uint16, p *cone.Permission) (most cone.Forwarding) {
	i, found := slices.BinarySearchFunc(ports, port, func(r coveredPorts, port uint16) int {
		switch {
		case r.Last < port:
			return -1
		case r.First > port:
			return 1
		}
		return 0
	})
	switch {
	case !found:
		return cone.NotForwarded
	case p == nil:
		return cone.ForwardedElsewhere
	}
	for _, t := range ports[i].by {
		most = max(most, t.leads(p))
	}
	return most
}

// takenPorts are ports that a forward covers.
type takenPorts struct {
	cone.PortRange
	by *taker
}

// divide returns the ports of all, sorted and disjoint, each range with its takers.
func (s *takers) divide(all []takenPorts) (out []coveredPorts) {
	type edge struct {
		at  int // the first port of a range, or the first after it
		by  *taker
		add int
	}
	var edges []edge
	for _, p := range all {
		if p.First <= p.Last {
			edges = append(edges, edge{int(p.First), p.by, 1}, edge{int(p.Last) + 1, p.by, -1})
		}
	}
	slices.SortFunc(edges, func(a, b edge) int { return a.at - b.at })
	active := map[*taker]int{}
	for i, e := range edges {
		if active[e.by] += e.add; active[e.by] == 0 {
			delete(active, e.by)
		}
		if i+1 == len(edges) || edges[i+1].at == e.at || len(active) == 0 {
			continue
		}
		next := coveredPorts{cone.PortRange{First: uint16(e.at), Last: uint16(edges[i+1].at - 1)}, s.together(active)}
		if n := len(out); n > 0 && int(out[n-1].Last)+1 == e.at && slices.Equal(out[n-1].by, next.by) {
			out[n-1].Last = next.Last
		} else {
			out = append(out, next)
		}
	}
	return out
}
