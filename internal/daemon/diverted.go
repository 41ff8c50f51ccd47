package daemon

import (
	"cmp"
	"fmt"
	"net/netip"
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
		peers := slices.DeleteFunc(slices.Clone(d.Peers), func(p netip.Prefix) bool { return p.IsSingleIP() && slices.Contains(own, p.Addr()) })
		if d.Peers != nil && len(peers) == 0 {
			continue
		}
		next = append(next, userrules.Diversion{Hosts: slices.Clone(d.Hosts), Peers: peers, Ports: slices.Clone(d.Ports)})
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
	by := func(key func(userrules.Diversion) string, add func(to *userrules.Diversion, d userrules.Diversion)) {
		at, kinds := make(map[string]int), []userrules.Diversion(nil)
		for _, d := range all {
			i, known := at[key(d)]
			if !known {
				at[key(d)], kinds = len(kinds), append(kinds, d)
				continue
			}
			add(&kinds[i], d)
		}
		all = kinds
	}
	addPorts := func(to *userrules.Diversion, d userrules.Diversion) {
		to.Ports = append(to.Ports, d.Ports...)
	}
	sortPorts := func(d *userrules.Diversion) {
		slices.SortFunc(d.Ports, func(a, b userrules.PortRange) int {
			return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
		})
		d.Ports = slices.Compact(d.Ports)
	}
	by(func(d userrules.Diversion) string { return fmt.Sprint(d.Hosts, d.Peers) }, addPorts)
	for i := range all {
		sortPorts(&all[i])
	}
	by(func(d userrules.Diversion) string { return fmt.Sprint(d.Hosts, len(d.Peers) > 0, d.Ports) }, func(to *userrules.Diversion, d userrules.Diversion) {
		to.Peers = append(to.Peers, d.Peers...)
	})
	by(func(d userrules.Diversion) string { return fmt.Sprint(len(d.Hosts) > 0, d.Peers, d.Ports) }, func(to *userrules.Diversion, d userrules.Diversion) {
		to.Hosts = append(to.Hosts, d.Hosts...)
	})
	if len(all) > mostDiversions {
		slices.SortStableFunc(all, func(a, b userrules.Diversion) int { return cmp.Compare(numberOf(b.Ports), numberOf(a.Ports)) })
		var rest userrules.Diversion
		for _, d := range all[mostDiversions-1:] {
			addPorts(&rest, d)
		}
		sortPorts(&rest)
		all = append(all[:mostDiversions-1], rest)
	}
	return all
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
		x := rules.Diversion{Hosts: d.Hosts, Peers: d.Peers}
		for _, r := range d.Ports {
			x.Ports = append(x.Ports, rules.PortRange(r))
		}
		all = append(all, x)
	}
	return all
}
