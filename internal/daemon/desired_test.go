package daemon

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// What the tables should be depends on what observe read, and on nothing that desired notes.
//
// Fails when desired writes to the firewall, when spoofed packets are dropped although routing
// rules hide the way back or cannot be read, or when published destinations are named without a
// rule that selects by source.
func TestDesiredFollowsWhatWasObserved(t *testing.T) {
	cfg := config.Default()
	cfg.Subnets = []config.Subnet{{Prefix: netip.MustParsePrefix("10.47.0.0/16"), Mapping: config.EndpointIndependentMapping}}
	published := cone.AddrRange{First: netip.MustParseAddr("198.51.100.9"), Last: netip.MustParseAddr("198.51.100.9")}
	for name, tc := range map[string]struct {
		around             surroundings
		helpers            []string
		spoofed, published bool
		helped, auto       bool
	}{
		"routes alone":           {around: surroundings{waysRead: true}, spoofed: true},
		"a hidden way back":      {around: surroundings{waysRead: true, ways: gateway.WaysBack{Hidden: true}}},
		"unread rules":           {around: surroundings{}},
		"a rule by source":       {around: surroundings{waysRead: true, ways: gateway.WaysBack{BySource: true}}, spoofed: true, published: true},
		"helpers, no anchors":    {around: surroundings{waysRead: true, autoHelpers: true}, spoofed: true},
		"helpers by the kernel":  {around: surroundings{waysRead: true, autoHelpers: true}, helpers: []string{"conenatd"}, spoofed: true, helped: true, auto: true},
		"helpers by known rules": {around: surroundings{waysRead: true}, helpers: []string{"conenatd"}, spoofed: true},
	} {
		t.Run(name, func(t *testing.T) {
			f := &firewall{
				around: tc.around, helpers: tc.helpers, published: cone.AddrRanges{published},
				user: &userrules.Ruleset{}, mappedLinks: []string{"wan0", "wan1"}, withMap: true,
			}
			before := *f
			d := f.desired(cfg, []string{"wan2"})
			if !reflect.DeepEqual(*f, before) {
				t.Errorf("the firewall is %+v, was %+v", *f, before)
			}
			if d.Spoofed != tc.spoofed || (len(d.Published) > 0) != tc.published || d.Helped != tc.helped || d.AutoHelpers != tc.auto {
				t.Errorf("spoofed %v, published %v, helped %v, auto %v", d.Spoofed, d.Published, d.Helped, d.AutoHelpers)
			}
			if d.Map == nil || d.Mapping == nil || !reflect.DeepEqual(d.Mapping.Links, before.mappedLinks) {
				t.Errorf("map %v, mapping %+v", d.Map, d.Mapping)
			}
		})
	}
}
