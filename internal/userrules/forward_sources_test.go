package userrules_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// part writes a Part as "ports from sources".
func part(p userrules.Part) string {
	var from []string
	for _, s := range p.Sources {
		from = append(from, fmt.Sprintf("%v-%v", s.First, s.Last))
	}
	return strings.TrimSuffix(fmt.Sprintf("%d-%d from %s", p.Ports.First, p.Ports.Last, strings.Join(from, ",")), " from ")
}

// Fails when packets count as forwarded that a rule leaves alone, or when the sources of a forward
// are not found.
func TestForwardsForSomeSourcesAreFound(t *testing.T) {
	const chain, to = "@@ ", " udp dport 6000 dnat to 10.47.11.109; "
	const others = "6000-6000 from 0.0.0.0-203.0.113.4,203.0.113.6-255.255.255.255"
	for name, tc := range map[string]struct {
		nft  string
		want []string
	}{
		"all":                       {chain + to + "}", []string{"6000-6000"}},
		"one":                       {chain + "ip saddr 203.0.113.5" + to + "}", []string{"6000-6000 from 203.0.113.5-203.0.113.5"}},
		"a network":                 {chain + "ip saddr 203.0.112.0/20" + to + "}", []string{"6000-6000 from 203.0.112.0-203.0.127.255"}},
		"a set":                     {chain + "ip saddr { 203.0.113.5, 203.0.113.64/26 }" + to + "}", []string{"6000-6000 from 203.0.113.5-203.0.113.5,203.0.113.64-203.0.113.127"}},
		"all but bytes":             {chain + "ip saddr != 45.0.0.0/16" + to + "}", []string{"6000-6000 from 0.0.0.0-44.255.255.255,45.1.0.0-255.255.255.255"}},
		"all but bits":              {chain + "ip saddr != 45.16.0.0/12" + to + "}", []string{"6000-6000 from 0.0.0.0-45.15.255.255,45.32.0.0-255.255.255.255"}},
		"all but a set":             {chain + "ip saddr != { 45.0.0.0-45.0.0.9, 44.0.0.0/8, 255.0.0.0/8 }" + to + "}", []string{"6000-6000 from 0.0.0.0-43.255.255.255,45.0.0.10-254.255.255.255"}},
		"twice":                     {chain + "ip saddr 203.0.113.0/24 ip saddr != 203.0.113.0/25" + to + "}", []string{"6000-6000 from 203.0.113.128-203.0.113.255"}},
		"all but impossible bits":   {chain + "ip saddr & 255.240.0.0 != 45.1.0.0" + to + "}", nil},
		"impossible bits":           {chain + "ip saddr & 255.240.0.0 == 45.1.0.0" + to + "}", nil},
		"bits that are no prefix":   {chain + "ip saddr & 0.0.0.1 != 1" + to + "}", nil},
		"sources and destinations":  {chain + "ip saddr . ip daddr { 203.0.113.5 . 198.51.100.1, 203.0.113.6 . 198.51.100.2 }" + to + "}", nil},
		"a set that packets change": {"set s { type ipv4_addr; flags dynamic,timeout; timeout 1h; }; " + chain + "ip saddr @s" + to + "}", nil},
		"a port of the source":      {chain + "udp sport 7" + to + "}", nil},
		"after others return":       {chain + "ip saddr 203.0.113.5 return;" + to + "}", []string{others}},
		"after others go elsewhere": {"chain none { }; " + chain + "ip saddr 203.0.113.5 goto none;" + to + "}", []string{others}},
		"a link that none has yet":  {chain + `oifname "wan0"` + to + "}", nil},
		"in one of two":             {chain + "ip saddr 203.0.113.5" + to + to + "}", []string{"6000-6000"}},
		"two rules": {
			chain + "ip saddr 203.0.113.5" + to + "ip saddr 203.0.113.6 udp dport 6000-6001 dnat to 10.47.11.110; }",
			[]string{"6000-6000 from 203.0.113.5-203.0.113.5,203.0.113.6-203.0.113.6", "6001-6001 from 203.0.113.6-203.0.113.6"},
		},
		"many rules": {chain + manyRules() + "}", []string{"6000-6000 from 203.0.113.1-203.0.113.100"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: inPrerouting(tc.nft)})
			var certain []userrules.Forward
			for _, f := range ruleset(t, l).Forwards([]userrules.Link{{Index: 2, Name: "wan0"}}) {
				if !f.Partial && !f.Unknown {
					certain = append(certain, f)
				}
			}
			var got []string
			for p := range userrules.Cover(certain).Parts() {
				got = append(got, part(p))
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Fails when the sources of a rule are unknown because they are many, and when a set beyond the limit
// is taken for a short one.
func TestForwardsForVeryManySources(t *testing.T) {
	for n, want := range map[int]int{20_000: 20_000, 32_769: 0} {
		l := lab.ForTest(t, lab.Options{Rules: inPrerouting(prefixesIn(n) + "@@ ip saddr @them udp dport 6000 dnat to 10.47.11.109; }")})
		all := ruleset(t, l).Forwards([]userrules.Link{{Index: 2, Name: "wan0"}})
		if len(all) != 1 || len(all[0].Sources) != want || all[0].Partial != (want == 0) {
			t.Fatalf("%d prefixes: %d forwards, %d sources, partial %v", n, len(all), len(all[0].Sources), all[0].Partial)
		}
		covered := userrules.Cover(all)
		for peer, bars := range map[string]bool{"11.0.0.2": true, "11.0.0.3": n != 20_000, "11.0.156.62": true, "203.0.113.5": n != 20_000} {
			p := cone.Permission{Key: cone.Key{Ext: cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:6000")), Peer: cone.AddrFrom(netip.MustParseAddr(peer))}}
			if got := covered.ConflictsWith(p); got != bars {
				t.Errorf("%d prefixes: %s is barred: %v", n, peer, got)
			}
		}
	}
}

// manyRules are more forwards of one port, by source, than are kept apart.
func manyRules() string {
	var s strings.Builder
	from := netip.MustParseAddr("203.0.113.1")
	for range 100 {
		fmt.Fprintf(&s, "ip saddr %v udp dport 6000 dnat to 10.47.11.109; ", from)
		from = from.Next()
	}
	return s.String()
}
