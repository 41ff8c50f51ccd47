package daemon

import (
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
)

// surroundings are what the state of the tables depends on beside the configuration, the links
// and the user's rules, as observe read it.
type surroundings struct {
	ways        gateway.WaysBack
	waysRead    bool // ways could be read
	autoHelpers bool // see autoHelpers
}

// observe reads what desired depends on, and notes what must outlive a change of it: the links
// that had mappings, and since when flows may be unsure.
func (f *firewall) observe(cfg config.Config, outside []string) {
	ways, err := gateway.ReadWaysBack(0, f.ourMarks(cfg))
	f.around = surroundings{ways, err == nil, readAutoHelpers()}
	f.unsure.observe(ways.Hidden && err == nil, cfg.Inside)
	if f.mappingConfig(cfg) != nil {
		f.mappedLinks = slices.Compact(slices.Sorted(slices.Values(slices.Concat(f.mappedLinks, f.only4(outside)))))
	}
}

// ourMarks are the mark bits that are never set when the way back is looked up.
func (f *firewall) ourMarks(cfg config.Config) uint32 {
	if cfg.UplinkMarks && f.lacks[rules.FeatureUplinkMarks] == nil {
		return cfg.UplinkMask
	}
	return 0
}

// only4 returns the outside links that are so for IPv4.
func (f *firewall) only4(outside []string) []string {
	return slices.DeleteFunc(slices.Clone(outside), func(name string) bool { return slices.Contains(f.sides.Not4, name) })
}

// desired returns the state of the tables that the configuration wants. It reads and changes
// nothing: call observe before it.
func (f *firewall) desired(cfg config.Config, outside []string) rules.Desired {
	d := f.sides
	d.OutsideLinks, d.InsideLinks = outside, cfg.Inside
	d.Diverted = f.diversions()
	d.Subnets, d.ZonedAddrs, d.InZone = prefixes(cfg.Subnets), f.zonedAddrs(), f.withoutMap(cfg)
	d.Helpers, d.MaxChildren, d.Guard, d.Self = f.helpers, cfg.MaxChildren, cfg.Guard, cfg.Self
	d.Helped, d.AutoHelpers = f.mayHelp(cfg, f.around.autoHelpers), f.withExpectations() && f.around.autoHelpers
	if d.Quiet = cfg.Quiet; d.Quiet {
		d.ExcludePeerPorts = cfg.ExcludePeerPorts
	}
	// If routing rules hide the way back, spoofed packets cannot be told from others: they are
	// not dropped, but the kernel does not learn from doubtful ones.
	d.Spoofed = cfg.Guard && f.around.waysRead && !f.around.ways.Hidden
	if f.around.ways.BySource {
		d.Published = f.published
	}
	if f.withMap {
		d.Map = f.mapConfig(cfg)
	}
	if cfg.UplinkMarks {
		d.UplinkMarks = &rules.UplinkMarks{Mask: cfg.UplinkMask, Links: cfg.Outside}
	}
	if d.Mapping = f.mappingConfig(cfg); d.Mapping != nil {
		outside := f.only4(outside)
		d.Mapping.Links = f.mappedLinks
		d.Mapping.Choosers = chosenPorts(f.choosers, d.Mapping.Subnets, outside)
		d.Mapping.Differ, _, _ = f.outsideAddrs(d.Mapping.Subnets, outside)
	}
	return d
}

// leastMapSize is the least size of the map, in permissions; an element takes about 100
// bytes. A set's size is fixed when it is created: a map of another size begins empty. So
// the map is at least this large, and the model enforces a smaller max_permissions. A change
// beyond this size needs a restart (unchangeable).
const leastMapSize = 1 << 20

func mapConfig(cfg config.Config) *rules.MapConfig {
	c := &rules.MapConfig{
		Size: max(cfg.MaxPermissions, leastMapSize), Lifetime: cfg.Lifetime, MaxChildren: cfg.MaxChildren,
		Learn: cfg.Learn, LearnRate: cfg.LearnRate, Lean: cfg.Events != config.AllEvents,
		PeerGroups: cfg.PeerGroups, ExcludePeers: cfg.ExcludePeers, ExcludePeerPorts: cfg.ExcludePeerPorts, ExcludePorts: cfg.ExcludePorts,
	}
	for _, s := range cfg.Subnets {
		if s.Filtering == config.AddressAndPortDependent {
			c.ExcludePeers = append(slices.Clip(c.ExcludePeers), s.Prefix) // its hosts are inside: no peers
			continue
		}
		c.Subnets = append(c.Subnets, s.Prefix)
		if s.Filtering == config.EndpointIndependent {
			c.OpenSubnets = append(c.OpenSubnets, s.Prefix)
		}
	}
	return c
}

// mapConfig applies the decisions, too: the kernel learns nothing for subnets that
// expectations alone serve.
func (f *firewall) mapConfig(cfg config.Config) *rules.MapConfig {
	c := mapConfig(cfg)
	for _, s := range cfg.Subnets {
		if f.withExpectations() && f.decisions[s.Prefix].Choice == cone.ChooseExpectation {
			c.Subnets = slices.DeleteFunc(c.Subnets, func(p netip.Prefix) bool { return p == s.Prefix })
			c.ExcludePeers = append(slices.Clip(c.ExcludePeers), s.Prefix) // its hosts are inside: no peers
		}
	}
	return c
}
