package e2e

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/doctor"
	"github.com/conenatd/conenatd/internal/lab"
)

// linesApart are the findings whose lines tests of their own apply.
var linesApart = map[string]func(*testing.T){
	"not_running":             TestDoctorTakesTheInstalledConfiguration,
	"rules_saved_with_tables": TestDoctorsLinesTakeTablesOutOfSavedRules,
}

// linesNotApplied are the findings whose lines no test can apply, and why.
var linesNotApplied = map[string]string{
	"conntrack_filling":     "nf_conntrack_max is of the first network namespace",
	"conntrack_nearly_full": "nf_conntrack_max is of the first network namespace",
	"expectations_few":      "nf_conntrack_expect_max is the same for all network namespaces",
}

// Fails when doctor has lines for a finding, and neither a test applies them nor a reason says why
// none can.
func TestDoctorsLinesAreAppliedWhereTheyCanBe(t *testing.T) {
	page, err := os.ReadFile("../docs/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)` \\| [a-z]+ \\| yes \\|").FindAllStringSubmatch(string(page), -1) {
		want = append(want, m[1])
	}
	got := slices.AppendSeq(slices.Collect(maps.Keys(linesApart)), maps.Keys(linesNotApplied))
	for _, tt := range faults {
		if !slices.Contains(got, tt.id) {
			got = append(got, tt.id)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-document +tests:\n%s", diff)
	}
}

// languages checks that lines were applied in the language of each firewall, where the language
// matters.
func languages(t *testing.T, applied map[string][]doctor.Firewall) {
	t.Helper()
	want := []doctor.Firewall{doctor.NFT, doctor.IPTablesLegacy, doctor.IPTablesNFT, doctor.Docker, doctor.UFW, doctor.FW4}
	slices.Sort(want)
	for _, id := range []string{dropped, blocked, noRule} {
		slices.Sort(applied[id])
		if diff := cmp.Diff(want, slices.Compact(applied[id])); diff != "" {
			t.Errorf("%s: -want +applied:\n%s", id, diff)
		}
	}
}

// Some rules keep the packets of two subnets and of their peers from conntrack, two of them equal. A line
// names its rule by its words or its handle, and rules for other things stand beside them. For one with the
// match "mark", iptables-legacy has the number alone.
//
// Fails when the lines, run in the printed order or, without a number, in the other one, delete another rule
// or leave one.
func TestDoctorsLinesDeleteNoOtherRule(t *testing.T) {
	stage.OfTheDaemon(t)
	const keeps, sip, ports = "-A PREROUTING -p udp -j CT --notrack\n", "-A PREROUTING -i lan0 -p udp -m udp --dport 5060:5070 -j CT --notrack\n", "(UDP to ports 5060-5070)"
	others := []string{"-A PREROUTING -s 192.0.2.66/32 -j DROP\n", "-A PREROUTING -s 192.0.2.67/32 -j DROP\n", "-A PREROUTING -s 192.0.2.68/32 -j DROP\n"}
	const marked = "-A PREROUTING -i lan0 -p udp -m mark --mark 0x0/0x1 -j CT --notrack\n"
	for _, tt := range []struct {
		variant, rule string
		reversed      bool
	}{
		{lab.IPTablesLegacy, "", false},
		{lab.IPTablesLegacy, "", true},
		{lab.IPTablesLegacy, marked, false},
		{lab.IPTablesNFT, marked, false},
		{lab.IPTablesNFT, marked, true},
	} {
		variant := tt.variant
		t.Run(fmt.Sprintf("%s, a mark %v, reversed %v", variant, tt.rule != "", tt.reversed), func(t *testing.T) {
			f := fault{id: "udp_not_tracked", options: noRules, subnet: "[[subnet]]\nprefix = \"10.47.12.0/24\"\n"}
			p := &patient{newScene(t, f.options), f, filepath.Join(t.TempDir(), "conenatd.toml")}
			loads(variant, lab.IPTablesMasquerade+"*raw\n"+sip+others[0]+tt.rule+keeps+others[1]+sip+others[2]+"COMMIT\n")(p.scene)
			p.write()
			var lines []doctor.Line
			what := ""
			for _, f := range p.doctor().Findings {
				if f.ID == p.id {
					lines, what = append(lines, f.Fix...), what+f.What
				}
			}
			if !strings.Contains(what, ports) {
				t.Errorf("want %q in %q", ports, what)
			}
			if tt.reversed {
				slices.Reverse(lines)
			}
			p.apply(lines)
			if f := p.finding(); f != nil {
				t.Errorf("the lines do not repair it: %+v", f)
			}
			left, err := p.Gateway.Output(variant+"-save", "-t", "raw")
			p.Must(err)
			var got []string
			for line := range strings.Lines(left) {
				if strings.HasPrefix(line, "-A ") {
					got = append(got, line)
				}
			}
			if diff := cmp.Diff(others, got); diff != "" {
				t.Errorf("-other rules +rules left by %+v:\n%s", lines, diff)
			}
		})
	}
}

// Peer ports that give no permission may be kept from conntrack, for a server on the gateway.
//
// Fails when doctor, with a daemon or without, asks something else than exclude_peer_ports which these
// are: it names a rule for them, or none for others.
func TestDoctorKnowsExcludedPeerPorts(t *testing.T) {
	stage.OfTheDaemon(t)
	const rules = `table inet raw { chain pre { type filter hook prerouting priority raw
	iifname "lan0" udp dport { 53, 5060-5070, 6000 } notrack
}; }
`
	for _, running := range []bool{false, true} {
		for excluded, named := range map[string]bool{"": true, `[53, "5060-5070"]`: true, `[53, "5060-5070", 6000]`: false} {
			t.Run(fmt.Sprintf("%s, a daemon %v", excluded, running), func(t *testing.T) {
				f := fault{id: "udp_not_tracked", options: lab.Options{Rules: lab.Masquerade + rules}}
				if excluded != "" {
					f.top = "exclude_peer_ports = " + excluded + "\n"
				}
				p := &patient{newScene(t, f.options), f, filepath.Join(t.TempDir(), "conenatd.toml")}
				if p.write(); running {
					p.Start("--config", p.config)
					p.Must(os.WriteFile(p.config, nil, 0o644)) // the daemon's own configuration counts
				}
				if f := p.finding(); (f != nil) != named {
					t.Errorf("doctor finds %+v", p.doctor())
				}
			})
		}
	}
}

// The user saved his ruleset while conenatd ran. The lines take conenatd's tables out of the file
// and nothing else, so that it can be loaded again beside the daemon.
//
// Fails when a table of conenatd stays in the file, and when one of the user's leaves it.
func TestDoctorsLinesTakeTablesOutOfSavedRules(t *testing.T) {
	stage.OfTheDaemon(t)
	p := &patient{newScene(t, usual), fault{id: "rules_saved_with_tables"}, filepath.Join(t.TempDir(), "conenatd.toml")}
	before, err := p.Gateway.Output("nft", "list", "ruleset")
	p.Must(err)
	p.write()
	p.Start("--config", p.config)
	path := p.saved()
	f := p.finding()
	if f == nil || len(f.Fix) == 0 {
		t.Fatalf("doctor finds %+v", p.doctor())
	}
	for _, l := range f.Fix {
		p.shell(strings.ReplaceAll(l.Line, f.About, path))
	}
	if f := p.finding(); f != nil {
		t.Errorf("the lines do not repair it: %+v", f)
	}
	after, err := os.ReadFile(path)
	p.Must(err)
	if diff := cmp.Diff(before, string(after)); diff != "" {
		t.Errorf("-before +repaired:\n%s", diff)
	}
	p.Must(p.NFT("flush ruleset\n" + string(after)))
}
