package probe

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func ap(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }

// answers are those of a server with two addresses behind a stock NAT, with some changed.
func answers(change func(*Answers)) *Answers {
	const inside, outside = "10.0.0.2", "198.51.100.1"
	ext := ap(outside + ":4000")
	a := &Answers{
		Server: ap("203.0.113.5:3478"), Other: ap("192.0.2.77:3479"), Origin: ap("203.0.113.5:3478"),
		Inside: netip.MustParseAddr(inside), Own: []netip.Addr{netip.MustParseAddr(inside)}, Outsides: []netip.Addr{ext.Addr()},
		Local: ap(inside + ":4000"), AtServer: ext, AtHost: ext, AtOther: ext, AtOnlyPort: ext,
		FromOther: None, FromPort: None, CheckOther: Changed, CheckPort: Changed, Hairpin: HairpinNo,
	}
	change(a)
	return a
}

func port(n uint16) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), n) }

func untranslated(a *Answers) {
	a.AtServer, a.AtHost, a.AtOther, a.AtOnlyPort = a.Local, a.Local, a.Local, a.Local
	a.Outsides, a.Hairpin = []netip.Addr{a.Inside}, HairpinNone
}

func oneAddress(a *Answers) {
	a.Other = ap("203.0.113.5:3479")
	a.AtHost, a.AtOther = netip.AddrPort{}, netip.AddrPort{}
	a.FromOther, a.CheckOther = NotAsked, NotAsked
}

func noOther(a *Answers) {
	oneAddress(a)
	a.Other, a.AtOnlyPort, a.FromPort, a.CheckPort = netip.AddrPort{}, netip.AddrPort{}, NotAsked, NotAsked
}

func TestEveryNATHasItsVerdict(t *testing.T) {
	for name, tc := range map[string]struct {
		change             func(*Answers)
		mapping, filtering string
		verdict            Verdict
		notes              []string
	}{
		"stock":           {func(*Answers) {}, EndpointIndependent, AddressAndPortDependent, PortRestrictedCone, nil},
		"restricted":      {func(a *Answers) { a.FromPort = Changed }, EndpointIndependent, AddressDependent, RestrictedCone, nil},
		"full cone":       {func(a *Answers) { a.FromOther, a.FromPort = Changed, Changed }, EndpointIndependent, EndpointIndependent, FullCone, nil},
		"no NAT":          {func(a *Answers) { untranslated(a); a.FromOther, a.FromPort = Changed, Changed }, NotTranslated, EndpointIndependent, Open, nil},
		"firewall":        {untranslated, NotTranslated, AddressAndPortDependent, SymmetricFirewall, nil},
		"loose firewall":  {func(a *Answers) { untranslated(a); a.FromPort = Changed }, NotTranslated, AddressDependent, RestrictedFirewall, nil},
		"port per peer":   {func(a *Answers) { a.AtHost, a.AtOther = port(5), port(5) }, AddressDependent, AddressAndPortDependent, Symmetric, nil},
		"port per remote": {func(a *Answers) { a.AtHost, a.AtOther, a.AtOnlyPort = port(5), port(6), port(7) }, AddressAndPortDependent, AddressAndPortDependent, Symmetric, nil},
		"random, unchecked": {func(a *Answers) {
			a.AtHost, a.AtOther, a.AtOnlyPort, a.CheckOther, a.CheckPort = port(5), port(6), port(7), None, None
		}, AddressAndPortDependent, AddressAndPortDependent, Symmetric, nil},
		"symmetric, anybody":   {func(a *Answers) { a.AtHost, a.AtOther, a.FromOther = port(5), port(5), Changed }, AddressDependent, EndpointIndependent, Symmetric, nil},
		"only some translated": {func(a *Answers) { untranslated(a); a.AtHost, a.AtOther = port(4000), port(4000) }, AddressDependent, AddressAndPortDependent, Symmetric, nil},
		"other port of another host differs": {
			func(a *Answers) { a.AtOther = port(9) }, AddressAndPortDependent, AddressAndPortDependent, Symmetric, nil,
		},
		"no other address": {noOther, Unknown, Unknown, Undecided, []string{"no_other_address"}},
		"no NAT, no other address": {
			func(a *Answers) {
				noOther(a)
				untranslated(a)
				a.AtHost, a.AtOther, a.AtOnlyPort = netip.AddrPort{}, netip.AddrPort{}, netip.AddrPort{}
			},
			NotTranslated, Unknown, Undecided,
			[]string{"no_other_address"},
		},
		"one address":                  {oneAddress, Unknown, AddressAndPortDependent, Undecided, []string{"one_address"}},
		"one address, open to ports":   {func(a *Answers) { oneAddress(a); a.FromPort, a.CheckPort = Changed, NotAsked }, Unknown, Unknown, Undecided, []string{"one_address"}},
		"one address, another mapping": {func(a *Answers) { oneAddress(a); a.AtOnlyPort = port(5) }, AddressAndPortDependent, AddressAndPortDependent, Symmetric, []string{"one_address"}},
		"other address is down": {
			func(a *Answers) { a.AtHost, a.AtOther, a.CheckOther = netip.AddrPort{}, netip.AddrPort{}, None },
			Unknown, AddressAndPortDependent, Undecided,
			[]string{"other_address_silent"},
		},
		"no CHANGE-REQUEST":         {func(a *Answers) { a.FromOther, a.FromPort = Refused, Refused }, EndpointIndependent, Unknown, Undecided, []string{"no_change_request"}},
		"CHANGE-REQUEST is ignored": {func(a *Answers) { a.FromOther, a.FromPort = Elsewhere, Elsewhere }, EndpointIndependent, Unknown, Undecided, []string{"no_change_request"}},
		"nothing comes back":        {func(a *Answers) { a.CheckOther, a.CheckPort = None, None }, EndpointIndependent, Unknown, Undecided, []string{"filtering_unproven"}},
		"not from the other host": {
			func(a *Answers) { a.FromPort, a.CheckOther = Changed, None }, EndpointIndependent, Unknown, Undecided, []string{"filtering_unproven"},
		},
		"no RESPONSE-PORT":  {func(a *Answers) { a.Asked = true }, EndpointIndependent, AddressAndPortDependent, PortRestrictedCone, []string{"no_response_port"}},
		"server behind NAT": {func(a *Answers) { a.Origin = ap("172.16.0.5:3478") }, EndpointIndependent, AddressAndPortDependent, PortRestrictedCone, []string{"server_translated"}},
		"two outside addresses": {
			func(a *Answers) { a.Outsides = append(a.Outsides, netip.MustParseAddr("198.51.100.2")) },
			EndpointIndependent, AddressAndPortDependent, PortRestrictedCone,
			[]string{"several_outside_addresses"},
		},
		"on the gateway": {
			func(a *Answers) { a.Own = append(a.Own, a.AtServer.Addr()) },
			EndpointIndependent, AddressAndPortDependent, PortRestrictedCone,
			[]string{"own_translation"},
		},
		"server inside of the provider": {
			func(a *Answers) { a.Outsides = []netip.Addr{netip.MustParseAddr("100.64.3.4")} },
			EndpointIndependent, AddressAndPortDependent, PortRestrictedCone,
			[]string{"private_outside"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := Classify(answers(tc.change))
			var notes []string
			for _, n := range r.Notes {
				notes = append(notes, n.ID)
			}
			if r.Mapping != tc.mapping || r.Filtering != tc.filtering || r.Verdict != tc.verdict || !slices.Equal(notes, tc.notes) {
				t.Errorf("%s, %s: %s, %q; want %s, %s: %s, %q", r.Mapping, r.Filtering, r.Verdict, notes, tc.mapping, tc.filtering, tc.verdict, tc.notes)
			}
			if r.AsConenatd != (tc.filtering == AddressDependent && tc.mapping != AddressDependent && tc.mapping != Unknown) {
				t.Errorf("as conenatd: %v", r.AsConenatd)
			}
		})
	}
}

func TestTheWorseFamilyDecides(t *testing.T) {
	good := Classify(answers(func(a *Answers) { a.FromPort = Changed }))
	bad := Classify(&Answers{Server: ap("[2001:db8::1]:3478"), Silent: errSilence})
	r := Report{Results: []Result{good, bad}}
	if r.Status() != 3 || (&Report{Results: []Result{good}}).Status() != 0 || bad.Family != "ipv6" || !strings.Contains(bad.What, "UDP to it is blocked") {
		t.Errorf("status %d, %+v", r.Status(), bad)
	}
}

// Fails when a host without IPv6 gets a verdict about it, or one without any route none.
func TestFamiliesWithoutRouteAreLeftOut(t *testing.T) {
	four := Answers{Server: ap("192.0.2.1:3478"), Silent: errSilence}
	six := Answers{Server: ap("[2001:db8::1]:3478"), Silent: errNoRoute}
	if got := routed([]Answers{four, six}); len(got) != 1 || got[0].Server != four.Server {
		t.Errorf("%+v", got)
	}
	four.Silent = errNoRoute
	if got := routed([]Answers{four, six}); len(got) != 2 {
		t.Errorf("%+v", got)
	}
}

// Fails when text and colours are not as documented, or a line is wider than a terminal.
func TestReportForPeople(t *testing.T) {
	document, err := os.ReadFile("../../docs/probe.md")
	if err != nil {
		t.Fatal(err)
	}
	r := Report{Results: []Result{Classify(answers(func(a *Answers) {
		a.FromPort, a.Inside, a.Local = Changed, netip.MustParseAddr("10.47.11.109"), ap("10.47.11.109:4000")
	}))}}
	var plain, colored strings.Builder
	if err := errors.Join(r.Write(&plain, false), r.Write(&colored, true)); err != nil {
		t.Fatal(err)
	}
	_, want, _ := strings.Cut(string(document), "--server 203.0.113.5\n")
	want, _, _ = strings.Cut(want, "```")
	if diff := cmp.Diff(want, plain.String()); diff != "" {
		t.Errorf("-document +got:\n%s", diff)
	}
	if escape := regexp.MustCompile("\x1b\\[[0-9]*m"); len(escape.FindAllString(colored.String(), -1)) != 2 || escape.ReplaceAllString(colored.String(), "") != want {
		t.Errorf("with colours: %q", colored.String())
	}
	for v := range meanings {
		wide := Report{Results: []Result{{Verdict: v, Mapping: AddressAndPortDependent, Filtering: AddressAndPortDependent, Hairpin: HairpinYes}}}
		wide.Results[0].say(answers(noOther))
		var b strings.Builder
		if err := wide.Write(&b, false); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(b.String()) {
			if len(line) > 81 {
				t.Errorf("%s: wider than 80: %s", v, line)
			}
		}
	}
}

// paths lists the members of a JSON document.
func paths(prefix string, v any) (all []string) {
	switch v := v.(type) {
	case map[string]any:
		for name, member := range v {
			all = append(all, paths(strings.TrimPrefix(prefix+"."+name, "."), member)...)
		}
	case []any:
		all = paths(prefix+"[]", v[0])
	default:
		all = []string{prefix}
	}
	return all
}

// Fails when a member, a verdict, an exit status, a rating or a note is only in the code or
// only in docs/probe.md.
func TestTheDocumentDescribesTheReport(t *testing.T) {
	file, err := os.ReadFile("../../docs/probe.md")
	if err != nil {
		t.Fatal(err)
	}
	_, verdicts, _ := strings.Cut(string(file), "## Verdicts\n")
	verdicts, members, _ := strings.Cut(verdicts, "## JSON\n")
	members, notes, _ := strings.Cut(members, "### Notes\n")
	rows := func(text string) (all []string) {
		for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(text, -1) {
			all = append(all, m[1])
		}
		slices.Sort(all)
		return all
	}

	report := Report{Server: "x", Results: []Result{Classify(answers(noOther))}}
	report.Results[0].Lifetime = &Lifetime{AtLeast: 1, LessThan: 2}
	text, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	have := append(paths("", v), "results[].other")
	slices.Sort(have)
	if diff := cmp.Diff(have, rows(members)); diff != "" {
		t.Errorf("members (-code +document):\n%s", diff)
	}

	code, err := os.ReadFile("classify.go")
	if err != nil {
		t.Fatal(err)
	}
	have = nil
	for _, m := range regexp.MustCompile(`note\("([a-z_]+)"`).FindAllStringSubmatch(string(code), -1) {
		have = append(have, m[1])
	}
	slices.Sort(have)
	if diff := cmp.Diff(have, rows(notes)); diff != "" {
		t.Errorf("notes (-code +document):\n%s", diff)
	}

	for verdict, m := range meanings {
		if !regexp.MustCompile(fmt.Sprintf("(?m)^\\| `%s` \\|.*\\| %d \\|$", verdict, m.status)).MatchString(verdicts) {
			t.Errorf("no row for %s with status %d", verdict, m.status)
		}
		uses := fmt.Sprintf("(?m)^\\| `%s` \\| %s[^|]* \\| %s \\| %s \\| %s[^|]* \\|$", verdict, m.sip.Rating, m.playstation, m.xbox, m.webrtc.Rating)
		if m.sip.Rating != Unknown && !regexp.MustCompile(uses).MatchString(verdicts) {
			t.Errorf("no row for the uses of %s: %s", verdict, uses)
		}
	}
}
