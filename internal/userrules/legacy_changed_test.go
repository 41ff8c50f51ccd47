package userrules_test

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// A rule in the place of another rule of the same size is a change. Counters are not.
func TestChangesOfIPTablesLegacyAreSeen(t *testing.T) {
	const nat, filter = "*nat\n:PREROUTING ACCEPT [0:0]\n", "*filter\n:FORWARD ACCEPT [0:0]\n"
	l := lab.ForTest(t, lab.Options{IPv6: true, Rules: lab.NoRules})
	r := newReader(t, l)
	for _, step := range []struct {
		program, rules string
		changed        bool
	}{
		{"", "", true},
		{"", "", false},
		{"iptables", nat + "[1:100] -A PREROUTING -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109\n", true},
		{"", "", false},
		{"iptables", nat + "[2:200] -A PREROUTING -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109\n", false},
		{"iptables", nat + "[2:200] -A PREROUTING -p udp --dport 5061 -j DNAT --to-destination 10.47.11.109\n", true},
		{"iptables", filter, true},
		{"iptables", strings.Replace(filter, "ACCEPT", "DROP", 1), true},
		{"ip6tables", filter, true},
		{"ip6tables", filter + "[1:1] -A FORWARD -j ACCEPT\n", true},
		{"ip6tables", filter + "[2:2] -A FORWARD -j ACCEPT\n", false},
		{"iptables", "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j ACCEPT\n", true}, // it may give helpers
	} {
		if step.rules != "" {
			_, err := l.Gateway.Output("sh", "-c", step.program+"-legacy-restore --counters <<'END'\n"+step.rules+"COMMIT\nEND\n")
			check(t, err)
		}
		changed, err := r.LegacyChanged()
		check(t, err)
		if changed != step.changed {
			t.Errorf("after %q changed: %v", step.rules, changed)
		}
	}
}
