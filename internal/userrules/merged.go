package userrules

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
)

// mostDiversions bounds the rules for diversions. Each first packet of a child meets them all.
// Of more, the last takes from all hosts and peers.
const mostDiversions = 256

// mostDiverted bounds the ranges of hosts and peers in the sets of these rules. Instead of the
// longest lists, all hosts or peers count.
const mostDiverted = 1 << 16

// MergedDiversions returns at most mostDiversions diversions: those of the same hosts and peers with all
// their ports, then those of the same hosts and ports with all their peers, then those of the same
// peers and ports with all their hosts. Of more, it joins those of the fewest ports.
func MergedDiversions(all []Diversion) []Diversion {
	var lists listNumbers
	sided := func(list cone.AddrRanges) int { return min(len(list), 1) } // not for all
	all = joined(all, func(d Diversion) [3]int { return [3]int{lists.of(d.Hosts), lists.of(d.Peers)} }, joinPorts)
	all = joined(all, func(d Diversion) [3]int {
		return [3]int{lists.of(d.Hosts), sided(d.Peers), lists.ofPorts(d.Ports)}
	}, func(to *Diversion, group []Diversion) {
		to.Peers = union(group, func(d Diversion) cone.AddrRanges { return d.Peers })
	})
	all = joined(all, func(d Diversion) [3]int {
		return [3]int{sided(d.Hosts), lists.of(d.Peers), lists.ofPorts(d.Ports)}
	}, func(to *Diversion, group []Diversion) {
		to.Hosts = union(group, func(d Diversion) cone.AddrRanges { return d.Hosts })
	})
	if len(all) > mostDiversions {
		slices.SortStableFunc(all, func(a, b Diversion) int { return cmp.Compare(b.Ports.Len(), a.Ports.Len()) })
		var rest Diversion
		joinPorts(&rest, all[mostDiversions-1:])
		all = append(all[:mostDiversions-1], rest)
	}
	shorten(all, &lists)
	return all
}

// joined joins the diversions that have a key in common.
func joined(all []Diversion, key func(Diversion) [3]int, join func(to *Diversion, group []Diversion)) (kinds []Diversion) {
	groups, order := make(map[[3]int][]Diversion), [][3]int(nil)
	for _, d := range all {
		k := key(d)
		if groups[k] == nil {
			order = append(order, k)
		}
		groups[k] = append(groups[k], d)
	}
	for _, k := range order {
		d := groups[k][0]
		join(&d, groups[k])
		kinds = append(kinds, d)
	}
	return kinds
}

func joinPorts(to *Diversion, group []Diversion) {
	to.Ports = nil
	for _, d := range group {
		to.Ports = append(to.Ports, d.Ports...)
	}
	slices.SortFunc(to.Ports, func(a, b cone.PortRange) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
	})
	to.Ports = slices.Compact(to.Ports)
}

// union returns the addresses of lists. One that is alone stays the same list.
func union(group []Diversion, of func(Diversion) cone.AddrRanges) cone.AddrRanges {
	if len(group) == 1 {
		return of(group[0])
	}
	var all cone.AddrRanges
	for _, d := range group {
		all = append(all, of(d)...)
	}
	return all.Merged()
}

// shorten replaces the longest lists of hosts and peers by all addresses until the different lists
// have at most mostDiverted ranges.
func shorten(all []Diversion, lists *listNumbers) {
	length, total := make(map[int]int), 0
	each := func(f func(list *cone.AddrRanges, number int)) {
		for i := range all {
			for _, list := range []*cone.AddrRanges{&all[i].Hosts, &all[i].Peers} {
				f(list, lists.of(*list))
			}
		}
	}
	each(func(list *cone.AddrRanges, n int) { length[n] = len(*list) })
	for _, n := range length {
		total += n
	}
	for total > mostDiverted {
		longest := 0
		for n := range length {
			if length[n] > length[longest] || length[n] == length[longest] && n < longest {
				longest = n
			}
		}
		total -= length[longest]
		delete(length, longest)
	}
	each(func(list *cone.AddrRanges, n int) {
		if _, stays := length[n]; !stays {
			*list = nil
		}
	})
}

// listNumbers number lists by what they contain. Of lists that lie at the same place only one is
// read. The zero value is ready for use.
type listNumbers struct {
	places   map[any]int
	contents map[string]int
}

// of returns the number of a list of addresses: 0 if it is nil, which stands for all.
func (l *listNumbers) of(list cone.AddrRanges) int {
	return l.number(list == nil, placeOf(list), func() (b []byte) {
		for _, r := range list {
			b = append(append(b, r.First.AsSlice()...), r.Last.AsSlice()...)
		}
		return b
	})
}

// ofPorts returns the number of a list of ports.
func (l *listNumbers) ofPorts(list cone.PortRanges) int {
	return l.number(list == nil, placeOf(list), func() []byte { return fmt.Append(nil, list) })
}

func (l *listNumbers) number(all bool, place any, content func() []byte) int {
	if all {
		return 0
	}
	if l.places == nil {
		l.places, l.contents = make(map[any]int), make(map[string]int)
	}
	n, known := l.places[place]
	if known {
		return n
	}
	has := string(content())
	if n, known = l.contents[has]; !known {
		n = len(l.contents) + 1
		l.contents[has] = n
	}
	l.places[place] = n
	return n
}
