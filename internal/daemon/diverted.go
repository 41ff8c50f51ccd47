package daemon

import (
	"cmp"
	"errors"
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
const mostDiversions = 256

// divert reads which ports of peers rules of the user's take from inside hosts, and reports
// whether the tables must change for it. What was read before holds if rules cannot be read.
func (f *firewall) divert(cfg config.Config, network gateway.Network) (changed bool) {
	if f.unread != nil || f.user == nil {
		return false
	}
	var next []rules.Diversion
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
		x := rules.Diversion{Hosts: d.Hosts, Peers: peers}
		for _, r := range d.Ports {
			x.Ports = append(x.Ports, rules.PortRange{First: r.First, Last: r.Last})
		}
		next = append(next, x)
	}
	next = merged(next)
	changed = !reflect.DeepEqual(next, f.diverted)
	f.diverted = next
	return changed
}

// merged returns at most mostDiversions diversions: those of the same hosts and peers with all
// their ports, then those of the same hosts and ports with all their peers.
func merged(all []rules.Diversion) []rules.Diversion {
	by := func(key func(rules.Diversion) string, add func(to *rules.Diversion, d rules.Diversion)) {
		at, kinds := make(map[string]int), []rules.Diversion(nil)
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
	by(func(d rules.Diversion) string { return fmt.Sprint(d.Hosts, d.Peers) }, func(to *rules.Diversion, d rules.Diversion) {
		to.Ports = append(to.Ports, d.Ports...)
	})
	for i := range all {
		slices.SortFunc(all[i].Ports, func(a, b rules.PortRange) int {
			return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
		})
		all[i].Ports = slices.Compact(all[i].Ports)
	}
	by(func(d rules.Diversion) string { return fmt.Sprint(d.Hosts, len(d.Peers) > 0, d.Ports) }, func(to *rules.Diversion, d rules.Diversion) {
		to.Peers = append(to.Peers, d.Peers...)
	})
	return all[:min(len(all), mostDiversions)]
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

// insideLinks returns the links that lead to enabled subnets.
func insideLinks(network gateway.Network) (links []userrules.Link) {
	for _, l := range network.Links {
		if l.Inside {
			links = append(links, userrules.Link{Index: l.Index, Name: l.Name})
		}
	}
	return links
}

// readDiversions brings the tables up to date about what rules of the user's take from inside
// hosts, and ends the children that would keep packets from these rules.
func (r *reconciler) readDiversions(cfg config.Config, network gateway.Network) error {
	if !r.firewall.divert(cfg, network) {
		return nil
	}
	_, err := r.firewall.set(cfg, network.OutsideLinks())
	_, failed := r.firewall.fixedFlows(cfg).end(func(sent *cone.Flow) bool {
		return sent.IsChild() && takes(r.firewall.diverted, sent.Src.Addr.Netip(), sent.ReplySrc.Netip())
	})
	return errors.Join(err, failed)
}

// takes reports whether no child of a host gets in from a peer's port.
func takes(all []rules.Diversion, host netip.Addr, peer netip.AddrPort) bool {
	has := func(ps []netip.Prefix, a netip.Addr) bool {
		return len(ps) == 0 || slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	return slices.ContainsFunc(all, func(d rules.Diversion) bool {
		return has(d.Hosts, host) && has(d.Peers, peer.Addr()) &&
			slices.ContainsFunc(d.Ports, func(r rules.PortRange) bool { return r.First <= peer.Port() && peer.Port() <= r.Last })
	})
}
