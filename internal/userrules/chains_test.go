package userrules_test

import (
	"fmt"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// Fails when a chain of another hook or type, or one of this program's own chains, is taken
// for a chain that translates sources.
func TestSourceNATChainsAreThoseOfTheUser(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: `
		table ip first { chain c { type nat hook postrouting priority -199; }; chain later { type nat hook postrouting priority -198; }
			chain other { type nat hook prerouting priority -199; }; chain filter { type filter hook postrouting priority -199; }; }
		table ip older { chain made_by_conenatd { }; chain map_source { type nat hook postrouting priority -199; }; }
		table ip6 six { chain c { type nat hook postrouting priority -199; }; }
		table inet both { chain c { type nat hook postrouting priority -199; }; }`})
	check(t, l.IPTables(lab.IPTablesLegacy, "*nat\nCOMMIT\n"))
	check(t, l.IPTables("ip6tables-legacy", "*nat\nCOMMIT\n"))
	var got []string
	for _, c := range ruleset(t, l).SourceNATChains() {
		got = append(got, fmt.Sprint(c, " ", c.Priority))
	}
	if fmt.Sprint(got) != "[ip first c -199 ip first later -198 inet both c -199 iptables-legacy nat POSTROUTING 100]" {
		t.Errorf("got %q", got)
	}
}
