package userrules_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Elements of a verdict map of single keys have no packet in common, so what leads to each is known however
// many there are, as kube-proxy has them. What no element has, and later rules, are for the others.
//
// Fails when one of many forwards behind a map is in doubt, or a packet of an element counts for the
// catch-all element or for the next rule.
func TestForwardsBehindLargeMap(t *testing.T) {
	const services = 1500
	address := func(n int) string { return fmt.Sprintf("10.96.%d.%d", n/250, 1+n%250) }
	var chains, elements strings.Builder
	for n := range services {
		fmt.Fprintf(&chains, "chain s%d { udp dport 53 dnat to 10.47.11.109:%d; }\n", n, 1000+n)
		fmt.Fprintf(&elements, "%s . udp . 53 : goto s%d,\n", address(n), n)
	}
	for name, rest := range map[string]string{
		"catch-all": "* : goto rest }; }; @@ ip daddr . meta l4proto . th dport vmap @m; }",
		"next rule": "}; }; @@ ip daddr . meta l4proto . th dport vmap @m; goto rest; }",
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: inPrerouting(chains.String() +
				"chain rest { udp dport 53 dnat to 10.47.11.110; }\n" +
				"map m { type ipv4_addr . inet_proto . inet_service : verdict; elements = { " + elements.String() + rest)})
			rs, err := newReader(t, l).Read()
			check(t, err)
			all := rs.Forwards([]userrules.Link{{Index: 2, Name: "wan0"}})
			if len(all) != services+1 {
				t.Fatalf("%d forwards for %d services and the rest", len(all), services)
			}
			for _, f := range all[:services] {
				if !f.Certain() {
					t.Fatalf("%+v is in doubt", f)
				}
			}
			for n := range services {
				a := netip.MustParseAddr(address(n))
				if all[services].Addrs.Has(a) {
					t.Fatalf("the rest has %v", a)
				}
			}
		})
	}
}

// Fails when each question about sources follows all rules again, or an answer changes another.
func TestSourceNATIsFoundOnce(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: "table ip nat { chain post { type nat hook postrouting priority srcnat; " +
		"ip saddr 10.47.11.109 snat to 198.51.100.2; ip saddr 10.47.11.110 meta l4proto udp snat to 198.51.100.3:1000-2000; }; }"})
	rs, err := newReader(t, l).Read()
	check(t, err)
	first := rs.SourceNAT()
	before := slices.Clone(first)
	if _, err := rs.PortChoosers(); err != nil {
		t.Fatal(err)
	}
	if again := rs.SourceNAT(); &again[0] != &first[0] || !userrules.SameSources(again, before) || !slices.Equal(again[1].Ports, before[1].Ports) {
		t.Errorf("%+v, before %+v", again, before)
	}
}
