package userrules_test

import (
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// Fails when a rule that marks packets before they are routed is not seen, and when one counts
// that marks connections, or packets after they are routed, or that only tests marks.
func TestMayMark(t *testing.T) {
	mangle := func(hook, rules string) string {
		return "table inet m { chain other { meta mark set 7; }; chain c { type filter hook " + hook + " priority mangle; " + rules + "; }; }"
	}
	for name, tt := range map[string]struct {
		nft  string
		want bool
	}{
		"no rule":           {lab.Masquerade, false},
		"a constant":        {mangle("prerouting", `udp dport 5060 meta mark set 7`), true},
		"of the connection": {mangle("prerouting", `meta mark set ct mark`), true},
		"by a map":          {mangle("prerouting", `meta mark set udp dport map { 5060 : 7 }`), true},
		"behind a jump":     {mangle("prerouting", `iifname "lan0" jump other`), true},
		"behind a map":      {mangle("prerouting", `iifname vmap { "lan0" : goto other }`), true},
		"only tested":       {mangle("prerouting", `meta mark 7 accept`), false},
		"a connection":      {mangle("prerouting", `ct mark set 7`), false},
		"after routing":     {mangle("postrouting", `meta mark set 7`), false},
		"IPv6 alone":        {"table ip6 m { chain c { type filter hook prerouting priority mangle; meta mark set 7; }; }", false},
		"in a NAT chain":    {"table ip n { chain c { type nat hook prerouting priority dstnat; meta mark set 7; }; }", true},
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			check(t, l.NFT(tt.nft))
			if got := ruleset(t, l).MayMark(); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
	for name, tt := range map[string]struct {
		rules string
		want  bool
	}{
		"a mark":            {"*mangle\n-A PREROUTING -p udp --dport 5060 -j MARK --set-mark 7\nCOMMIT\n", true},
		"of the connection": {"*mangle\n-A PREROUTING -j CONNMARK --restore-mark\nCOMMIT\n", true},
		"only tested":       {"*mangle\n-A PREROUTING -m mark --mark 7 -j ACCEPT\nCOMMIT\n", false},
		"after routing":     {"*mangle\n-A FORWARD -j MARK --set-mark 7\nCOMMIT\n", false},
	} {
		withIPTables(t, name, tt.rules, func(t *testing.T, l *lab.Lab) {
			if got := ruleset(t, l).MayMark(); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}
