package nftversions

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// forms are the options of nft that list; every form lists all rules.
var forms = [][]string{nil, {"-a"}, {"-s"}, {"-t"}, {"-n"}, {"-j"}, {"-j", "-t"}, {"-j", "-a", "-s"}}

// Every nft lists the rules of each feature completely. Its listing can be loaded, gives
// the same rules, and lists the same again.
//
// nft 0.9.8 only lists: it cannot parse a map whose value is a concatenation other than
// its key.
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
	// What nft prints for a rule that it does not understand. It may show a test of a
	// source address before the family is known as a raw offset, @nh,96,32; that is
	// fine.
	unreadable = regexp.MustCompile(`invalid type|unknown|stmt ops|@th,|(?m)^\s*# handle|xt `)
)

// lists checks all forms of listing, and returns the plain listing.
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
			// 0.9.8 prints this warning to standard output.
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

// loads checks that the saved listing can be loaded elsewhere, and gives the same rules
// and elements.
func loads(t *testing.T, n *nft, s *scene, saved string) {
	t.Helper()
	ns := lab.ForTest(t, lab.Options{Rules: lab.NoRules}).Gateway.Namespace
	// First unchanged. A copy of a table with an owner may end when the nft that loads
	// it exits.
	for _, args := range [][]string{{"-c", "-f", "-"}, {"-f", "-"}, {"list", "ruleset"}} {
		if _, err := n.run(ns, saved, args...); err != nil {
			t.Fatalf("%v: %v", args, explain(saved, err))
		}
	}
	// Then as nftables.service does at its start, and without an owner.
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

// explain adds the lines of the file that the error names.
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
