package userrules

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
)

// mostShutSteps bounds by how many rules and elements Shut takes packets to find the ports, hosts and
// peers that rules name. Each takes about a microsecond.
const mostShutSteps = 1 << 16

// Shut returns flows of the user's forwards to hosts of some prefixes that the chains of the prerouting
// and forward hooks drop for certain. It may leave out some if the rules name many ports or peers. The
// flows are sorted. Links, order and errors are as for Children.
func (rs *Ruleset) Shut(outside, inside []Link, hosts []netip.Prefix) (all []cone.Shut, err error) {
	q := childQuery{outside: outside, subnets: hosts}
	if err := rs.prepare(&q, inside); err != nil {
		return nil, err
	}
	q.chains = slices.DeleteFunc(q.chains, func(b baseChain) bool { return b.kind == natKind }) // the forward ends them
	return q.shut()
}

// shut answers Shut.
func (q *childQuery) shut() (all []cone.Shut, err error) {
	parts := make([]shutPart, len(q.subnets))
	for i, h := range q.subnets {
		anybody := netip.PrefixFrom(h.Addr(), 0).Masked()
		parts[i] = shutPart{cone.Shut{Peers: anybody, Hosts: h.Masked(), Ports: cone.PortRange{Last: 0xffff}}, i}
	}
	for left := len(parts) + mostShutSteps/q.steps(); len(parts) > 0 && left > 0; left-- {
		p := parts[0]
		parts = parts[1:]
		a, halves, err := q.forwarded(p)
		if err != nil {
			return nil, err
		}
		if a == Dropped {
			all = append(all, p.Shut)
		}
		if a == Unknown {
			parts = append(parts, halves...)
		}
	}
	return joinedShut(all), nil
}

// steps is about how many rules and elements packets may meet by all links. To begin costs as much as
// 16.
func (q *childQuery) steps() (n int) {
	n = 16
	seen := make(map[*table]bool)
	for _, b := range q.chains {
		if seen[b.table] {
			continue
		}
		seen[b.table] = true
		for _, c := range b.table.chains {
			n += len(c.rules)
		}
		for _, s := range b.table.sets {
			n += len(s.elements)
		}
	}
	return n * len(linksOrAny(q.outside))
}

// A shutPart is a part of the flows to a subnet. Its ports differ in their low bits alone.
type shutPart struct {
	cone.Shut
	subnet int
}

// forwarded says what the chains do with the first packets of a part of the user's forwards. If that
// depends on what packets of the part differ in, it returns the halves of the part, too.
func (q *childQuery) forwarded(p shutPart) (a Answer, halves []shutPart, err error) {
	var ports, hosts, peers bool // whether a test of them told nothing
	for n, in := range linksOrAny(q.outside) {
		c := newChild(false, in, q.inside[p.subnet], q.outside, p.Hosts, q.subnets)
		c.labelled = false
		if p.Peers.Bits() > 0 {
			copy(c.source(), inPrefix(p.Peers))
		}
		outside, own := outsideAddr(q.sources, q.exempt, in, p.Hosts)
		s := stagesOf(c, outside, own)
		port := unknownBytes(2, &origin{even: true})
		for i, b := range binary.BigEndian.AppendUint16(nil, p.Ports.First) {
			port[i].val, port[i].known = b, ^byte((p.Ports.Last-p.Ports.First)>>(8*(1-i)))
		}
		for _, c := range []*child{s.routing, s.forwarded} { // before NAT it may be another one
			c.transport = slices.Concat(c.transport[:2], port)
		}
		one, _, err := hookAnswer(q.chains, s, false)
		if err != nil {
			return Unknown, nil, err
		}
		if s.routing.rewritten { // the forward hook sees something else
			one = both(one, Accepted)
		}
		if n == 0 {
			a = one
		}
		a = both(a, one)
		ports, hosts, peers = ports || port[0].unsure, hosts || c.network[c.destination()].unsure, peers || c.source()[0].unsure
	}
	low, high := p, p
	switch {
	case ports:
		low.Ports.Last = p.Ports.First + (p.Ports.Last-p.Ports.First)/2
		high.Ports.First = low.Ports.Last + 1
	case hosts:
		low.Hosts, high.Hosts = halved(p.Hosts)
	case peers:
		low.Peers, high.Peers = halved(p.Peers)
	default:
		return a, nil, nil
	}
	return a, []shutPart{low, high}, nil
}

// halved returns the two halves of a prefix that has more than one address.
func halved(p netip.Prefix) (low, high netip.Prefix) {
	b := p.Addr().AsSlice()
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	first, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(p.Addr(), p.Bits()+1), netip.PrefixFrom(first, p.Bits()+1)
}

// joinedShut sorts flows, and joins those to adjacent ports.
func joinedShut(all []cone.Shut) (joined []cone.Shut) {
	slices.SortFunc(all, func(a, b cone.Shut) int {
		return cmp.Or(a.Hosts.Compare(b.Hosts), a.Peers.Compare(b.Peers), cmp.Compare(a.Ports.First, b.Ports.First))
	})
	for _, s := range all {
		if n := len(joined); n > 0 {
			if l := &joined[n-1]; l.Hosts == s.Hosts && l.Peers == s.Peers && int(l.Ports.Last)+1 == int(s.Ports.First) {
				l.Ports.Last = s.Ports.Last
				continue
			}
		}
		joined = append(joined, s)
	}
	return joined
}
