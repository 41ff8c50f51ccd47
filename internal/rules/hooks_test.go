package rules

import (
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// docs/hooks.md lists exactly our base chains, with their hooks and priorities.
//
// Fails when a chain gets another priority, or when a chain is added.
func TestHooksAreDocumented(t *testing.T) {
	subnets := []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24"), netip.MustParsePrefix("2001:db8::/64")}
	all := Desired{
		OutsideLinks: []string{"wan0"}, Subnets: subnets, Guard: true, Spoofed: true, InZone: subnets,
		Helpers: []string{"RAS"}, Helped: true, MaxChildren: 256, Self: true, UplinkMarks: &UplinkMarks{Mask: 3, Links: []string{"wan0"}},
		Map:     &MapConfig{Size: 1, Subnets: subnets[:1], Learn: true, LearnRate: 1, Lifetime: time.Minute},
		Mapping: &MappingConfig{Subnets: subnets[:1], Hairpin: subnets[:1], Pools: []Pool{{subnets[:1], cone.PortRanges{{First: 61_000, Last: 61_999}}}}, Lifetime: time.Minute, Size: 1},
	}
	var layouts []*layout
	for _, d := range []Desired{all, {Quiet: true}} {
		more, err := newLayouts("conenat", d)
		if err != nil {
			t.Fatal(err)
		}
		layouts = append(layouts, more...)
	}
	var want []string
	for _, l := range layouts {
		for _, c := range l.chains {
			if c.Hooknum == nil {
				continue
			}
			hook := hookNames[*c.Hooknum]
			if c.Type == nftables.ChainTypeNAT {
				hook += ", NAT"
			}
			want = append(want, fmt.Sprintf("| `%s` | %s | %s | %d |", c.Name, nfnl.FamilyName(byte(c.Table.Family)), hook, *c.Priority))
		}
	}
	text, err := os.ReadFile("../../docs/hooks.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := regexp.MustCompile("(?m)^\\| `.*?` \\|.*?\\|.*?\\|.*?\\|").FindAllString(string(text), -1)
	slices.Sort(want)
	want = slices.Compact(want)
	slices.Sort(documented)
	if !slices.Equal(want, documented) {
		t.Errorf("the rules have\n%s\nthe page has\n%s", strings.Join(want, "\n"), strings.Join(documented, "\n"))
	}
}

// The daemon compares the children that this rule counts with those that pass the forward
// hook. Children of the gateway itself do not pass that hook.
//
// Fails when children of the gateway itself are counted.
func TestChildrenOfTheGatewayDoNotCountAsForwarded(t *testing.T) {
	for _, noFib := range []bool{false, true} {
		text, err := Text("conenat", Desired{
			OutsideLinks: []string{"wan0"}, Helpers: []string{"RAS"}, MaxChildren: 256, Self: true, noFib: noFib,
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24")},
		})
		if err != nil {
			t.Fatal(err)
		}
		for chain, want := range map[string]bool{"child": true, "own_child": false} {
			_, rules, found := strings.Cut(text, "\tchain "+chain+" {\n")
			rules, _, _ = strings.Cut(rules, "\t}\n")
			if got := strings.Contains(rules, `counter name "`+expectedCounter+`"`); !found || got != want {
				t.Errorf("noFib %v: %s counts: %v, want %v\n%s", noFib, chain, got, want, text)
			}
		}
		if _, rules, _ := strings.Cut(text, "chain own_children {"); !strings.Contains(rules, "goto own_child") {
			t.Errorf("noFib %v: own_children goes elsewhere", noFib)
		}
	}
}

// Fails when the rule that hides TCP flows is missing where the kernel cannot look up the way back.
func TestQuietNeedsNoRouteLookup(t *testing.T) {
	subnets := []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24")}
	for name, d := range map[string]Desired{"no fib": {noFib: true}, "no way back": {noWayBack: true}, "both": {}} {
		for _, learn := range []bool{false, true} {
			d.OutsideLinks, d.Subnets, d.Quiet = []string{"wan0"}, subnets, true
			d.Map = &MapConfig{Size: 1, Learn: learn, Subnets: subnets, Lifetime: time.Minute, LearnRate: 1}
			text, err := Text("conenat", d)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(text, "meta l4proto tcp meta l4proto @quiet ct event set"); n != 1 {
				t.Errorf("%s, learn %v: %d rules hide TCP, want 1\n%s", name, learn, n, text)
			}
		}
	}
}
