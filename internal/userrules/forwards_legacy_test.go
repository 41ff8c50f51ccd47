package userrules_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/lab"
)

func TestForwardsOfIP6TablesLegacy(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true, Rules: lab.NoRules})
	check(t, l.IPTables("ip6tables-legacy", `*nat
-A PREROUTING -d 2001:db8:ffff::1 -p udp --dport 5060 -j DNAT --to-destination [2001:db8:47::109]:5070
-A PREROUTING -d 2001:db8:ffff::/64 -p udp --dport 5061 -j REDIRECT --to-ports 5071
-A PREROUTING -p tcp --dport 80 -j DNAT --to-destination [2001:db8:47::109]:80
COMMIT
`))
	var got []string
	for _, f := range forwards(t, l) {
		got = append(got, brief(f)+" | "+f.Text)
	}
	want := []string{
		"5060 > 2001:db8:ffff::1 | ip6tables-legacy nat PREROUTING rule 1",
		"5061 > 2001:db8:ffff::-2001:db8:ffff:0:ffff:ffff:ffff:ffff | ip6tables-legacy nat PREROUTING rule 2",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Fails when a forward for some ports of the source counts as one for all packets.
func TestForwardsOfIPTablesForSomeSourcePorts(t *testing.T) {
	for condition, partial := range map[string]bool{
		"--dport 5060": false, "--sport 0:65535 --dport 5060": false, "--sport 7 --dport 5060": true, "--sport 0:1023 --dport 5060": true,
		"! --sport 7 --dport 5060": true, "--sport 7": true,
	} {
		withIPTables(t, condition, "*nat\n-A PREROUTING -p udp "+condition+" -j DNAT --to-destination 10.47.11.109\nCOMMIT\n", func(t *testing.T, l *lab.Lab) {
			if all := forwards(t, l); len(all) != 1 || all[0].Partial != partial || all[0].Unknown {
				t.Errorf("%+v", all)
			}
		})
	}
}

// Counters are not a change. A rule in the place of another rule of the same size is.
func TestForwardsOfIPTablesLegacyAreReadAgainOnlyIfTheyChanged(t *testing.T) {
	const load = "*nat\n:PREROUTING ACCEPT [0:0]\n"
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	r := reader(t, l)
	for _, step := range []struct {
		rules string
		same  bool
		want  []string
	}{
		{"", false, nil},
		{load + "[1:100] -A PREROUTING -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109\nCOMMIT\n", false, []string{"5060 > ip"}},
		{"", true, []string{"5060 > ip"}},
		{load + "[2:200] -A PREROUTING -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109\nCOMMIT\n", true, []string{"5060 > ip"}},
		{load + "[2:200] -A PREROUTING -p udp --dport 5061 -j DNAT --to-destination 10.47.11.109\nCOMMIT\n", false, []string{"5061 > ip"}},
		{load + "COMMIT\n", false, nil},
		{load + "COMMIT\n", true, nil},
	} {
		if step.rules != "" {
			_, err := l.Gateway.Output("sh", "-c", "iptables-legacy-restore --counters <<'END'\n"+step.rules+"END\n")
			check(t, err)
		}
		if got := read(t, r); got.same != step.same || !slices.Equal(got.forwards, step.want) {
			t.Errorf("after %q %+v, want %v, same %v", step.rules, got, step.want, step.same)
		}
	}
	if rs, err := r.Read(); err != nil || rs.ForwardsMayBeHidden() {
		t.Error("root may not know which tables there are")
	}
}

// The kernel allows 16 jumps in nftables, and in iptables-legacy as many as there are
// chains.
func TestForwardsOfIPTablesLegacyBehindManyJumps(t *testing.T) {
	const chains = 20
	var heads, rules strings.Builder
	for i := range chains {
		fmt.Fprintf(&heads, ":c%d - [0:0]\n", i)
		fmt.Fprintf(&rules, "-A c%d -j c%d\n", i, i+1)
	}
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	check(t, l.IPTables(lab.IPTablesLegacy, fmt.Sprintf(`*nat
%s:c%d - [0:0]
-A PREROUTING -p udp --dport 5060 -j c0
%s-A c%d -j DNAT --to-destination 10.47.11.109
COMMIT
`, &heads, chains, &rules, chains)))
	var got []string
	for _, f := range forwards(t, l) {
		got = append(got, brief(f)+" | "+f.Text)
	}
	if diff := cmp.Diff([]string{"5060? > ip | iptables-legacy nat too many jumps"}, got); diff != "" {
		t.Error(diff)
	}
}
