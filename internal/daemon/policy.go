package daemon

import (
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/rules"
)

// anyIPv6 reports whether a subnet is IPv6, or a named link may get an IPv6 subnet.
func anyIPv6(cfg config.Config) bool {
	return slices.ContainsFunc(cfg.Subnets, func(s config.Subnet) bool { return s.Prefix.Addr().Is6() }) ||
		slices.ContainsFunc(cfg.LinkSubnets, func(l config.LinkSubnet) bool { return l.Like.Routed })
}

// policy returns the policy of a configuration, with the backends in use.
func (l *loop) policy(cfg config.Config) cone.Policy {
	p := cone.Policy{
		Expected: l.backends.expect != nil && wantsExpect(cfg),
		Mapped:   l.backends.nft != nil && wantsMap(cfg),
		Labels:   l.features.labels(),
		Learned:  l.backends.nft != nil && wantsMap(cfg) && cfg.Learn && l.features.has(rules.FeatureLearn),
		Limits: cone.Limits{
			Total: cfg.MaxPermissions, PerSubnet: cfg.MaxPermissionsPerSubnet,
			PerHost: cfg.MaxPermissionsPerHost, Children: cfg.MaxChildren,
		},
		Lifetime:         cfg.Lifetime,
		Retry:            cfg.Reconcile,
		PeerGroups:       cfg.PeerGroups,
		ExcludePeers:     cfg.ExcludePeers,
		ExcludePeerPorts: cfg.ExcludePeerPorts,
		ExcludePorts:     cfg.ExcludePorts,
	}
	p.Self4, p.Self6 = l.self(cfg)
	for _, s := range cfg.Subnets {
		p.Shut = append(p.Shut, l.decisions[s.Prefix].shut...)
		p.Subnets = append(p.Subnets, cone.Subnet{
			Prefix: s.Prefix, Routed: s.Routed, Filtering: filterings[s.Filtering], Choice: l.decisions[s.Prefix].Choice,
			Mapping: s.Mapping == config.EndpointIndependentMapping && l.features.maps(),
		})
	}
	return p
}
