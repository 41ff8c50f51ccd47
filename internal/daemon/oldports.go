package daemon

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/rules/elements"
	"github.com/conenatd/conenatd/internal/userrules"
)

// oldPortLooks is how often a change of ports is looked at: a packet that found its mapping
// may make a flow a moment later.
const oldPortLooks = 3

// oldPorts are outside ports that hosts may have no more, since the rules of the user's or
// the pools changed.
type oldPorts struct {
	chosen map[string][]netip.Prefix // hosts that are left to rules since then, by link
	pools  []oldPool
	looks  int // that there are still at most
}

// An oldPool is what hosts got before.
type oldPool struct {
	hosts netip.Prefix
	ports portRanges
}

// chosenSince notes for which hosts rules choose ports that did not before.
func (o *oldPorts) chosenSince(before, now map[string][]netip.Prefix) {
	o.looks = oldPortLooks
	for link, hosts := range now {
		for _, p := range hosts {
			if !slices.ContainsFunc(before[link], func(b netip.Prefix) bool { return b.Bits() <= p.Bits() && b.Contains(p.Addr()) }) {
				if o.chosen == nil {
					o.chosen = make(map[string][]netip.Prefix)
				}
				o.chosen[link] = append(o.chosen[link], p)
			}
		}
	}
}

// leavePools notes which hosts have another port_pool than before.
func (o *oldPorts) leavePools(before config.Config, pools map[config.PortPool]portRanges, now config.Config) {
	for _, s := range before.Subnets {
		same := slices.ContainsFunc(now.Subnets, func(n config.Subnet) bool {
			return n.Prefix == s.Prefix && now.Pool(n) == before.Pool(s)
		})
		if s.Mapping == config.EndpointIndependentMapping && !same {
			o.pools = append(o.pools, oldPool{s.Prefix, pools[before.Pool(s)]})
			o.looks = oldPortLooks
		}
	}
}

// looked ends a look that was good and found so many flows and mappings. It reports whether
// there should be another one soon.
func (o *oldPorts) looked(found int) (again bool) {
	if o.looks--; found > 0 && o.looks > 0 {
		return true
	}
	*o = oldPorts{}
	return false
}

// outdated returns the test for mappings on ports that the host may have no more: no rule of
// the user's gives them, or they are of a pool that it had before.
func (f *firewall) outdated(cfg config.Config) func(elements.Mapping) bool {
	pools := hostPools(cfg, f.ports.pools)
	// Where ports are not known: what it has without the rules.
	since := func(x elements.Mapping, host netip.Addr) bool {
		return slices.ContainsFunc(f.old.chosen[x.Link], func(p netip.Prefix) bool { return p.Contains(host) }) &&
			(x.Int.Port == x.Ext.Port || pools(host).Has(x.Ext.Port))
	}
	return func(x elements.Mapping) bool {
		host := x.Int.Addr.Netip()
		if len(f.choosers) > 0 {
			may, sure := userrules.MayGive(f.sources, x.Link, host, x.Ext.Port)
			if !may || !sure && since(x, host) {
				return true
			}
		}
		return x.Int.Port != x.Ext.Port && !pools(host).Has(x.Ext.Port) &&
			slices.ContainsFunc(f.old.pools, func(o oldPool) bool { return o.hosts.Contains(host) && o.ports.Has(x.Ext.Port) })
	}
}

// hostPools returns the ports of the pool that a host has: those that the user names, too,
// of which some may be left out for now.
func hostPools(cfg config.Config, pools map[config.PortPool]portRanges) func(netip.Addr) portRanges {
	return func(host netip.Addr) (all portRanges) {
		for _, s := range cfg.Subnets {
			if s.Mapping == config.EndpointIndependentMapping && s.Prefix.Contains(host) {
				wanted := cfg.Pool(s)
				all = append(append(all, pools[wanted]...), wanted.Ranges()...)
			}
		}
		return all
	}
}

// keep renews what flows hold, and ends what is on ports that its host may have no more.
func (d *Daemon) keep(m *mapper, q *ctwatch.Queries) error {
	errs := []error{m.keep()}
	for _, f := range m.ended {
		_, err := q.Delete(f.Src, f.Dst, f.OrigZone, f.ID)
		errs = append(errs, err)
	}
	d.noted.note(slog.LevelInfo, "outdated", "flows with mappings had an outside port that a rule or port_pool allows no more; they ended", uint64(len(m.ended)))
	err := errors.Join(errs...)
	if err == nil && d.firewall.old.looked(len(m.ended)) {
		d.wantReconcile()
	}
	return err
}

// leavesBy reports whether f surely leaves by the link that has its outside address: the
// rules for another one may give that, too.
func (m *mapper) leavesBy(f *cone.Flow, link string) bool {
	ways, all := m.routes.links(f)
	return all && len(ways) == 1 && ways[0].Name == link
}

// sameGiven reports whether rules of the user's choose the same ports for the same hosts.
func sameGiven(a, b []userrules.SourceNAT) bool {
	return slices.EqualFunc(a, b, func(x, y userrules.SourceNAT) bool {
		return slices.Equal(x.Ports, y.Ports) && slices.Equal(x.Links, y.Links) && slices.Equal(x.Sources, y.Sources)
	})
}
