package nftversions

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// forms are the ways to list; all list all rules.
var forms = [][]string{nil, {"-a"}, {"-s"}, {"-t"}, {"-n"}, {"-j"}, {"-j", "-t"}, {"-j", "-a", "-s"}}

// Any nft lists the rules of each feature, whole; what it lists can be loaded, is the
// same then, and lists the same.
//
// nft 0.9.8 lists alone: it cannot parse a map whose value is a concatenation that
// differs from its key.
func TestEveryNFTListsSavesAndLoads(t *testing.T) {
	all := eachNFT(t)
	for _, f := range features {
		t.Run(f.name, func(t *testing.T) {
			s := f.play(t)
			for _, n := range all {
				t.Run(n.String(), func(t *testing.T) {
					s := s.in(t)
					saved := lists(t, n, s, f.shows)
					if !n.before(1, 0, 2) {
						loads(t, n, s, saved)
					}
				})
			}
		})
	}
}

var (
	withHandle = regexp.MustCompile(`(?m)[^{] # handle \d+$`)
	// What nft says where it does not understand a rule. A source address that is tested
	// before the family is understood, though shown as a place in the packet, @nh,96,24.
	unreadable = regexp.MustCompile(`invalid type|unknown|stmt ops|@th,|(?m)^\s*# handle|xt `)
)

// lists checks all forms of listing and returns the plain one.
func lists(t *testing.T, n *nft, s *scene, shows []string) (saved string) {
	t.Helper()
	want, err := n.bytecode(s.Gateway.Namespace)
	if err != nil {
		t.Fatal(err)
	}
	if count(want) == 0 {
		t.Fatal("no rules")
	}
	s.Until("nothing is about to end", func() bool {
		saved, err = n.run(s.Gateway.Namespace, "", "list", "ruleset")
		if err != nil {
			t.Fatal(err)
		}
		return !soon.MatchString(saved)
	})
	for _, form := range forms {
		args := append(form, "list", "ruleset")
		out, err := n.run(s.Gateway.Namespace, "", args...)
		if err != nil {
			t.Errorf("%v: %v", args, err)
			continue
		}
		switch {
		case form == nil:
		case form[0] == "-j":
			// 0.9.8 warns on standard output.
			rules, err := rulesInJSON(strings.ReplaceAll(out, noJSON, ""))
			if err != nil || rules != count(want) {
				t.Errorf("%v: %d rules of %d, %v", args, rules, count(want), err)
			}
			continue
		case form[0] == "-a":
			if rules := len(withHandle.FindAllString(out, -1)); rules != count(want) {
				t.Errorf("%v: %d rules of %d\n%s", args, rules, count(want), out)
			}
		}
		if odd := unreadable.FindString(out); odd != "" && form == nil {
			t.Errorf("%v: shows %q in\n%s", args, odd, lineWith(out, odd))
		}
		for _, part := range append(shows, "table inet conenat {") {
			if !strings.Contains(out, part) {
				t.Errorf("%v: %q is not in\n%s", args, part, out)
			}
		}
	}
	return saved
}

func lineWith(text, part string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, part) {
			return line
		}
	}
	return ""
}

// loads checks that what was saved can be loaded elsewhere, and gives the same rules
// and elements.
func loads(t *testing.T, n *nft, s *scene, saved string) {
	t.Helper()
	ns := lab.ForTest(t, lab.Options{Rules: lab.NoRules}).Gateway.Namespace
	// As it is: a copy of a table with an owner may end with the nft that loads it.
	for _, args := range [][]string{{"-c", "-f", "-"}, {"-f", "-"}, {"list", "ruleset"}} {
		if _, err := n.run(ns, saved, args...); err != nil {
			t.Fatalf("%v: %v", args, explain(saved, err))
		}
	}
	// Once more, as a start of nftables.service does, and without an owner.
	if _, err := n.run(ns, "flush ruleset\n"+unowned(saved), "-f", "-"); err != nil {
		t.Fatalf("load without an owner: %v", explain("\n"+saved, err))
	}
	again, err := n.run(ns, "", "list", "ruleset")
	if err != nil {
		t.Fatalf("list the copy: %v", err)
	}
	if before, after := settled(saved), settled(again); before != after {
		t.Errorf("the copy lists otherwise:\n%s", firstDifference(before, after))
	}
	want, err := n.bytecode(s.Gateway.Namespace)
	if err != nil {
		t.Fatal(err)
	}
	got, err := n.bytecode(ns)
	if err != nil {
		t.Fatal(err)
	}
	if n.before(1, 0, 3) {
		want, got = untimed(want), untimed(got)
	}
	if d := difference(want, got); d != "" {
		t.Errorf("the copy has other rules: %s", d)
	}
	if _, err := n.run(ns, "flush ruleset\n"+again, "-c", "-f", "-"); err != nil {
		t.Errorf("check the copy's copy: %v", explain("\n"+again, err))
	}
}

// explain adds the lines of a file that the error speaks of.
func explain(file string, err error) error {
	lines := strings.Split(file, "\n")
	for _, m := range regexp.MustCompile(`stdin:(\d+):`).FindAllStringSubmatch(err.Error(), 3) {
		var i int
		if _, e := fmt.Sscan(m[1], &i); e == nil && i <= len(lines) {
			err = fmt.Errorf("%w\nline %d: %s", err, i, lines[i-1])
		}
	}
	return err
}
