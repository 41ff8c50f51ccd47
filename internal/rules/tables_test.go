package rules_test

import (
	"errors"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

var all = rules.Desired{OutsideLinks: []string{"wan0", "ppp0"}, Subnets: both, Guard: true, Spoofed: true, Helpers: onAnchors, MaxChildren: 256, Map: learning.Map}

func TestTableIsWhatNftWouldMake(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	set(t, open(t, l), all)
	checkContents(t, l)
}

var head = regexp.MustCompile(`(?m)^table .*\n|^\t(flags|# progname) .*\n\n?`)

// checkContents compares the table with contents, except for its head, which has flags that
// depend on the kernel, and for the order of its parts.
func checkContents(t *testing.T, l *lab.Lab) {
	t.Helper()
	for family, want := range contents {
		checkTable(t, l, family, want)
	}
}

func checkTable(t *testing.T, l *lab.Lab, family, contents string) {
	t.Helper()
	got := head.ReplaceAllString(output(t, l, "nft", "--stateless", "list", "table", family, "conenat"), "")
	const wrong, right = "\"wan0\",\n\t\t\t     \"ppp0\"", "\"ppp0\",\n\t\t\t     \"wan0\""
	got = strings.Replace(got, wrong, right, 1) // the set is a hash
	if diff := cmp.Diff(sections(contents), sections(got)); diff != "" {
		t.Error(diff)
	}
}

func sections(s string) []string {
	parts := strings.Split(strings.Trim(s, "}\n"), "\n\n")
	for i := range parts {
		parts[i] = strings.Trim(parts[i], "\n\t}")
	}
	slices.Sort(parts)
	return parts
}

func TestSetTwiceChangesNothing(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	table := open(t, l)
	set(t, table, all)
	want := ours(t, l)

	d := all
	set(t, table, d)
	d.OutsideLinks = []string{"ppp0", "wan0", "ppp0"}
	set(t, table, d)
	if diff := cmp.Diff(want, ours(t, l)); diff != "" {
		t.Error(diff)
	}
	check(t, table.Close())
	set(t, open(t, l), all)
	if diff := cmp.Diff(want, ours(t, l)); diff != "" {
		t.Error("after a restart:", diff)
	}
}

func TestSetChangesWhatIsThere(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	table := open(t, l)
	tests := []struct {
		name       string
		d          rules.Desired
		has, hasNo []string
	}{
		{"nothing but port 0", rules.Desired{Helpers: onAnchors}, []string{"th dport 0", "conenat-0000001"}, []string{"chain guard", "set children", "elements"}},
		{"guard", guard, []string{"chain guard", `"wan0"`}, []string{"chain child"}},
		{"links that are not there", rules.Desired{OutsideLinks: []string{"ppp7"}, Subnets: both, Guard: true}, []string{`"ppp7"`}, []string{"wan0"}},
		{"cap", rules.Desired{Subnets: both, Helpers: onAnchors, MaxChildren: 5}, []string{"ct count over 5 "}, []string{"chain guard", "ppp7"}},
		{"other cap", rules.Desired{Subnets: both, Helpers: onAnchors, MaxChildren: 6}, []string{"ct count over 6 "}, []string{"over 5 ", "children4_5"}},
		{"all", all, []string{"chain guard", `"ppp0"`, "over 256 "}, []string{"over 6 "}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			set(t, table, test.d)
			got := ours(t, l)
			for _, s := range test.has {
				if !strings.Contains(got, s) {
					t.Errorf("lacks %q:\n%s", s, got)
				}
			}
			for _, s := range test.hasNo {
				if strings.Contains(got, s) {
					t.Errorf("has %q:\n%s", s, got)
				}
			}
		})
	}
}

func TestSetRepairsWhatSomebodyChanged(t *testing.T) {
	changes := []string{
		"flush table inet conenat",
		"flush chain inet conenat guard",
		"flush chain inet conenat guard; delete chain inet conenat guard",
		"insert rule inet conenat guard accept",
		"add rule inet conenat made_by_conenatd accept",
		"flush set inet conenat outside",
		"add element inet conenat outside { lan0 }",
		"add chain inet conenat more { type filter hook input priority 0; }",
		"add set inet conenat more { type ipv4_addr; }",
		"delete table inet conenat",
		"delete table ip conenat",
		"flush ruleset",
		"flush chain ip conenat learn",
		"insert rule ip conenat admit accept",
		"flush set ip conenat subnets",
		"add element ip conenat no_peers { 192.0.2.0/24 }",
		"delete element ip conenat excluded_ports { 5066 }",
		"flush chain ip conenat admit; delete chain ip conenat admit",
		"add counter ip conenat more",
	}
	for _, change := range changes {
		t.Run(change, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{})
			table := open(t, l)
			set(t, table, all)
			check(t, table.Close()) // an owner alone may change it
			check(t, l.NFT(change))

			table = open(t, l)
			set(t, table, all)
			checkContents(t, l)
		})
	}
}

// Fails when the table of an older conenatd is taken for the same, or cannot be replaced.
func TestSetReplacesWhatAnOlderOneMade(t *testing.T) {
	for name, older := range map[string]string{
		"with marks in the map": `
			map permissions { type ipv4_addr . ipv4_addr . inet_service : ipv4_addr . inet_service . mark; size 1000; flags dynamic,timeout; }
			chain admitted { ip saddr . ip daddr vmap { 192.0.2.1 . 192.0.2.2 : accept }; }
			chain admit { type nat hook prerouting priority -95; meta l4proto udp iifname wan0 goto admitted; }`,
		"with marks of another type": `
			map marks { type ipv4_addr : mark; flags timeout; }
			chain admitted { ct mark set ip saddr map @marks; }`,
		"with another size of marks": `
			map marks { type ipv4_addr . ipv4_addr . inet_service : mark; size 7; flags dynamic,timeout; }`,
		"with another timeout": `
			set learners { type ipv4_addr; size 65535; flags dynamic,timeout; timeout 2m; }`,
		"without a timeout": `
			set learners { type ipv4_addr; size 65535; flags dynamic; }`,
		"with another size": `
			set denied { type ipv4_addr . ipv4_addr . inet_service; size 100; flags timeout; }`,
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{})
			older = "table ip conenat {\n chain made_by_conenatd { }" + older + "\n}"
			check(t, l.NFT(older))
			set(t, open(t, l), all)
			checkContents(t, l)
		})
	}
}

func TestForeignTableIsLeftAlone(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.Masquerade + "table inet conenat { chain mine { udp dport 5060 accept; }; }"})
	before, err := l.Ruleset()
	check(t, err)
	if _, err := rules.Open(rules.Config{NetNS: l.Gateway.FD()}); !errors.Is(err, rules.ErrForeignTable) {
		t.Error(err)
	}
	table, err := rules.Open(rules.Config{NetNS: l.Gateway.FD(), Name: "cone"})
	if err != nil {
		t.Fatal(err)
	}
	set(t, table, all)
	check(t, table.Remove())
	// A table that was made later.
	check(t, l.NFT("table inet cone { }"))
	_, err = table.Set(all)
	for _, err := range []error{err, table.Remove()} {
		if !errors.Is(err, rules.ErrForeignTable) {
			t.Error(err)
		}
	}
	check(t, l.NFT("delete table inet cone"))
	check(t, table.Close())
	after, err := l.Ruleset()
	check(t, err)
	if diff := cmp.Diff(before, after); diff != "" {
		t.Error(diff)
	}
}

func TestRemoveLeavesNoTrace(t *testing.T) {
	for _, empty := range []bool{false, true} {
		o := lab.Options{Rules: lab.Masquerade + lab.DropPolicy}
		if empty {
			o.Rules = lab.NoRules
		}
		l := lab.ForTest(t, o)
		before := output(t, l, "nft", "--handle", "list", "ruleset")
		table := open(t, l)
		if diff := cmp.Diff(before, output(t, l, "nft", "--handle", "list", "ruleset")); diff != "" {
			t.Error("Open changed something:", diff)
		}
		check(t, table.Remove()) // nothing there
		set(t, table, all)
		check(t, table.Close())
		table = open(t, l)
		check(t, table.Remove())
		check(t, table.Remove())
		if diff := cmp.Diff(before, output(t, l, "nft", "--handle", "list", "ruleset")); diff != "" {
			t.Error(diff)
		}
		if c := count(t, table); c != (totals{}) {
			t.Error(c)
		}
	}
}

func TestOwnedTableStaysWithItsOwner(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	table := open(t, l)
	set(t, table, all)
	want := ours(t, l)
	if !strings.Contains(want, "flags owner") {
		before, release, err := lab.KernelBefore(6, 9)
		if !before {
			t.Fatalf("Linux %s, and the table has no owner, %v: %s", release, err, want)
		}
		t.Skip("the kernel has no tables that have an owner and persist (Linux 6.9)")
	}
	check(t, l.NFT("flush ruleset"))
	if diff := cmp.Diff(want, ours(t, l)); diff != "" {
		t.Error(diff)
	}
	if err := l.NFT("delete table inet conenat"); err == nil {
		t.Error("somebody else deleted it")
	}
	saved, err := l.Ruleset()
	check(t, err)
	for _, file := range []string{saved, "flush ruleset\n" + saved, "table inet conenat { chain guard { accept; }; }"} {
		if err := l.NFT(file); err == nil || !strings.Contains(err.Error(), "Operation not permitted") {
			t.Errorf("loading a file with our table says %v: %s", err, file)
		}
	}
	if diff := cmp.Diff(want, ours(t, l)); diff != "" {
		t.Error("after a file was loaded:", diff)
	}
	if _, err := rules.Open(rules.Config{NetNS: l.Gateway.FD()}); !errors.Is(err, rules.ErrOwned) {
		t.Error(err)
	}
	check(t, table.Close())
	if !strings.Contains(ours(t, l), "chain guard") {
		t.Error("the table went with its owner")
	}
}

func TestOpenNeedsPrivilege(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	err := l.Gateway.Do(func() error {
		return lab.WithoutCapabilities(func() error { _, err := rules.Open(rules.Config{}); return err })
	})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Error(err)
	}
}
