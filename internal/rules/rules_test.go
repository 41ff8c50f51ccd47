package rules_test

import (
	"net/netip"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	both      = []netip.Prefix{lab.InsideNet, lab.InsideNet6}
	onAnchors = []string{"conenat-0000001"}
	guard     = rules.Desired{OutsideLinks: []string{"wan0"}, Subnets: both, Guard: true}
)

func open(t testing.TB, l *lab.Lab) *rules.Tables {
	t.Helper()
	table, err := rules.Open(rules.Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, m := range table.Missing() {
		t.Fatal(m)
	}
	return table
}

func set(t testing.TB, table *rules.Tables, d rules.Desired) {
	t.Helper()
	if _, err := table.Set(d); err != nil {
		t.Fatal(err)
	}
}

// totals are the counters of which the tests know when they grow.
type totals struct {
	GuardDrops, SpoofedDrops, ChildDrops, PortZeroDrops, Unsure, Admitted, Expected, Zoned, Learned, LearnLimited,
	Moved, PoolUsedUp, LeftToRules, PortShared, Hairpinned uint64
}

func count(t *testing.T, table *rules.Tables) totals {
	t.Helper()
	c, err := table.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return totals{
		GuardDrops: c["guard_drops"], SpoofedDrops: c["spoofed_drops"], ChildDrops: c["child_drops"], PortZeroDrops: c["port_zero_drops"],
		Unsure: c["unsure"], Admitted: c.Admitted(), Expected: c.Expected(), Zoned: c.Zoned(), Learned: c["learned"], LearnLimited: c["learn_limited"],
		Moved: c["moved"], PoolUsedUp: c.PoolUsedUp(), LeftToRules: c["left_to_rules"], PortShared: c["port_shared"], Hairpinned: c["hairpinned"],
	}
}

// ours lists our tables with handles, but without counters.
func ours(t *testing.T, l *lab.Lab) string {
	t.Helper()
	list := output(t, l, "nft", "--stateless", "--handle", "list", "table", "inet", "conenat")
	if all := output(t, l, "nft", "list", "tables"); strings.Contains(all, "table ip conenat\n") {
		list += output(t, l, "nft", "--stateless", "--handle", "list", "table", "ip", "conenat")
	}
	return list
}

func output(t *testing.T, l *lab.Lab, name string, args ...string) string {
	t.Helper()
	out, err := l.Gateway.Output(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}
