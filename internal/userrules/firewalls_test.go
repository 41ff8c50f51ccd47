package userrules

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// testdata/firewalls has rulesets like those of many gateways: the rules, the kernel's
// messages about them (.dump), and what the package knows of them (.want). With -update, as
// root, the latter two are written again; then review them.
var update = flag.Bool("update", false, "write testdata/firewalls anew")

const firewallsDir = "testdata/firewalls/"

// A dump has the kernel's messages about rules.
type dump struct {
	NFT    []message // of nftables
	Legacy []legacyTable
}

// A message is a nfnetlink message: its type, without the subsystem, and what follows its
// header.
type message struct {
	Type uint16
	Body []byte
}

// A legacyTable is a table of iptables-legacy, or ip6tables-legacy.
type legacyTable struct {
	Family        byte
	Name          string
	Info, Entries []byte
}

// firewalls calls f for each ruleset, with the kind of its rules: "nft", "iptables" or
// "legacy".
func firewalls(t *testing.T, f func(t *testing.T, name, kind, rules string)) {
	t.Helper()
	files, err := filepath.Glob(firewallsDir + "*.want")
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		files, _ = filepath.Glob(firewallsDir + "*")
	}
	seen := map[string]bool{}
	for _, path := range files {
		name := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
		if seen[name] {
			continue
		}
		seen[name] = true
		for _, kind := range []string{"nft", "iptables", "legacy"} {
			rules, err := os.ReadFile(firewallsDir + name + "." + kind)
			if err != nil {
				continue
			}
			t.Run(name, func(t *testing.T) {
				f(t, name, kind, string(rules))
			})
		}
	}
	if len(seen) < 10 {
		t.Errorf("%d rulesets", len(seen))
	}
}

var (
	handles = regexp.MustCompile(`handle \d+`)
	inside4 = netip.MustParsePrefix("10.47.11.0/24")
	inside6 = netip.MustParsePrefix("2001:db8:47::/64")
)

// report lists what is known of rules.
func report(rs *Ruleset) string {
	var b strings.Builder
	wan, lan := Link{Index: 1 << 20, Name: "wan0"}, Link{Index: 1<<20 + 1, Name: "lan0"}
	line := func(format string, args ...any) {
		b.WriteString(handles.ReplaceAllString(fmt.Sprintf(format, args...), "#") + "\n")
	}
	for _, c := range rs.Chains() {
		line("chain %v: %s, %s %d, drops %v", c, c.Type, c.Hook, c.Priority, c.Drops)
	}
	for _, f := range rs.Forwards([]Link{wan}) {
		what := fmt.Sprint(f.Ports)
		if f.All {
			what = "all"
		}
		if f.Sources != nil {
			what += fmt.Sprint(" from ", f.Sources)
		}
		line("forward of %s to %v, partial %v, unknown %v: %s", what, f.Addrs, f.Partial, f.Unknown, f.Text)
	}
	for _, n := range rs.SourceNAT() {
		line("source NAT from %v by %q to %v, masquerade %v, ports %v, random %v, partial %v, unknown %v: %s",
			n.Sources, n.Links, n.Addrs, n.Masquerade, n.ChoosesPort, n.Random, n.Partial, n.Unknown, n.Text)
	}
	fixed, unknown := rs.FixedSources()
	line("fixed sources %v, others %v", fixed, unknown)
	choosers, err := rs.PortChoosers()
	names := []string{}
	for _, c := range choosers {
		names = append(names, c.Text)
	}
	line("port choosers %q, %v", names, err)
	uplinks, err := rs.Uplinks([]LAN{{Link: lan, Networks: []netip.Prefix{inside4}}, {Link: wan}})
	line("uplinks %q, %v", uplinks, err)
	subnets := []netip.Prefix{inside4, inside6}
	children, err := rs.Children([]Link{wan}, []Link{lan, lan}, subnets)
	for i, v := range children {
		line("children of %v: DNATed %v, most %v; RELATED %v, most %v; by %q", subnets[i], v.DNATed, v.MostDNATed, v.Related, v.MostRelated, v.Dropper().Chain)
	}
	line("children %v", err)
	for _, in := range []Link{lan, {Index: 1<<20 + 2, Name: "guest0"}} {
		blockers, err := rs.Blockers([]Link{wan}, []Link{in, in}, subnets)
		for i, by := range blockers {
			line("hosts of %v behind %s: blocked by %q, in forward %v", subnets[i], in.Name, by.Chain, by.Forward)
		}
		line("hosts %v", err)
	}
	return b.String()
}

// Fails when something in these rulesets is understood differently from what the files say.
// It needs no root.
func TestFirewallsAreUnderstood(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("they were recorded on a little-endian machine")
	}
	firewalls(t, func(t *testing.T, name, _, _ string) {
		d := readDump(t, name)
		want, err := os.ReadFile(firewallsDir + name + ".want")
		if err != nil {
			t.Fatal(err)
		}
		r := newFake(t, d.kernel())
		r.legacy.read = d.legacy
		if diff := cmp.Diff(string(want), report(readFake(t, r))); diff != "" {
			t.Error(diff)
		}
	})
}

// Another kernel, and another nft, may encode the same rules differently. What is known of
// them must be the same.
//
// Fails when a recorded dump means something else than this kernel's messages about the
// rules.
func TestFirewallsAreWhatTheKernelSays(t *testing.T) {
	firewalls(t, func(t *testing.T, name, kind, rules string) {
		t.Parallel()
		l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
		var err error
		switch kind {
		case "nft":
			err = l.NFT(rules)
		case "iptables":
			err = l.IPTables(lab.IPTablesNFT, rules)
		case "legacy":
			err = l.IPTables(lab.IPTablesLegacy, rules)
		}
		// Debian's kernels, in guests, have all that they need.
		if err != nil && strings.Contains(err.Error(), "No such file or directory") && os.Getenv("CONENATD_GUEST") == "" {
			t.Skipf("this kernel lacks what these rules need: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		r := NewReader(Config{NetNS: l.Gateway.FD()})
		defer func() { _ = r.Close() }()
		got := report(readFake(t, r))
		if *update {
			record(t, r, name)
			if err := os.WriteFile(firewallsDir+name+".want", []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(firewallsDir + name + ".want")
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Error(diff)
		}
	})
}

// record writes the kernel's messages.
func record(t *testing.T, r *Reader, name string) {
	t.Helper()
	var d dump
	note := func(typ uint16) func(body []byte) {
		return func(body []byte) { d.NFT = append(d.NFT, message{typ, bytes.Clone(body)}) }
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range []struct{ asked, told uint16 }{
		{unix.NFT_MSG_GETTABLE, unix.NFT_MSG_NEWTABLE},
		{unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_NEWCHAIN},
		{unix.NFT_MSG_GETRULE, unix.NFT_MSG_NEWRULE},
		{unix.NFT_MSG_GETSET, unix.NFT_MSG_NEWSET},
	} {
		check(r.ask(kind.asked, unix.NLM_F_DUMP, unix.AF_UNSPEC, func(*nfnl.Encoder) {}, note(kind.told)))
	}
	for _, m := range slices.Clone(d.NFT) {
		if m.Type == unix.NFT_MSG_NEWSET {
			table, set := namesIn(m.Type, m.Body)
			check(r.ask(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, m.Body[0], func(e *nfnl.Encoder) {
				e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, table)
				e.Str(unix.NFTA_SET_ELEM_LIST_SET, set)
			}, note(unix.NFT_MSG_NEWSETELEM)))
		}
	}
	for _, f := range []*legacyFamily{legacy4, legacy6} {
		tables, hidden, err := r.legacy.read(f)
		check(err)
		if len(hidden) > 0 {
			t.Fatal(hidden)
		}
		for _, x := range tables {
			check(x.err)
			d.Legacy = append(d.Legacy, legacyTable{f.number, x.name, x.info, x.entries})
		}
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	check(errors.Join(gob.NewEncoder(z).Encode(d), z.Close(), os.WriteFile(firewallsDir+name+".dump", b.Bytes(), 0o644)))
}

func readDump(t testing.TB, name string) (d dump) {
	t.Helper()
	b, err := os.ReadFile(firewallsDir + name + ".dump")
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if err := gob.NewDecoder(z).Decode(&d); err != nil {
		t.Fatal(err)
	}
	return d
}

// kernel returns a fake kernel with the recorded messages of nftables.
func (d *dump) kernel() *fakeKernel {
	k := &fakeKernel{}
	for _, m := range d.NFT {
		k.objects = append(k.objects, newObject(m.Type, m.Body))
	}
	return k
}

// legacy returns the recorded tables of iptables-legacy.
func (d *dump) legacy(f *legacyFamily) (tables []rawLegacy, hidden []string, err error) {
	for _, x := range d.Legacy {
		if x.Family == f.number {
			tables = append(tables, rawLegacy{family: f, name: x.Name, info: x.Info, entries: x.Entries})
		}
	}
	return tables, nil, nil
}

// Guests with other kernels run only the tests that read these rulesets, and those of the Reader.
//
// Fails when the decoder learns an expression that no ruleset has.
func TestFirewallsHaveEveryExpression(t *testing.T) {
	lacks := map[string]string{
		"queue":        "the kernel that recorded them has no NFQUEUE of nftables",
		"flow_offload": "that kernel has no flowtables",
	}
	all := map[string]bool{}
	element := func(typ uint16, b []byte) {
		if typ == unix.NFTA_EXPR_NAME {
			all[nfnl.Text(b)] = true
		}
	}
	firewalls(t, func(t *testing.T, name, _, _ string) {
		for _, m := range readDump(t, name).NFT {
			if m.Type != unix.NFT_MSG_NEWRULE {
				continue
			}
			nfnl.Attributes(m.Body[nfnl.FamilyHeaderLen:], func(typ uint16, b []byte) {
				if typ == unix.NFTA_RULE_EXPRESSIONS {
					nfnl.Attributes(b, func(_ uint16, b []byte) { nfnl.Attributes(b, element) })
				}
			})
		}
	})
	for name := range expressions {
		e, err := expression(unix.NFPROTO_IPV4, name, nil)
		if known := e != nil || err != nil; known && lacks[name] == "" && !all[name] {
			t.Errorf("no ruleset in %s has %s", firewallsDir, name)
		}
	}
}
