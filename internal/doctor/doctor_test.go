package doctor

import (
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/control"
)

var office = netip.MustParsePrefix("10.47.11.0/24")

// healthy are the facts of a gateway on which nothing is wrong.
func healthy() Facts {
	return Facts{
		Running: true,
		Status: control.Status{
			Subnets: []control.Subnet{{Prefix: office, Carried: control.Carried{By: "nft"}}}, Outside: []string{"wan0"},
			Conntrack: control.Conntrack{Entries: 79, Max: 100},
		},
		Inside: []string{"lan0"}, Outside4: []string{"wan0"},
		Sysctls: Sysctls{
			"net/ipv4/ip_forward": {Value: "1", Writable: true}, "net/ipv4/conf/lan0/forwarding": {Value: "1", Writable: true}, "net/ipv4/conf/wan0/forwarding": {Value: "1", Writable: true},
			"net/netfilter/nf_conntrack_udp_timeout": {Value: "30", Writable: true}, "net/netfilter/nf_conntrack_udp_timeout_stream": {Value: "120", Writable: true},
			"net/netfilter/nf_conntrack_max": {Value: "100", Writable: true}, "net/netfilter/nf_conntrack_expect_max": {Value: "1024", Writable: true},
			"net/ipv4/conf/all/rp_filter": {Value: "1", Writable: true}, "net/ipv4/fib_multipath_hash_policy": {Value: "1", Writable: true},
		},
	}
}

// Fails when a healthy gateway gets a finding.
func TestHealthyGatewayHasNoFinding(t *testing.T) {
	r := Diagnose(healthy())
	if len(r.Findings)+len(r.NotChecked) > 0 || r.Status() != 0 {
		t.Errorf("%+v", r)
	}
}

// Each case is the healthy gateway with one fault.
//
// Fails when a fact leads to no finding, to another one, or to other lines.
func TestFindings(t *testing.T) {
	for name, tt := range map[string]struct {
		fault  func(f *Facts)
		id     string
		lines  []string
		status int
	}{
		"would not start": {func(f *Facts) { f.Running, f.NoStart = false, "no helper" }, "would_not_start", nil, 2},
		"no subnet":       {func(f *Facts) { f.Running, f.Proposed = false, true }, "no_subnet", []string{"conenatd run --subnet 10.47.11.0/24"}, 2},
		"no subnet, and no candidate": {
			func(f *Facts) { f.Running, f.Proposed, f.Status.Subnets = false, true, nil }, "no_subnet", nil, 2,
		},
		"no subnet of the service": {
			func(f *Facts) { f.Running, f.Proposed, f.Start = false, true, "enable it && start" }, "no_subnet", []string{"enable it && start"}, 2,
		},
		"the service does not run": {func(f *Facts) { f.Running, f.Start = false, "start" }, "not_running", []string{"start"}, 2},
		"the service would not start": {
			func(f *Facts) { f.Running, f.Start, f.NoStart = false, "start", "no helper" }, "would_not_start", nil, 2,
		},
		"tables left": {func(f *Facts) { f.Running, f.Left = false, []string{"conenat"} }, "tables_left", []string{"conenatd cleanup"}, 1},
		"no forwarding": {
			func(f *Facts) {
				f.Status.Findings = []control.Finding{{ID: "forwarding_off", About: office.String()}}
				f.Sysctls["net/ipv4/ip_forward"], f.Sysctls["net/ipv4/conf/lan0/forwarding"] = Sysctl{Value: "0", Writable: true}, Sysctl{Value: "0", Writable: true}
			}, "forwarding_off", []string{"sysctl -w net.ipv4.ip_forward=1"}, 2,
		},
		"no forwarding on a link": {
			func(f *Facts) {
				f.Status.Findings = []control.Finding{{ID: "forwarding_off", About: office.String()}}
				f.Sysctls["net/ipv4/conf/wan0/forwarding"] = Sysctl{Value: "0", Writable: true}
			},
			"forwarding_off",
			[]string{"sysctl -w net.ipv4.conf.wan0.forwarding=1"},
			2,
		},
		"no IPv6 forwarding": {
			func(f *Facts) {
				f.Status.Subnets = append(f.Status.Subnets, control.Subnet{Prefix: netip.MustParsePrefix("2001:db8:47::/64"), Routed: true})
				f.Status.Findings = []control.Finding{{ID: "forwarding_off", About: "2001:db8:47::/64"}}
				f.Sysctls["net/ipv6/conf/all/forwarding"], f.Sysctls["net/ipv6/conf/wan0/accept_ra"] = Sysctl{Value: "0", Writable: true}, Sysctl{Value: "1", Writable: true}
			}, "forwarding_off", []string{"sysctl -w net.ipv6.conf.wan0.accept_ra=2", "sysctl -w net.ipv6.conf.all.forwarding=1"}, 2,
		},
		"no source NAT": {
			func(f *Facts) {
				f.Rules.Untranslated = []Translation{{Subnet: office, Link: "wan0"}}
				f.Rules.Tables = map[string]bool{"inet firewalld": true}
			}, "subnet_not_translated",
			[]string{"firewall-cmd --permanent --zone=$(firewall-cmd --get-zone-of-interface=wan0 || firewall-cmd --get-default-zone) --add-masquerade", "firewall-cmd --reload"},
			2,
		},
		"part of the children is dropped": {
			func(f *Facts) {
				f.Status.Subnets[0].Carried = control.Carried{By: "expect", Why: "related_accepted", Chain: "inet f forward"}
				f.Status.Findings = []control.Finding{{ID: "children_dropped", About: office.String() + " helper", Text: "dropped"}}
				f.Sysctls["net/netfilter/nf_conntrack_expect_max"] = Sysctl{Value: "100000", Writable: true}
			}, "children_dropped", []string{`nft 'insert rule inet f forward iifname "wan0" meta l4proto udp ip daddr 10.47.11.0/24 ct status dnat accept'`}, 2,
		},
		"a full table": {
			func(f *Facts) { f.Status.Conntrack.Entries = 80 }, "conntrack_filling", []string{"sysctl -w net.netfilter.nf_conntrack_max=200"}, 1,
		},
		"a full table, in a container": {
			func(f *Facts) {
				f.Status.Conntrack.Entries, f.Sysctls["net/netfilter/nf_conntrack_max"] = 80, Sysctl{Value: "100"}
			}, "conntrack_filling", nil, 1,
		},
		"few expectations": {
			func(f *Facts) { f.Status.Subnets[0].Carried.By = "expect" }, "expectations_few",
			[]string{"sysctl -w net.netfilter.nf_conntrack_expect_max=100000"},
			0,
		},
		"few expectations, in a container": {
			func(f *Facts) {
				f.Status.Subnets[0].Carried.By, f.Sysctls["net/netfilter/nf_conntrack_expect_max"] = "expect", Sysctl{Value: "1024"}
			}, "expectations_few", nil, 0,
		},
		"few expectations, for a user who is not root": {
			func(f *Facts) {
				f.Status.Subnets[0].Carried.By, f.Sysctls["net/netfilter/nf_conntrack_expect_max"] = "expect", Sysctl{Value: "1024", ByRoot: true}
			}, "expectations_few",
			[]string{"sysctl -w net.netfilter.nf_conntrack_expect_max=100000"},
			0,
		},
		"a full table, for a user who is not root": {
			func(f *Facts) {
				f.Status.Conntrack.Entries, f.Sysctls["net/netfilter/nf_conntrack_max"] = 80, Sysctl{Value: "100", ByRoot: true}
			}, "conntrack_filling", []string{"sysctl -w net.netfilter.nf_conntrack_max=200"}, 1,
		},
		"strict reverse paths": {
			func(f *Facts) {
				f.Outside4 = []string{"wan0", "wan1"}
				f.Sysctls["net/ipv4/conf/wan0/rp_filter"], f.Sysctls["net/ipv4/conf/wan1/rp_filter"] = Sysctl{Value: "2", Writable: true}, Sysctl{Value: "0", Writable: true}
			}, "reverse_path_strict", []string{"sysctl -w net.ipv4.conf.wan1.rp_filter=2"}, 1,
		},
		"an uplink for each flow": {
			func(f *Facts) { f.SharedLinks = []string{"wan0", "wan1"} }, "uplink_per_flow", []string{"sysctl -w net.ipv4.fib_multipath_hash_policy=0"}, 1,
		},
		"one rule against hosts and peers": {
			func(f *Facts) {
				const rule = "iptables-legacy raw PREROUTING rule 1"
				f.Rules.Untracked = []Untracked{{Subnets: []netip.Prefix{office}, Rule: rule}, {Subnets: []netip.Prefix{office}, FromPeers: true, Rule: rule}}
			}, "udp_not_tracked", []string{"iptables-legacy -t raw -D PREROUTING 1"}, 1,
		},
		"a rule that its words name": {
			func(f *Facts) {
				f.Rules.Untracked = []Untracked{{
					Subnets: []netip.Prefix{office}, Rule: "iptables-legacy raw PREROUTING rule 1",
					Spec: []string{"!", "-i", "wan+", "-p", "udp", "-m", "comment", "--comment", "it's $IP", "-j", "CT", "--notrack"},
				}}
			}, "udp_not_tracked", []string{`iptables-legacy -t raw -D PREROUTING '!' -i 'wan+' -p udp -m comment --comment 'it'\''s $IP' -j CT --notrack`}, 1,
		},
		"a flowtable": {func(f *Facts) { f.Flowtables = []string{"inet fw4 ft"} }, "flowtable", nil, 0},
		"a saved table": {
			func(f *Facts) { f.Saved = []Saved{{"/etc/nftables.conf", []string{"ip conenat"}}} }, "rules_saved_with_tables",
			[]string{"sed -i '/^table ip conenat {/,/^}/d' /etc/nftables.conf"},
			1,
		},
		"firewalld drops": {
			func(f *Facts) {
				f.Status.Subnets[0].Carried.Chain = "inet firewalld filter_FORWARD"
				f.Status.Findings = []control.Finding{{ID: "children_dropped", About: office.String(), Text: "dropped"}}
			}, "children_dropped", nil, 2, // StrictForwardPorts=no opens all forwards
		},
		"a chain of another hook drops": {
			func(f *Facts) {
				f.Status.Findings = []control.Finding{{ID: "children_dropped", About: office.String(), Text: "dropped"}}
			}, "children_dropped", nil, 2,
		},
		"a finding of a newer daemon": {
			func(f *Facts) { f.Status.Findings = []control.Finding{{ID: "brand_new", Text: "new"}} }, "brand_new", nil, 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := healthy()
			tt.fault(&f)
			r := Diagnose(f)
			if len(r.Findings) != 1 || r.Findings[0].ID != tt.id || r.Status() != tt.status {
				t.Fatalf("status %d: %+v", r.Status(), r.Findings)
			}
			if what := r.Findings[0].What; strings.Contains(what, "net/") {
				t.Errorf("a sysctl is not named as sysctl(8) names it: %s", what)
			}
			if i := slices.IndexFunc(checks, func(c check) bool { return c.id == tt.id }); i >= 0 && len(tt.lines) > 0 && !checks[i].lines {
				t.Errorf("%s has lines", tt.id)
			}
			var lines []string
			for _, l := range r.Findings[0].Fix {
				lines = append(lines, l.Line)
			}
			if diff := cmp.Diff(tt.lines, lines); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// A line for children comes first in its chain.
//
// Fails when it, or the text that says how to keep it, accepts more than UDP to the subnet on
// outside links, when the map's label is not used where it can be, and when a line that
// accepts forwards of the user's does not say so.
func TestLinesForChildrenAreNarrow(t *testing.T) {
	for name, tt := range map[string]struct {
		backend, chain string
		extra          string // a chain of the user's that takes rules
		routed, old    bool   // old: a kernel without labels
		rule, keep     string // keep: in the text
		forwards       bool
	}{
		"the map": {"nft", "inet f forward", "", false, false, `inet f forward iifname { "wan0", "wan1" } ct label 126 accept`, "/etc/nftables.conf", false},
		"both":    {"expect+nft", "inet f forward", "", false, false, `inet f forward iifname { "wan0", "wan1" } ct label 126 accept`, "/etc/nftables.conf", false},
		"fw4": {
			"nft", "inet fw4 forward", "", false, false, `inet fw4 forward iifname { "wan0", "wan1" } ct label 126 accept`,
			`write 'iifname { "wan0", "wan1" } ct label 126 accept' into /etc/conenatd.nft`, false,
		},
		"no labels": {
			"nft", "inet f forward", "", false, true,
			`inet f forward iifname { "wan0", "wan1" } meta l4proto udp ip daddr 10.47.11.0/24 ct status dnat accept`, "/etc/nftables.conf", true,
		},
		"expectations": {
			"expect", "inet f forward", "", false, false,
			`inet f forward iifname { "wan0", "wan1" } meta l4proto udp ip daddr 10.47.11.0/24 ct status dnat accept`, "/etc/nftables.conf", true,
		},
		"routed": {
			"expect", "inet f forward", "", true, false,
			`inet f forward iifname { "wan0", "wan1" } meta l4proto udp ip daddr 10.47.11.0/24 ct state related accept`, "/etc/nftables.conf", false,
		},
		"Docker": {
			"nft", "ip filter FORWARD", "ip filter DOCKER-USER", false, false,
			"-I DOCKER-USER -i wan0 -p udp -d 10.47.11.0/24 -m conntrack --ctstate DNAT -j ACCEPT", "DOCKER-USER", true,
		},
		"ufw": {
			"nft", "ip filter FORWARD", "ip filter ufw-before-forward", false, false,
			"-I ufw-before-forward -i wan0 -p udp -d 10.47.11.0/24 -m conntrack --ctstate DNAT -j ACCEPT",
			"write '-A ufw-before-forward -i wan0 -p udp -d 10.47.11.0/24 -m conntrack --ctstate DNAT -j ACCEPT' and " +
				"'-A ufw-before-forward -i wan1 -p udp -d 10.47.11.0/24 -m conntrack --ctstate DNAT -j ACCEPT' into", true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := healthy()
			f.Status.Outside, f.Status.Backend, f.NoLabels = []string{"wan0", "wan1"}, tt.backend, tt.old
			f.Outside4 = f.Status.Outside
			f.Status.Subnets[0].Carried.Chain, f.Status.Subnets[0].Routed = tt.chain, tt.routed
			f.Rules.Chains = map[string]bool{tt.extra: true}
			f.Status.Findings = []control.Finding{{ID: "children_dropped", About: office.String(), Text: "dropped"}}
			x := Diagnose(f).Findings[0]
			if len(x.Fix) == 0 || !strings.Contains(x.Fix[0].Line, tt.rule) || !strings.Contains(x.Keep, tt.keep) || strings.Contains(x.Keep, alsoForwards) != tt.forwards {
				t.Errorf("%+v", x)
			}
		})
	}
}

// Fails when a user who may not change a setting is told that he can, or that nobody can.
func TestWhoCanRaiseASettingIsTold(t *testing.T) {
	for s, want := range map[Sysctl]string{
		{Value: "1024", Writable: true}: "so at most 768 permissions stand as expectations",
		{Value: "1024", ByRoot: true}:   "; root can raise it",
		{Value: "1024"}:                 "; it can be raised only outside of this container or network namespace",
	} {
		f := healthy()
		f.Status.Subnets[0].Carried.By, f.Sysctls["net/netfilter/nf_conntrack_expect_max"] = "expect", s
		if all := Diagnose(f).Findings; len(all) != 1 || !strings.HasSuffix(all[0].What, want) {
			t.Errorf("%+v: %+v, want %q", s, all, want)
		}
	}
}

// Fails when a finding that needs flows, or the user's rules, counts as checked without.
func TestWhatIsNotCheckedIsTold(t *testing.T) {
	f := healthy()
	f.Running, f.Rules.Unread = false, "run as root"
	var got []string
	for _, n := range Diagnose(f).NotChecked {
		got = append(got, n.ID)
	}
	for _, id := range []string{"broken_flows", "several_zones", "port_per_peer", "subnet_not_translated", "source_nat_random"} {
		if !slices.Contains(got, id) {
			t.Errorf("%s is missing in %q", id, got)
		}
	}
}

// Fails when the worst finding is not the first, or text and colours are not as they were.
func TestReportForPeople(t *testing.T) {
	f := healthy()
	f.Running, f.Left, f.Proposed = false, []string{"conenat"}, true
	f.Flowtables = []string{"inet f ft"}
	r := Diagnose(f)
	r.NotChecked = []NotChecked{{"a", "no daemon"}, {"b", "no daemon"}}
	var plain, colored strings.Builder
	if err := r.Write(&plain, false); err != nil {
		t.Fatal(err)
	}
	if err := r.Write(&colored, true); err != nil {
		t.Fatal(err)
	}
	const want = `error: no_subnet
  no subnet is enabled; the rest of this report takes 10.47.11.0/24 for enabled
  Why it matters: only subnets that you enable are served
  To repair it:
    conenatd run --subnet 10.47.11.0/24
  To keep it: write a [[subnet]] for each into /etc/conenatd/conenatd.toml

warning: tables_left
  no daemon runs, and its nftables tables are still there: conenat; a new start
  takes them over
  Why it matters: these tables go on dropping packets, and nobody renews what
  they permit
  To repair it:
    conenatd cleanup

note: flowtable
  there are flowtables: inet f ft; their flows keep their permissions
  Why it matters: a flow in a flowtable counts as alive for 30 seconds after its
  last packet, whichever side sent it
  No single line repairs it.

not checked, because no daemon:
  a, b

1 error, 1 warning, 1 note
`
	if diff := cmp.Diff(want, plain.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if escape := regexp.MustCompile("\x1b\\[[0-9]*m"); !escape.MatchString(colored.String()) || escape.ReplaceAllString(colored.String(), "") != want {
		t.Errorf("with colours: %q", colored.String())
	}
}

// Fails when a shell would take a word apart, or run a part of it.
func TestWordsAreQuoted(t *testing.T) {
	for word, want := range map[string]string{"wan0": "wan0", "": "''", "a b": "'a b'", "$(id)": "'$(id)'", "it's": `'it'\''s'`} {
		if got := quote(word); got != want {
			t.Errorf("%q: %s, want %s", word, got, want)
		}
	}
}

func document(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// section returns the text below a heading.
func section(t *testing.T, text, heading string) string {
	t.Helper()
	_, body, found := strings.Cut(text, "\n"+heading+"\n")
	if !found {
		t.Fatalf("no heading %q", heading)
	}
	body, _, _ = strings.Cut(body, "\n#")
	return body
}

// Fails when the daemon has a finding without a meaning here, or no longer has one.
func TestEachFindingOfTheDaemonHasAMeaning(t *testing.T) {
	var want, got []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)` \\|").FindAllStringSubmatch(section(t, document(t, "control.md"), "### Warnings"), -1) {
		want = append(want, m[1])
	}
	for _, m := range meanings {
		got = append(got, m.id)
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" || len(want) == 0 {
		t.Errorf("-document +code:\n%s", diff)
	}
}

// Fails when docs/doctor.md and the code have different findings, or other words for them.
func TestTheDocumentHasTheFindings(t *testing.T) {
	text := document(t, "doctor.md")
	var daemons, own []string
	row := func(id string, severity Severity, lines bool, why string) string {
		return fmt.Sprintf("| `%s` | %s | %s | %s |", id, severity, map[bool]string{true: "yes"}[lines], why)
	}
	for _, m := range meanings {
		daemons = append(daemons, row(m.id, m.severity, m.fix != nil, m.why))
	}
	for _, c := range checks {
		own = append(own, row(c.id, c.severity, c.lines, c.why))
	}
	rows := regexp.MustCompile("(?m)^\\| `.*$")
	for heading, want := range map[string][]string{"### Of the daemon": daemons, "### Of doctor": own} {
		if diff := cmp.Diff(want, rows.FindAllString(section(t, text, heading), -1)); diff != "" {
			t.Errorf("%s (-code +document):\n%s", heading, diff)
		}
	}
	firewalls := []Firewall{NFT, IPTablesLegacy, IPTablesNFT, Docker, UFW, Firewalld, FW4}
	for i, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(section(t, text, "### Firewalls"), -1) {
		if i >= len(firewalls) || m[1] != string(firewalls[i]) {
			t.Errorf("firewall %q", m[1])
		}
	}
}

// Fails when a member of the JSON is only in the code or only in docs/doctor.md.
func TestTheDocumentDescribesTheJSON(t *testing.T) {
	got := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(section(t, document(t, "doctor.md"), "## JSON"), -1) {
		got[m[1]] = true
	}
	want := map[string]bool{}
	var add func(prefix string, typ reflect.Type)
	add = func(prefix string, typ reflect.Type) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			switch {
			case f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct:
				add(prefix+name+"[].", f.Type.Elem())
			default:
				want[prefix+name] = true
			}
		}
	}
	add("", reflect.TypeFor[Report]())
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-code +document:\n%s", diff)
	}
}
