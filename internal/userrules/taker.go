package userrules

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// A taker says whose packets a forward takes, and where it sends them.
type taker struct {
	sources []AddrRange    // nil stands for any
	to      netip.AddrPort // as Forward.To
	key     string         // identifies the taker
}

// anyTaker takes packets of everybody and sends them to an unknown endpoint. manyTakers stands
// for more than are kept apart, and counts as one that does.
var anyTaker, manyTakers = &taker{}, &taker{key: "many"}

// takerOf returns the taker of f; forwards that are alike share one.
func takerOf(f Forward, known map[string]*taker) *taker {
	if f.Sources == nil && !f.To.IsValid() {
		return anyTaker
	}
	key := fmt.Sprint(f.Sources, f.Sources == nil, f.To)
	if known[key] == nil {
		known[key] = &taker{f.Sources, f.To, key}
	}
	return known[key]
}

// bars reports whether the taker conflicts with p: it may send packets of p's peers
// elsewhere than p does.
func (t *taker) bars(p *cone.Permission) bool {
	if in := p.Int.Netip(); t.to.Addr() == in.Addr() && cmp.Or(t.to.Port(), p.Ext.Port) == in.Port() {
		return false
	}
	if t.sources == nil {
		return true
	}
	peers := p.Peers()
	first, last := peers.Addr(), nfnl.LastAddr(peers)
	return slices.ContainsFunc(t.sources, func(r AddrRange) bool {
		return r.First.BitLen() == first.BitLen() && r.First.Compare(last) <= 0 && first.Compare(r.Last) <= 0
	})
}

// coveredPorts are ports that the same forwards cover.
type coveredPorts struct {
	PortRange
	by []*taker // sorted by key
}

func (c coveredPorts) equal(d coveredPorts) bool {
	return c.PortRange == d.PortRange && slices.EqualFunc(c.by, d.by, func(a, b *taker) bool { return a.key == b.key })
}

// sources returns whose packets the forwards take; nil stands for everybody's.
func (c coveredPorts) sources() (all []AddrRange) {
	for _, t := range c.by {
		if t.sources == nil {
			return nil
		}
		all = append(all, t.sources...)
	}
	return all
}

// take reports whether a forward of the port conflicts with p. If p is nil, each forward of
// the port counts.
func take(ports []coveredPorts, port uint16, p *cone.Permission) bool {
	i, found := slices.BinarySearchFunc(ports, port, func(r coveredPorts, port uint16) int {
		switch {
		case r.Last < port:
			return -1
		case r.First > port:
			return 1
		}
		return 0
	})
	return found && (p == nil || slices.ContainsFunc(ports[i].by, func(t *taker) bool { return t.bars(p) }))
}

// mostTakers limits how many takers of one port are kept apart, because a lookup asks each
// of them. More of them count as one that takes all packets.
const mostTakers = 64

// takenPorts are ports that a forward covers.
type takenPorts struct {
	PortRange
	by *taker
}

// divide returns the ports of all, sorted and disjoint, each range with its takers.
func divide(all []takenPorts) (out []coveredPorts) {
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
		next := coveredPorts{PortRange{uint16(e.at), uint16(edges[i+1].at - 1)}, together(active)}
		if n := len(out); n > 0 && int(out[n-1].Last)+1 == e.at && slices.Equal(out[n-1].by, next.by) {
			out[n-1].Last = next.Last
		} else {
			out = append(out, next)
		}
	}
	return out
}

// together returns the takers that cover the same ports.
func together(active map[*taker]int) (by []*taker) {
	switch {
	case active[anyTaker] > 0:
		return []*taker{anyTaker}
	case len(active) > mostTakers:
		return []*taker{manyTakers}
	}
	for t := range active {
		by = append(by, t)
	}
	slices.SortFunc(by, func(a, b *taker) int { return cmp.Compare(a.key, b.key) })
	return by
}
