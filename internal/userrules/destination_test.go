package userrules_test

import (
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

func leads(t *testing.T, l *lab.Lab, want string) {
	t.Helper()
	all := forwards(t, l)
	if len(all) != 1 || all[0].To.String() != want {
		t.Errorf("got %+v, want one to %s", all, want)
	}
}
