package daemon

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/mapping"
	"github.com/conenatd/conenatd/internal/rules/elements"
	"github.com/conenatd/conenatd/internal/userrules"
)

// oldPortLooks is how many looks follow a change of ports: a packet that found its mapping
// before may make a flow a moment later.
const oldPortLooks = 3

// oldPorts are outside ports that hosts may no longer have, since the user's rules or the
// pools changed.
type oldPorts struct {
	chosen map[string][]netip.Prefix // hosts whose ports rules choose since then, by link
	pools  []hostPool
	looks  int // still to come at most
}

// A hostPool has the ports of a pool for some hosts.
type hostPool struct {
	hosts netip.Prefix
	ports cone.PortRanges
}

// chosenSince notes the hosts for which rules choose ports now and did not before.
func (o *oldPorts) chosenSince(before, now map[string][]netip.Prefix) {
	o.looks = oldPortLooks
	for link, hosts := range now {
		for _, p := range hosts {
			if !gateway.Covered(p, before[link]) {
				if o.chosen == nil {
					o.chosen = make(map[string][]netip.Prefix)
				}
				o.chosen[link] = append(o.chosen[link], p)
			}
		}
	}
}

// leavePools notes which hosts have another port_pool than before.
func (o *oldPorts) leavePools(before config.Config, pools map[config.PortPool]cone.PortRanges, now config.Config) {
	for _, s := range before.Subnets {
		same := slices.ContainsFunc(now.Subnets, func(n config.Subnet) bool {
			return n.Prefix == s.Prefix && now.Pool(n) == before.Pool(s)
		})
		if s.Mapping == config.EndpointIndependentMapping && !same {
			o.pools = append(o.pools, hostPool{s.Prefix, pools[before.Pool(s)]})
			o.looks = oldPortLooks
		}
	}
}

// looked ends a successful look that found so many flows on old ports. It reports whether
// another look should follow soon.
func (o *oldPorts) looked(found int) (again bool) {
	if o.looks--; found > 0 && o.looks > 0 {
		return true
	}
	*o = oldPorts{}
	return false
}

// outdated returns the test for mappings on ports that the host may no longer have: no rule
// of the user's gives the port, or it is from the host's former pool.
func (f *firewall) outdated(cfg config.Config) func(elements.Mapping) bool {
	pools := hostPools(cfg, f.ports.pools)
	// If the ports of the rules are unknown: a port that the host has only without the rules.
	since := func(x elements.Mapping) bool {
		return within(f.old.chosen[x.Link], x.Int.Addr) && (x.Int.Port == x.Ext.Port || inPools(pools, x))
	}
	sources := f.sources
	if f.user != nil && f.user.SourcesMayBeHidden() { // hidden rules may give any port
		sources = append(slices.Clip(sources), userrules.SourceNAT{ChoosesPort: true, Unknown: true})
	}
	return func(x elements.Mapping) bool {
		if len(f.choosers) > 0 && f.sources != nil {
			may, sure := userrules.MayGive(sources, x.Link, x.Int.Addr.Netip(), x.Ext.Port)
			if !may || !sure && since(x) {
				return true
			}
		}
		return x.Int.Port != x.Ext.Port && inPools(f.old.pools, x) && !inPools(pools, x)
	}
}

// hostPools returns the pool ports that hosts may have. These include all ports that the user
// names, even if pools leaves some out at present.
func hostPools(cfg config.Config, pools map[config.PortPool]cone.PortRanges) (all []hostPool) {
	for _, s := range cfg.Subnets {
		if s.Mapping == config.EndpointIndependentMapping {
			wanted := cfg.Pool(s)
			all = append(all, hostPool{s.Prefix, slices.Concat(pools[wanted], wanted.Ranges())})
		}
	}
	return all
}

// inPools reports whether the outside port of a mapping is in a pool of its host.
func inPools(pools []hostPool, x elements.Mapping) bool {
	host := x.Int.Addr.Netip()
	return slices.ContainsFunc(pools, func(p hostPool) bool { return p.hosts.Contains(host) && p.ports.Has(x.Ext.Port) })
}

// keep renews the mappings of living flows, and ends flows on ports that their host may no
// longer have.
func (r *reconciler) keep(m *mapping.Mapper, q *ctwatch.Queries) error {
	ended, strays, err := m.Keep()
	_, failed := flows.Delete(q, ended)
	err = errors.Join(err, failed)
	r.noted.Note(slog.LevelInfo, "other_address", "mappings had an outside address that your rules no longer give their hosts; new flows leave by the new one", uint64(strays))
	r.noted.Note(slog.LevelInfo, "outdated", "flows with mappings had an outside port that a rule or port_pool allows no more; they ended", uint64(len(ended)))
	if err == nil && r.firewall.old.looked(len(ended)) {
		r.wantReconcile()
	}
	return err
}

// sameGiven reports whether rules of the user's choose the same ports for the same hosts.
func sameGiven(a, b []userrules.SourceNAT) bool {
	return slices.EqualFunc(a, b, func(x, y userrules.SourceNAT) bool {
		return slices.Equal(x.Ports, y.Ports) && slices.Equal(x.Links, y.Links) && slices.Equal(x.Sources, y.Sources)
	})
}
