package daemon

import (
	"net/netip"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
)

// Fails when one fast second is not enough, when one slow second is, and when counters that
// begin anew look like many permissions.
func TestPaceOfLearning(t *testing.T) {
	var p pace
	now, count := time.Duration(0), uint64(1_000_000)
	look := func(more int, want bool) {
		t.Helper()
		now += time.Second
		count += uint64(more)
		if p.look(now, count); p.many != want {
			t.Errorf("at %v, after %d in a second: many is %v", now, more, p.many)
		}
	}
	look(0, false) // a million before that do not count
	look(leanAbove-1, false)
	look(leanAbove, true)
	for range 20 {
		look(leanBelow, true)
	}
	for range leanFor/time.Second - 1 {
		look(leanBelow-1, true)
	}
	look(leanBelow-1, false)
	look(leanBelow, false)
	count = 0 // a new table
	look(leanBelow, false)
	look(leanAbove, true)
}

// A flow is hidden only where nothing needs a report of it.
//
// Fails without one of the conditions of mayHide.
func TestFlowsThatMustBeReported(t *testing.T) {
	subnet := config.Subnet{Prefix: netip.MustParsePrefix("10.47.11.0/24")}
	type change func(r *reconciler, cfg *config.Config)
	hidden := map[string]change{
		"the default": func(*reconciler, *config.Config) {},
		"only routed subnets have expectations": func(_ *reconciler, cfg *config.Config) {
			cfg.Subnets = append(cfg.Subnets, config.Subnet{Prefix: netip.MustParsePrefix("10.9.0.0/16"), Routed: true})
		},
		"there are no expectations": func(r *reconciler, _ *config.Config) { r.firewall.helpers, r.firewall.decisions = nil, nil },
	}
	reported := map[string]change{
		"the user wants all": func(_ *reconciler, cfg *config.Config) { cfg.Events = config.AllEvents },
		"the kernel does not learn": func(_ *reconciler, cfg *config.Config) {
			cfg.Learn = false
		},
		"there is no map":               func(r *reconciler, _ *config.Config) { r.firewall.withMap = false },
		"early packets make flows":      func(_ *reconciler, cfg *config.Config) { cfg.Guard = false },
		"the guard does not know links": func(r *reconciler, _ *config.Config) { r.network.Links = []gateway.Link{{Kind: "vrf"}} },
		"permissions end too soon":      func(_ *reconciler, cfg *config.Config) { cfg.Lifetime = leanLifetime - 1 },
		"a forward waits for answers":   func(r *reconciler, _ *config.Config) { r.lean.answers = true },
		"somebody watches":              func(r *reconciler, _ *config.Config) { _, _ = r.watchers.Add() },
		"flows have zones": func(r *reconciler, _ *config.Config) {
			r.firewall.zones = cone.Zones{Original: true, Outside: []netip.Addr{netip.MustParseAddr("198.51.100.1")}}
		},
		"nobody knows what gets through": func(r *reconciler, _ *config.Config) {
			r.firewall.decisions = map[netip.Prefix]decision{subnet.Prefix: {Choice: cone.ChooseBoth}}
		},
		"expectations alone get through": func(r *reconciler, _ *config.Config) {
			r.firewall.decisions = map[netip.Prefix]decision{subnet.Prefix: {Choice: cone.ChooseExpectation}}
		},
	}
	check := func(name string, change change, want bool) {
		r := &reconciler{shared: &shared{}, firewall: &firewall{
			features: features{nftables: true}, withMap: true, helpers: []string{"RAS"},
			decisions: map[netip.Prefix]decision{subnet.Prefix: {Choice: cone.ChooseMap}},
		}}
		cfg := config.Default()
		cfg.Subnets = []config.Subnet{subnet}
		change(r, &cfg)
		if got := r.mayHide(cfg); got != want {
			t.Errorf("%s: flows may be hidden: %v", name, got)
		}
	}
	for name, change := range reported {
		check(name, change, false)
	}
	for name, change := range hidden {
		check(name, change, true)
	}
}
