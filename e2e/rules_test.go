package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// forMode returns the flags that Start would give the daemon.
func forMode(args ...string) []string {
	return append(strings.Fields(os.Getenv(stage.ModeEnv)), args...)
}

// "conenatd rules" prints the tables that a daemon with the same flags makes, and nft can
// load them.
//
// Fails when rules and run read something different of the gateway: its links, sockets,
// limits, helper, or what the user's firewall accepts.
func TestRulesAreThoseOfTheDaemon(t *testing.T) {
	subnets := []string{"--subnet", lab.InsideNet.String()}
	for name, tt := range map[string]struct {
		rules string
		args  []string
	}{
		"default": {lab.Masquerade, nil},
		"IPv6":    {lab.Masquerade, []string{"--subnet", lab.InsideNet6.String()}},
		"beside a firewall that accepts RELATED alone": {lab.Masquerade + lab.DropPolicy, nil},
		"beside rules that give helpers":               {lab.Masquerade + sipHelper, nil},
		"beside a forward into the pool": {
			lab.Masquerade + forward, []string{"--mapping=endpoint_independent", "--port-pool=5000-6023"},
		},
		"everything": {
			lab.Masquerade, []string{"--mapping=endpoint_independent", "--hairpin=true", "--peer-group=203.0.113.0/28", "--max-children=7", "--table=cone"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{IPv6: true, Rules: tt.rules})
			args := forMode(append(slices.Clone(subnets), tt.args...)...)
			before, code := s.CLI(append([]string{"rules"}, args...)...)
			if code != 0 {
				t.Fatal(before)
			}
			untouched, err := s.Ruleset()
			s.Must(err)
			if strings.Contains(untouched, "made_by_conenatd") {
				t.Errorf("rules makes tables:\n%s", untouched)
			}
			s.Start(append(slices.Clone(subnets), tt.args...)...)
			if now, _ := s.CLI(append([]string{"rules"}, args...)...); now != before {
				t.Errorf("beside a daemon it prints other rules:\n%s", cmp.Diff(before, now))
			}
			made, err := s.Ruleset()
			s.Must(err)
			copied := newScene(t, lab.Options{Rules: lab.NoRules})
			file := filepath.Join(t.TempDir(), "rules.nft")
			s.Must(os.WriteFile(file, []byte(before), 0o600))
			_, err = copied.Gateway.Output("nft", "-f", file)
			s.Must(err)
			loaded, err := copied.Ruleset()
			s.Must(err)
			if diff := cmp.Diff(ownTables(made), ownTables(loaded)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

var (
	ownTable = regexp.MustCompile(`(?ms)^table (inet|ip) cone(nat)? \{.*?^\}\n`)
	// How a table in use differs from one loaded from a file; the helper depends on the
	// kernel.
	inUse = regexp.MustCompile(`ct helper "[^"]*"|(?ms)^\tflags (owner|persist)[^\n]*\n\n?| # progname [^\n]*|packets \d+ bytes \d+|((?:set gateway_addresses|set masqueraded_addresses|set lean|set quiet|set alive|map addresses_\w+|set translated_\w+) \{\n\t\t[^=}]*?)\n\t\telements = \{[^}]*\}`)
)

// ownTables returns our tables in a listing, in a fixed order.
func ownTables(list string) (parts []string) {
	for _, t := range ownTable.FindAllString(list, -1) {
		head, rest, _ := strings.Cut(inUse.ReplaceAllString(t, "$2"), "\n")
		for part := range strings.SplitSeq(strings.TrimSuffix(rest, "}\n"), "\n\n") {
			parts = append(parts, head+" "+strings.TrimSpace(part))
		}
	}
	slices.Sort(parts)
	return parts
}

// Fails when the command needs privilege that it can do without, and when it does not say
// what it could not read.
func TestRulesWithoutPrivilege(t *testing.T) {
	s := newScene(t, lab.Options{Rules: lab.Masquerade})
	program := s.ForAll()
	s.Exe = filepath.Join(t.TempDir(), "conenatd")
	s.Must(os.WriteFile(s.Exe, fmt.Appendf(nil, `#!/bin/sh
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps -all --bounding-set -all %s "$@"
`, program), 0o755))
	out, code := s.CLI("rules", "--subnet", lab.InsideNet.String())
	for _, want := range []string{"# outside links: wan0\n", "# your own rules cannot be read", "run this as root\n", "\ntable ip conenat {\n", `iifname "wan0"`} {
		if code != 0 || !strings.Contains(out, want) {
			t.Fatalf("exit %d, lacks %q:\n%s", code, want, out)
		}
	}
}

// Fails when a subnet that is a link's network is not found.
func TestRulesOfTheNetworkOfALink(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Rules: lab.Masquerade})
	named, code := s.CLI("rules", "--subnet", lab.InsideNet.String())
	ofLink, ofLinkCode := s.CLI("rules", "--subnet", "lan0")
	if code != 0 || ofLinkCode != 0 || named != ofLink {
		t.Errorf("exit %d and %d; by prefix\n%s\nby link\n%s", code, ofLinkCode, named, ofLink)
	}
	// The link may come later.
	if out, code := s.CLI("rules", "--subnet", "lan9"); code != 0 || !strings.Contains(out, "table inet conenat {") {
		t.Errorf("exit %d:\n%s", code, out)
	}
}
