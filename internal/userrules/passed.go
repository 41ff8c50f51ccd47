package userrules

import (
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// mostPassed limits the conditions of earlier rules, and the addresses in one, that are taken out
// of those of later rules. What is not taken out makes these wider than the truth.
const mostPassed = 64

// pass notes, for diversions, packets that do not go on to the next rule, by a verdict. What a
// rule drops counts as if it went on.
func (w *walker) pass(kind expr.VerdictKind, conds []condition) {
	var to *[]condition
	switch {
	case w.first == nil:
		return
	case kind == expr.VerdictAccept:
		to = &w.accepted
	case kind == expr.VerdictReturn, kind == expr.VerdictGoto:
		to = &w.returned
	default:
		return
	}
	for _, c := range conds {
		c.wide = c.wide || c.unknown || max(len(c.sources), len(c.addrs), len(c.ports)) > mostPassed
		if n := len(*to); n >= mostPassed {
			(*to)[n-1] = condition{family: w.table.family, wide: true}
			continue
		}
		*to = append(*to, c)
	}
}

// notPassed returns the conditions of a rule without the packets that earlier rules let pass.
func (w *walker) notPassed(conds []condition) []condition {
	for _, e := range slices.Concat(w.accepted, w.returned) {
		var left []condition
		for _, c := range conds {
			left = append(left, c.without(e)...)
		}
		conds = left
	}
	return conds
}

// without returns c without the packets of e, or c, as wide, if a condition cannot say that.
func (c condition) without(e condition) []condition {
	if c.family == unix.NFPROTO_INET && e.family != c.family {
		v4, v6 := c, c
		v4.family, v6.family = unix.NFPROTO_IPV4, unix.NFPROTO_IPV6
		return append(v4.without(e), v6.without(e)...)
	}
	if e.family != unix.NFPROTO_INET && e.family != c.family {
		return []condition{c}
	}
	sources, ofSources := c.subtract(c.sources, e.sources)
	addrs, ofAddrs := c.subtract(c.addrs, e.addrs)
	ports := complement(merge(slices.Clone(orEvery(e.ports))))
	ports, ofPorts := intersect(orEvery(c.ports), ports), len(intersect(orEvery(c.ports), orEvery(e.ports))) > 0
	switch {
	case !ofSources || !ofAddrs || !ofPorts: // e has no packet of c
	case e.wide:
		c.wide = true
	case len(addrs) == 0 && len(ports) == 0:
		c.sources = sources
	case len(sources) == 0 && len(ports) == 0:
		c.addrs = addrs
	case len(sources) == 0 && len(addrs) == 0:
		c.ports = ports
	default:
		c.wide = true
	}
	if c.sources != nil && len(c.sources) == 0 {
		return nil
	}
	return []condition{c}
}

func orEvery(ports []PortRange) []PortRange {
	if ports == nil {
		return everyPort
	}
	return ports
}

// subtract returns the addresses of a that are not in b, and whether others are. nil stands for
// all that c may have.
func (c condition) subtract(a, b []AddrRange) (left []AddrRange, some bool) {
	a, b = c.ranges(a), c.ranges(b)
	return exceptAddrs(a, b), len(intersectAddrs(a, b)) > 0
}

func (c condition) ranges(all []AddrRange) []AddrRange {
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

// exceptAddrs returns the addresses of a that are not in b. It is never nil.
func exceptAddrs(a, b []AddrRange) []AddrRange {
	left := slices.Clip(a)
	for _, not := range b {
		from := left
		left = []AddrRange{}
		for _, r := range from {
			if r.First.BitLen() != not.First.BitLen() || r.Last.Less(not.First) || not.Last.Less(r.First) {
				left = append(left, r)
				continue
			}
			if r.First.Less(not.First) {
				left = append(left, AddrRange{r.First, not.First.Prev()})
			}
			if not.Last.Less(r.Last) {
				left = append(left, AddrRange{not.Last.Next(), r.Last})
			}
		}
	}
	return left
}

// at restricts the sources or the destinations of c to those that pass the test. It reports
// whether c is still possible.
func (c condition) at(f field, t test) (condition, bool) {
	in, v6 := &c.addrs, f.kind == source6 || f.kind == address6
	if f.isSource() {
		in = &c.sources
	}
	exact := f.mask == nil || isPrefixMask(f.mask)
	switch {
	case !t.not:
		*in = intersectAddrs(*in, t.addrs(v6))
	case exact && len(t.any) <= mostPassed && c.family != unix.NFPROTO_INET:
		*in = exceptAddrs(c.ranges(*in), t.addrs(v6))
	default:
		exact = false
	}
	c.wide = c.wide || !exact
	return c, *in == nil || len(*in) > 0
}
