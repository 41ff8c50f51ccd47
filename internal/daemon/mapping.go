package daemon

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/mapping"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// mappingsSize is how many mappings there can be: all ports of some addresses.
const mappingsSize = 1 << 18

// mappingConfig returns what the tables do for subnets with endpoint-independent
// mapping, nil without any. If inside hosts are behind an outside link, flows to them get no
// mapping.
func (f *firewall) mappingConfig(cfg config.Config) *rules.MappingConfig {
	ports := f.ports
	c := &rules.MappingConfig{
		Exempt: slices.Concat(cfg.MappingExempt, f.elsewhere), Served: ports.served,
		// A mapping is refreshed at each reconcile while a flow of it lives.
		Lifetime: max(cfg.Lifetime, 3*cfg.Reconcile), Size: mappingsSize,
		// Long enough for the next reconcile to see that the flow lives and, without a
		// daemon, for as long as conntrack keeps the flow.
		TakenFor: max(ports.udpTimeout, 2*cfg.Reconcile), KeptFor: max(ports.udpTimeout, 3*cfg.Reconcile),
	}
	pools := make(map[config.PortPool][]netip.Prefix)
	for _, s := range cfg.Subnets {
		if s.Mapping == config.EndpointIndependentMapping {
			c.Subnets = append(c.Subnets, s.Prefix)
			pools[cfg.Pool(s)] = append(pools[cfg.Pool(s)], s.Prefix)
		}
		if cfg.Hairpin && s.Prefix.Addr().Is4() {
			c.Hairpin = append(c.Hairpin, s.Prefix)
		}
		if len(f.sides.OneArmed) > 0 && s.Prefix.Addr().Is4() {
			c.Exempt = append(c.Exempt, s.Prefix)
		}
	}
	if len(c.Subnets) == 0 {
		return nil
	}
	for _, wanted := range poolsOf(cfg) {
		c.Pools = append(c.Pools, rules.Pool{Subnets: pools[wanted], Ports: ports.pools[wanted]})
	}
	return c
}

// wantsMapping reports whether a subnet has endpoint-independent mapping.
func wantsMapping(cfg config.Config) bool {
	return slices.ContainsFunc(cfg.Subnets, func(s config.Subnet) bool { return s.Mapping == config.EndpointIndependentMapping })
}

// newMapper lists the mappings that stand; before is the result of the last look. It returns nil if
// no subnet has mappings.
func (f *firewall) newMapper(cfg config.Config, network gateway.Network, served *gateway.PortSet, before mapping.Applied) (*mapping.Mapper, error) {
	c := f.mappingConfig(cfg)
	if c == nil || !f.maps() {
		return nil, nil
	}
	if f.mappedAddrs == nil {
		f.mappedAddrs = make(map[cone.Addr]struct{})
	}
	return mapping.New(mapping.View{
		Kernel: f.tables.NewMappings(c),
		Links:  outsideAddrs(network),
		Owned:  network.Owned(),
		Routes: f.router(cfg, network),
		Inside: cone.NewPrefixTable(c.Subnets).Holds,
		Served: served.Serves, Barred: f.ports.barred, Exempt: c.Exempt, Outdated: f.outdated(cfg), Zoned: len(f.zonedAddrs()) > 0,
		Given: f.given(c, network),
	}, before, func(a cone.Addr) { f.mappedAddrs[a] = struct{}{} })
}

// given tells which outside addresses rules may give hosts with mappings. It is nil if there are no such
// hosts or the rules are not known, and while there is no outside link.
func (f *firewall) given(c *rules.MappingConfig, network gateway.Network) *mapping.Given {
	links := network.OutsideLinks4()
	if c == nil || len(links) == 0 || f.sources == nil || f.user == nil || f.user.SourcesMayBeHidden() {
		return nil
	}
	return mapping.NewGiven(f.sources, f.ownAddrs, links, c.Subnets, flows.NewSources(network, f.known).Lost)
}

// moveMappings moves mappings from links by which packets no longer leave: to the link that has their
// outside address now or, for an address of no link, to the bridge of which their link has become a port.
// So a host keeps its outside endpoint when another link becomes the uplink. Mappings stay on a link
// that still has the address, but is down: it may come back.
func (f *firewall) moveMappings(cfg config.Config, network gateway.Network) error {
	leaves := func(link string) bool { return slices.Contains(f.leaving4, link) }
	if !f.maps() || !slices.ContainsFunc(f.mappedLinks, func(link string) bool { return !leaves(link) }) {
		f.movedBy = nil // the next time is new
		return nil
	}
	c, holders := f.mappingConfig(cfg), outsideAddrs(network)
	if c == nil || maps.Equal(holders, f.holders) && slices.Equal(f.leaving4, f.leftBy) && f.user == f.movedBy {
		return nil
	}
	g := f.given(c, network)
	if g == nil {
		return nil
	}
	err := g.Move(f.tables.NewMappings(c), func(x elements.Mapping) string {
		if leaves(x.Link) {
			return x.Link
		}
		to := holders[x.Ext.Addr]
		if i := slices.IndexFunc(network.Links, func(l gateway.Link) bool { return l.Name == x.Link }); i >= 0 {
			l := network.Links[i]
			if slices.ContainsFunc(network.Addrs, func(a gateway.Addr) bool { return a.Link == l.Index && a.Prefix.Addr() == x.Ext.Addr.Netip() }) {
				return x.Link
			}
			if m := slices.IndexFunc(network.Links, func(m gateway.Link) bool { return m.Index == l.Master }); to == "" && m >= 0 {
				to = network.Links[m].Name
			}
		}
		if !leaves(to) {
			return x.Link
		}
		return to
	})
	if err == nil {
		f.holders, f.leftBy, f.movedBy = holders, f.leaving4, f.user
	}
	return err
}

// outsideAddrs returns the names of outside links, by their addresses. A link that only
// shares the network of another one is left out: flows with its address leave by that other
// link.
func outsideAddrs(n gateway.Network) map[cone.Addr]string {
	names := make(map[int]string)
	for _, l := range n.Links {
		if l.Outside&gateway.IPv4 != 0 && l.Cause != gateway.SharedLink {
			names[l.Index] = l.Name
		}
	}
	all := make(map[cone.Addr]string)
	for _, a := range n.Addrs {
		if name, ok := names[a.Link]; ok {
			all[cone.AddrFrom(a.Prefix.Addr())] = name
		}
	}
	return all
}
