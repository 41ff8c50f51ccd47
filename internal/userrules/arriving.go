package userrules

import (
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
)

// A rule may be for some of several outside links. A Forward has no links, only destinations, since
// whoever asks knows the outside endpoint alone. The addresses of the links tell the rest: packets
// for them come by no other link (Link.Addrs), unless a router sends them there all the same.

// arriving restricts c to packets that come by one of the outside links that a test passes. It
// reports whether there is one.
func (w *walker) arriving(c condition, passes func(Link) bool) (condition, bool) {
	if w.outside == nil {
		return c, true
	}
	in := []int{}
	for _, l := range w.outside {
		if passes(l) && (c.in == nil || slices.Contains(c.in, l.Index)) {
			in = append(in, l.Index)
		}
	}
	if c.tested = true; c.in != nil || len(in) < len(w.outside) {
		c.in = in
	}
	return c, len(in) > 0
}

// byAddr returns c for forwards. Where packets for some addresses may come by the links of c and by
// others, the condition for these addresses is wide. Where they come by other links it is astray, too,
// unless the rule itself names them.
func (w *walker) byAddr(c condition) (all []condition) {
	if c.in == nil || len(c.in) == len(w.outside) {
		return []condition{c}
	}
	if w.own == nil {
		w.own = ownAddrsOf(w.outside)
	}
	var here cone.AddrRanges
	for _, l := range c.in {
		here = append(here, w.own.of[l]...)
	}
	addrs := c.ranges(c.addrs).Merged()
	unsure, astray, sure := c, c, c
	unsure.wide, astray.wide, astray.astray = true, true, true
	sure.addrs = commonAddrs(addrs, here.Merged())
	unsure.addrs, _ = exceptAddrs(addrs, sure.addrs)
	if c.addrs == nil {
		astray.addrs = commonAddrs(unsure.addrs, w.own.all)
		unsure.addrs, _ = exceptAddrs(unsure.addrs, w.own.all)
	}
	for _, part := range []condition{unsure, astray, sure} {
		if len(part.addrs) > 0 {
			all = append(all, part)
		}
	}
	return all
}

// mostOwn limits the ranges of addresses by which forwards are told apart. Each forward for some
// of the links has about as many.
const mostOwn = 64

// ownAddrs are the addresses whose packets come by one link alone.
type ownAddrs struct {
	all cone.AddrRanges
	of  map[int]cone.AddrRanges // by the index of the link
}

// ownAddrsOf returns none if they are too many.
func ownAddrsOf(links []Link) *ownAddrs {
	own := ownAddrs{of: make(map[int]cone.AddrRanges)}
	for _, l := range links {
		var addrs cone.AddrRanges
		for _, a := range l.Addrs {
			addrs = append(addrs, cone.AddrRange{First: a, Last: a})
		}
		own.of[l.Index] = addrs.Merged()
		own.all = append(own.all, own.of[l.Index]...)
	}
	if own.all = own.all.Merged(); len(own.all) > mostOwn {
		return &ownAddrs{}
	}
	return &own
}
