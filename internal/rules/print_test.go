package rules_test

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

var update = flag.Bool("update", false, "write the golden files")

// printed are kinds of tables whose text testdata/tables keeps, in nft's syntax.
func printed() map[string]rules.Desired {
	all := map[string]rules.Desired{
		"mapping": mapping,
		"hairpin": hairpinning,
		"mapping without a pool": withMapping(func(_ *rules.Desired, m *rules.MappingConfig) {
			m.Pools = nil
		}),
		"mapping of two subnets by two links": withMapping(func(d *rules.Desired, m *rules.MappingConfig) {
			d.OutsideLinks = []string{"wan0", "ppp 0"}
			m.Subnets = append(slices.Clone(m.Subnets), netip.MustParsePrefix("192.168.7.0/24"))
			m.Exempt, m.Hairpin = append(slices.Clone(m.Exempt), m.Subnets[1]), m.Subnets
			m.Pools = []rules.Pool{{Subnets: m.Subnets, Ports: m.Pools[0].Ports}}
		}),
		"mapping with a pool of its own for each subnet": withMapping(func(_ *rules.Desired, m *rules.MappingConfig) {
			other := netip.MustParsePrefix("192.168.7.0/24")
			m.Subnets = append(slices.Clone(m.Subnets), other)
			m.Pools = append(slices.Clone(m.Pools), rules.Pool{Subnets: m.Subnets[1:], Ports: cone.PortRanges{{First: 7472, Last: 7487}, {First: 11567, Last: 11567}}})
			m.Hairpin = m.Subnets[:1]
			m.Choosers = map[string][]netip.Prefix{"wan0": {netip.MustParsePrefix("10.47.11.109/32")}}
		}),
		"mapping with ports by rules of the user's": withMapping(func(_ *rules.Desired, m *rules.MappingConfig) {
			m.Hairpin, m.Choosers = m.Subnets, map[string][]netip.Prefix{"wan0": m.Subnets}
		}),
		"mapping where hosts have different addresses": withMapping(func(_ *rules.Desired, m *rules.MappingConfig) {
			m.Hairpin, m.Differ = m.Subnets, []string{"wan0"}
		}),
		"ports that rules take": desired(func(d *rules.Desired, _ *rules.MapConfig) {
			d.Diverted = []rules.Diversion{
				{Ports: cone.PortRanges{{First: 5060, Last: 5060}, {First: 5070, Last: 5071}}},
				{
					Hosts: addrs("10.47.11.110-10.47.11.110", "2001:db8:1::-2001:db8:1::ffff:ffff:ffff:ffff"),
					Peers: addrs("203.0.113.0-203.0.113.7", "2001:db8::5-2001:db8::5"),
					Ports: cone.PortRanges{{First: 53, Last: 53}},
				},
				{Peers: addrs("::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), Ports: cone.PortRanges{{First: 853, Last: 853}}},
				{Hosts: addrs("10.47.11.111-10.47.11.112"), Peers: addrs("203.0.113.0-203.0.113.7", "2001:db8::5-2001:db8::5"), Ports: cone.PortRanges{{First: 54, Last: 54}}},
			}
		}),
		"IPv4 alone": desired(func(d *rules.Desired, _ *rules.MapConfig) { d.Subnets = d.Subnets[:1] }),
		"IPv6 alone": {OutsideLinks: []string{"wan0"}, Subnets: both[1:], Guard: true, Spoofed: true, Helpers: onAnchors, MaxChildren: 256},
		"the gateway itself": desired(func(d *rules.Desired, _ *rules.MapConfig) {
			d.Subnets, d.Map, d.Self, d.Helped = d.Subnets[:1], nil, true, true
		}),
		"the gateway itself and uplink marks": desired(func(d *rules.Desired, _ *rules.MapConfig) {
			d.Self, d.UplinkMarks = true, &rules.UplinkMarks{Mask: 0xff, Links: d.OutsideLinks}
		}),
		"everything": desired(func(d *rules.Desired, _ *rules.MapConfig) {
			d.Mapping, d.Published = hairpinning.Mapping, addrs("192.0.2.66-192.0.2.66", "2001:db8:66::-2001:db8:66::3")
		}),
	}
	for name, change := range features {
		all[name] = desired(change)
	}
	return all
}

// Fails when a rule, a set or a chain changes. The golden file, which -update writes, shows
// what changes for users.
func TestTablesArePrinted(t *testing.T) {
	for name, d := range printed() {
		t.Run(name, func(t *testing.T) {
			got, err := rules.Text("conenat", d)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", "tables", strings.ReplaceAll(name, " ", "_")+".nft")
			if *update {
				check(t, os.WriteFile(file, []byte(got), 0o644))
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Fails when the printed text differs from the kernel's table: a word with another meaning
// in nft, a register that is read wrong, a set that is missing.
func TestNFTListsWhatIsPrinted(t *testing.T) {
	for name, d := range printed() {
		t.Run(name, func(t *testing.T) {
			l, copied := lab.ForTest(t, lab.Options{Rules: lab.NoRules}), lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			set(t, open(t, l), d)
			text, err := rules.Text("conenat", d)
			if err != nil {
				t.Fatal(err)
			}
			list := output(t, l, "nft", "--stateless", "list", "ruleset")
			if diff := cmp.Diff(normal(list), normal(text)); diff != "" {
				t.Errorf("nft lists other rules:\n%s", diff)
			}
			file := filepath.Join(t.TempDir(), "printed.nft")
			check(t, os.WriteFile(file, []byte(text), 0o600))
			output(t, copied, "nft", "-c", "-f", file)
			output(t, copied, "nft", "-f", file)
			loaded := output(t, copied, "nft", "--stateless", "list", "ruleset")
			if diff := cmp.Diff(listed(list), listed(loaded)); diff != "" {
				t.Errorf("nft loads other rules:\n%s", diff)
			}
		})
	}
}

var (
	tableList   = regexp.MustCompile(`(?ms)^table (\S+ \S+) \{\n(.*?)^\}$`)
	elementList = regexp.MustCompile(`(?s)elements = \{(.*?)\}`)
	signOfLife  = regexp.MustCompile(`\t\telements = \{ udp \}\n`) // a file has none
	implied     = regexp.MustCompile(`meta (l4proto udp|nfproto ipv[46]) `)
)

// listed returns the sections of the tables in a listing, in a fixed order, without the
// flags of the tables.
func listed(list string) (all []string) {
	list = elementList.ReplaceAllStringFunc(signOfLife.ReplaceAllString(flags.ReplaceAllString(list, ""), ""), func(s string) string {
		es := strings.Split(elementList.FindStringSubmatch(s)[1], ",")
		for i := range es {
			es[i] = strings.TrimSpace(es[i])
		}
		slices.Sort(es)
		return "elements = { " + strings.Join(es, ", ") + " }"
	})
	for _, table := range tableList.FindAllStringSubmatch(list, -1) {
		for _, section := range sections(table[2]) {
			all = append(all, table[1]+" "+section)
		}
	}
	slices.Sort(all)
	return all
}

// normal is listed without the things that some versions of nft omit: tests for a protocol
// that the next expression implies, and the default burst.
func normal(list string) []string {
	return listed(strings.ReplaceAll(implied.ReplaceAllString(list, ""), " burst 5 packets", ""))
}

// addrs returns the ranges "first-last".
func addrs(all ...string) (ranges cone.AddrRanges) {
	for _, s := range all {
		first, last, _ := strings.Cut(s, "-")
		ranges = append(ranges, cone.AddrRange{First: netip.MustParseAddr(first), Last: netip.MustParseAddr(last)})
	}
	return ranges
}
