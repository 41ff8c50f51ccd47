package daemon

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

// mostDiversions bounds the rules for diversions. Each first packet of a child meets them all.
// Of more, the last takes from all hosts and peers.
const mostDiversions = 256

// mostDiverted bounds the ranges of hosts and peers in the sets of these rules. Instead of the
// longest lists, all hosts or peers count.
const mostDiverted = 1 << 16

// divert reads which ports of peers rules of the user's take from inside hosts, and reports
// whether the tables must change for it. What was read before holds if rules cannot be read.
func (f *firewall) divert(cfg config.Config, network gateway.Network) (changed bool) {
	if f.unread != nil || f.user == nil {
		return false
	}
	var next []userrules.Diversion
	own := network.Topology().Local
	all, same := f.diverter.Diversions(f.user, sidesOf(cfg, network))
	if same && slices.Equal(own, f.divertedOwn) {
		return false
	}
	f.divertedOwn = own
	for _, d := range all {
		// The gateway's own addresses are no peers.
		isOwn := func(r userrules.AddrRange) bool { return r.First == r.Last && slices.Contains(own, r.First) }
		if slices.ContainsFunc(d.Peers, isOwn) {
			if d.Peers = slices.DeleteFunc(slices.Clone(d.Peers), isOwn); len(d.Peers) == 0 {
				continue
			}
		}
		next = append(next, d)
	}
	next = merged(next)
	changed = !reflect.DeepEqual(next, f.diverted)
	f.diverted = next
	return changed
}

// merged returns at most mostDiversions diversions: those of the same hosts and peers with all
// their ports, then those of the same hosts and ports with all their peers, then those of the same
// peers and ports with all their hosts. Of more, it joins those of the fewest ports.
func merged(all []userrules.Diversion) []userrules.Diversion {
	var lists listNumbers
	sided := func(list []userrules.AddrRange) int { return min(len(list), 1) } // not for all
	all = joined(all, func(d userrules.Diversion) [3]int { return [3]int{lists.of(d.Hosts), lists.of(d.Peers)} }, joinPorts)
	all = joined(all, func(d userrules.Diversion) [3]int {
		return [3]int{lists.of(d.Hosts), sided(d.Peers), lists.ofPorts(d.Ports)}
	}, func(to *userrules.Diversion, group []userrules.Diversion) {
		to.Peers = union(group, func(d userrules.Diversion) []userrules.AddrRange { return d.Peers })
	})
	all = joined(all, func(d userrules.Diversion) [3]int {
		return [3]int{sided(d.Hosts), lists.of(d.Peers), lists.ofPorts(d.Ports)}
	}, func(to *userrules.Diversion, group []userrules.Diversion) {
		to.Hosts = union(group, func(d userrules.Diversion) []userrules.AddrRange { return d.Hosts })
	})
	if len(all) > mostDiversions {
		slices.SortStableFunc(all, func(a, b userrules.Diversion) int { return cmp.Compare(numberOf(b.Ports), numberOf(a.Ports)) })
		var rest userrules.Diversion
		joinPorts(&rest, all[mostDiversions-1:])
		all = append(all[:mostDiversions-1], rest)
	}
	shorten(all, &lists)
	return all
}

// joined joins the diversions that have a key in common.
func joined(all []userrules.Diversion, key func(userrules.Diversion) [3]int, join func(to *userrules.Diversion, group []userrules.Diversion)) (kinds []userrules.Diversion) {
	groups, order := make(map[[3]int][]userrules.Diversion), [][3]int(nil)
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

func joinPorts(to *userrules.Diversion, group []userrules.Diversion) {
	to.Ports = nil
	for _, d := range group {
		to.Ports = append(to.Ports, d.Ports...)
	}
	slices.SortFunc(to.Ports, func(a, b userrules.PortRange) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
	})
	to.Ports = slices.Compact(to.Ports)
}

// union returns the addresses of lists. One that is alone stays the same list.
func union(group []userrules.Diversion, of func(userrules.Diversion) []userrules.AddrRange) []userrules.AddrRange {
	if len(group) == 1 {
		return of(group[0])
	}
	var all []userrules.AddrRange
	for _, d := range group {
		all = append(all, of(d)...)
	}
	return userrules.Union(all)
}

// shorten replaces the longest lists of hosts and peers by all addresses until the different lists
// have at most mostDiverted ranges.
func shorten(all []userrules.Diversion, lists *listNumbers) {
	length, total := make(map[int]int), 0
	each := func(f func(list *[]userrules.AddrRange, number int)) {
		for i := range all {
			for _, list := range []*[]userrules.AddrRange{&all[i].Hosts, &all[i].Peers} {
				f(list, lists.of(*list))
			}
		}
	}
	each(func(list *[]userrules.AddrRange, n int) { length[n] = len(*list) })
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
	each(func(list *[]userrules.AddrRange, n int) {
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

func (l *listNumbers) of(list []userrules.AddrRange) int {
	if len(list) == 0 {
		return 0
	}
	return l.number(struct {
		*userrules.AddrRange
		int
	}{&list[0], len(list)}, list)
}

func (l *listNumbers) ofPorts(list []userrules.PortRange) int {
	if len(list) == 0 {
		return 0
	}
	return l.number(struct {
		*userrules.PortRange
		int
	}{&list[0], len(list)}, list)
}

func (l *listNumbers) number(place, list any) int {
	if l.places == nil {
		l.places, l.contents = make(map[any]int), make(map[string]int)
	}
	n, known := l.places[place]
	if known {
		return n
	}
	content := fmt.Sprint(list)
	if n, known = l.contents[content]; !known {
		n = len(l.contents) + 1
		l.contents[content] = n
	}
	l.places[place] = n
	return n
}

func numberOf(ports []userrules.PortRange) (n int) {
	for _, r := range ports {
		n += int(r.Last) - int(r.First) + 1
	}
	return n
}

// sidesOf returns where packets of inside hosts come from. Without a link that leads inside, no
// rule is for one by its name.
func sidesOf(cfg config.Config, network gateway.Network) userrules.Sides {
	s := userrules.Sides{Inside: insideLinks(network), Outside: outsideLinks(network), Subnets: prefixes(cfg.Subnets)}
	if len(s.Inside) == 0 {
		s.Inside = []userrules.Link{{}}
	}
	return s
}

// endDiverted ends the children that would keep packets from the user's rules.
func (f *firewall) endDiverted(cfg config.Config) error {
	_, err := f.fixedFlows(cfg).end(func(sent *cone.Flow) bool {
		return sent.IsChild() && slices.ContainsFunc(f.diverted, func(d userrules.Diversion) bool {
			return d.Takes(sent.Src.Addr.Netip(), sent.ReplySrc.Netip())
		})
	})
	return err
}

// diversions are what the tables do about them.
func (f *firewall) diversions() (all []rules.Diversion) {
	for _, d := range f.diverted {
		x := rules.Diversion{Hosts: ranges(d.Hosts), Peers: ranges(d.Peers)}
		for _, r := range d.Ports {
			x.Ports = append(x.Ports, rules.PortRange(r))
		}
		all = append(all, x)
	}
	return all
}

func ranges(list []userrules.AddrRange) (all []rules.AddrRange) {
	for _, r := range list {
		all = append(all, rules.AddrRange(r))
	}
	return all
}
