package userrules

import (
	"slices"
	"sort"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// mostPassed limits the conditions that a letPass has. What other rules let pass is not taken out
// of the conditions of later rules, which makes these wider than the truth.
const mostPassed = 64

// A letPass has packets that rules let pass. Conditions that differ in nothing but the sources, the
// destinations or the ports are one, with thousands of prefixes perhaps.
type letPass struct {
	conds []condition
	fresh []condition // that are not among conds yet
}

// pass notes packets that do not go on to the next rule, by a verdict. What a rule drops counts as if
// it went on: an expectation would let it in. It notes nothing for source NAT.
func (w *walker) pass(kind expr.VerdictKind, conds []condition) {
	var to *letPass
	switch {
	case w.sources != nil:
		return
	case kind == expr.VerdictAccept:
		to = &w.accepted
	case kind == expr.VerdictReturn, kind == expr.VerdictGoto:
		to = &w.returned[len(w.returned)-1]
	default:
		return
	}
	to.fresh = append(to.fresh, conds...)
}

// notPassed returns the conditions of a rule without the packets that earlier rules let pass.
func (w *walker) notPassed(conds []condition) []condition {
	var spare []condition
	except := func(p *letPass) {
		p.join(w.table.family)
		for i := range p.conds {
			left := spare[:0]
			for _, c := range conds {
				left = w.without(left, c, &p.conds[i])
			}
			conds, spare = left, conds
		}
	}
	conds = slices.Clone(conds) // except writes into it
	except(&w.accepted)
	for i := range w.returned {
		except(&w.returned[i])
	}
	return conds
}

// join puts the fresh conditions among the others.
func (p *letPass) join(family byte) {
	grown := make(map[int]bool)
	for _, c := range p.fresh {
		c.wide = c.wide || c.unknown || c.out != nil // no packet has a link to leave by yet
		i := 0
		for i < len(p.conds) && !p.conds[i].extend(c) {
			i++
		}
		switch {
		case i < len(p.conds):
			grown[i] = true
		case len(p.conds) >= mostPassed:
			p.conds[mostPassed-1] = condition{family: family, wide: true}
			delete(grown, mostPassed-1)
		default:
			c.sources, c.addrs, c.ports = slices.Clip(c.sources), slices.Clip(c.addrs), slices.Clone(c.ports)
			p.conds = append(p.conds, c)
		}
	}
	p.fresh = nil
	for i := range grown {
		c := &p.conds[i]
		c.sources, c.addrs = c.sources.Merged(), c.addrs.Merged()
	}
}

// extend adds the packets of o to c, and reports whether a condition can say that.
func (c *condition) extend(o condition) bool {
	sources, addrs, ports := sameList(c.sources, o.sources), sameList(c.addrs, o.addrs), sameList(c.ports, o.ports)
	switch {
	case c.family != o.family || c.wide != o.wide || !sameList(c.in, o.in):
		return false
	case addrs && ports:
		c.sources = joint(c.sources, o.sources)
	case sources && ports:
		c.addrs = joint(c.addrs, o.addrs)
	case sources && addrs:
		c.ports = jointPorts(c.ports, o.ports)
	default:
		return false
	}
	return true
}

// In lists of a condition nil stands for all.

func sameList[T comparable](a, b []T) bool { return (a == nil) == (b == nil) && slices.Equal(a, b) }

func joint[T any](a, b []T) []T {
	if a == nil || b == nil {
		return nil
	}
	return append(a, b...)
}

// jointPorts returns the ports of two merged lists as one, in place of a.
func jointPorts(a, b cone.PortRanges) cone.PortRanges {
	if a == nil || b == nil {
		return nil
	}
	for _, r := range b {
		i := sort.Search(len(a), func(i int) bool { return int(a[i].Last)+1 >= int(r.First) })
		end := i
		for ; end < len(a) && int(a[end].First) <= int(r.Last)+1; end++ {
			r = cone.PortRange{First: min(r.First, a[end].First), Last: max(r.Last, a[end].Last)}
		}
		a = slices.Replace(a, i, end, r)
	}
	return a
}

// without appends c without the packets of e, or c, as wide, if a condition cannot say that.
func (w *walker) without(to []condition, c condition, e *condition) []condition {
	if c.family == unix.NFPROTO_INET && e.family != c.family {
		v4, v6 := c, c
		v4.family, v6.family = unix.NFPROTO_IPV4, unix.NFPROTO_IPV6
		return w.without(w.without(to, v4, e), v6, e)
	}
	if e.family != unix.NFPROTO_INET && e.family != c.family {
		return append(to, c)
	}
	others, links := w.split(c.in, e.in)
	of := between(orEvery(e.ports), orEvery(c.ports))
	if !haveCommon(orEvery(c.ports), of) || links != nil && len(links) == 0 {
		return append(to, c)
	}
	sources, ofSources, ok := w.except(c.ranges(c.sources), c.ranges(e.sources))
	addrs, ofAddrs, ok2 := w.except(c.ranges(c.addrs), c.ranges(e.addrs))
	if !ofSources || !ofAddrs {
		return append(to, c)
	}
	if len(others) > 0 {
		rest := c
		rest.in, c.in = others, links
		return w.without(append(to, rest), c, e)
	}
	ports := intersect(orEvery(c.ports), complement(of))
	kinds := 0 // in which some are left
	for _, n := range []int{len(sources), len(addrs), len(ports)} {
		kinds += min(n, 1)
	}
	switch {
	case e.wide || !ok || !ok2 || kinds > 1:
		c.wide = true
	case len(addrs) > 0:
		c.addrs = addrs
	case len(ports) > 0:
		c.ports, c.spared = ports, c.spared || c.ports == nil
	case len(sources) > 0:
		c.sources = sources
	default: // e has all of c
		return to
	}
	return append(to, c)
}

// split returns the links of a that are not in b, and those that are. nil stands for all.
func (w *walker) split(a, b []int) (others, both []int) {
	if b == nil {
		return nil, a
	}
	if a == nil {
		for _, l := range w.outside {
			a = append(a, l.Index)
		}
	}
	both = []int{}
	for _, l := range a {
		if slices.Contains(b, l) {
			both = append(both, l)
		} else {
			others = append(others, l)
		}
	}
	return others, both
}

// between returns the part of a merged list from the first port of another one to the last.
func between(list, ports cone.PortRanges) cone.PortRanges {
	if len(ports) == 0 {
		return nil
	}
	list = list[sort.Search(len(list), func(i int) bool { return list[i].Last >= ports[0].First }):]
	return list[:sort.Search(len(list), func(i int) bool { return list[i].First > ports[len(ports)-1].Last })]
}

// haveCommon reports whether a port is in both lists, which are merged.
func haveCommon(a, b cone.PortRanges) bool {
	for len(a) > 0 && len(b) > 0 {
		if max(a[0].First, b[0].First) <= min(a[0].Last, b[0].Last) {
			return true
		}
		if a[0].Last < b[0].Last {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return false
}

func orEvery(ports cone.PortRanges) cone.PortRanges {
	if ports == nil {
		return everyPort
	}
	return ports
}

// ranges returns a list of addresses that c has. nil stands for all that it may have.
func (c condition) ranges(all cone.AddrRanges) cone.AddrRanges {
	switch {
	case all != nil:
		return all
	case c.family == unix.NFPROTO_IPV4:
		return everyAddr[:1]
	case c.family == unix.NFPROTO_IPV6:
		return everyAddr[1:]
	}
	return everyAddr
}

// at restricts the sources or the destinations of c to those that pass the test. It reports
// whether c is still possible.
func (w *walker) at(c condition, f field, t test) (condition, bool) {
	in, v6 := &c.addrs, f.kind == source6 || f.kind == address6
	if f.isSource() {
		in = &c.sources
	}
	exact := f.mask == nil || isPrefixMask(f.mask) && !t.loose
	all := w.list(t, v6)
	switch {
	case !t.not && *in == nil:
		*in = all
	case !t.not:
		*in = commonAddrs(*in, all)
	case exact && c.family != unix.NFPROTO_INET:
		var left cone.AddrRanges
		if left, _, exact = w.except(c.ranges(*in), all); exact {
			*in = left
		}
	default:
		exact = false
	}
	c.wide = c.wide || !exact
	return c, *in == nil || len(*in) > 0
}

// list returns the addresses in the spans of a test. Those of a set are put in order once.
func (w *walker) list(t test, v6 bool) cone.AddrRanges {
	if t.whole == nil {
		return t.addrs(v6).Merged()
	}
	all, known := w.lists[t.whole]
	if !known {
		if w.lists == nil {
			w.lists = make(map[*set]cone.AddrRanges)
		}
		all = t.addrs(v6).Merged()
		w.lists[t.whole] = all
	}
	return all
}
