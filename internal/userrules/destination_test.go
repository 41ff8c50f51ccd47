package userrules_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// The destination of a rule is known only if it is a single endpoint.
//
// Fails when a range, a map, a random port, or a port without an address is taken for one
// endpoint.
func TestForwardsTellWhereTheyLead(t *testing.T) {
	const one, none = "10.47.11.109:0", "invalid AddrPort"
	for name, tt := range map[string]struct{ nft, want string }{
		"an address":             {"udp dport 5060 dnat to 10.47.11.109", one},
		"an endpoint":            {"udp dport 5060 dnat to 10.47.11.109:5070", "10.47.11.109:5070"},
		"with a counter and log": {"udp dport 5060 counter log dnat to 10.47.11.109:5070", "10.47.11.109:5070"},
		"persistent":             {"udp dport 5060 dnat to 10.47.11.109 persistent", one},
		"addresses":              {"udp dport 5060 dnat to 10.47.11.109-10.47.11.110", none},
		"ports":                  {"udp dport 5060 dnat to 10.47.11.109:5070-5080", none},
		"a random port":          {"udp dport 5060 dnat to 10.47.11.109:5070 random", none},
		"a port":                 {"udp dport 5060 dnat to :5070", none},
		"redirect":               {"udp dport 5060 redirect to :5070", none},
		"a map":                  {"dnat to udp dport map { 5060 : 10.47.11.109 }", none},
		"by number":              {"udp dport 5060 dnat to numgen inc mod 2 map { 0 : 10.47.11.109, 1 : 10.47.11.110 }", none},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			check(t, l.NFT(inPrerouting("@@ "+tt.nft+"; }")))
			leads(t, l, tt.want)
		})
	}
	for name, tt := range map[string]struct{ rule, want string }{
		"an address":    {"--to-destination 10.47.11.109", one},
		"an endpoint":   {"--to-destination 10.47.11.109:5070", "10.47.11.109:5070"},
		"persistent":    {"--to-destination 10.47.11.109 --persistent", one},
		"addresses":     {"--to-destination 10.47.11.109-10.47.11.110", none},
		"ports":         {"--to-destination 10.47.11.109:5070-5080", none},
		"a random port": {"--to-destination 10.47.11.109:5070 --random", none},
		"a port":        {"--to-destination :5070", none},
		"shifted ports": {"--to-destination 10.47.11.109:5070-5071/5060", none},
	} {
		withIPTables(t, name, "*nat\n-A PREROUTING -p udp --dport 5060 -j DNAT "+tt.rule+"\nCOMMIT\n", func(t *testing.T, l *lab.Lab) { leads(t, l, tt.want) })
	}
}

// A rule with prefixes leads each address of one to an address of the other.
//
// Fails when such a rule is taken for one to an unknown endpoint, or its map for one element.
func TestForwardsTellThePrefixesThatTheyLeadTo(t *testing.T) {
	for name, tt := range map[string]struct{ nft, want string }{
		"a prefix": {"ip daddr 198.51.100.8/30 dnat prefix to 10.47.11.108/30", "198.51.100.8-198.51.100.11 10.47.11.108/30"},
		"a map": {
			"dnat ip prefix to ip daddr map { 198.51.100.8/30 : 10.47.11.108/30, 198.51.100.16/31 : 10.47.11.20/31 }",
			"198.51.100.16-198.51.100.17 10.47.11.20/31, 198.51.100.8-198.51.100.11 10.47.11.108/30",
		},
		"a part of a map":      {"ip daddr 198.51.100.10 dnat ip prefix to ip daddr map { 198.51.100.8/30 : 10.47.11.108/30 }", "198.51.100.10-198.51.100.10 10.47.11.108/30"},
		"a prefix for sources": {"dnat ip prefix to ip saddr map { 203.0.113.0/30 : 10.47.11.108/30 }", "0.0.0.0-255.255.255.255 invalid Prefix"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			check(t, l.NFT(inPrerouting("@@ "+tt.nft+"; }")))
			leadsToPrefixes(t, l, tt.want)
		})
	}
	withIPTables(t, "NETMAP", "*nat\n-A PREROUTING -d 198.51.100.8/30 -j NETMAP --to 10.47.11.108/30\nCOMMIT\n", func(t *testing.T, l *lab.Lab) {
		leadsToPrefixes(t, l, "198.51.100.8-198.51.100.11 10.47.11.108/30")
	})
}

func leadsToPrefixes(t *testing.T, l *lab.Lab, want string) {
	t.Helper()
	var got []string
	for _, f := range forwards(t, l) {
		for _, a := range f.Addrs {
			got = append(got, fmt.Sprintf("%v-%v %v", a.First, a.Last, f.ToPrefix))
		}
		if f.To.IsValid() {
			t.Errorf("leads to %v", f.To)
		}
	}
	if slices.Sort(got); strings.Join(got, ", ") != want {
		t.Errorf("got %q, want %s", got, want)
	}
}

func leads(t *testing.T, l *lab.Lab, want string) {
	t.Helper()
	all := forwards(t, l)
	if len(all) != 1 || all[0].To.String() != want {
		t.Errorf("got %+v, want one to %s", all, want)
	}
}
