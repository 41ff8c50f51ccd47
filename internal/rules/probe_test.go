package rules

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

// An expression with a key that no kernel knows stands for an expression that is missing.
func TestProbeFindsWhatIsMissingAndChangesNothing(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	table, err := Open(Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()

	for _, key := range []expr.SocketKey{expr.SocketKeyWildcard, 99} {
		layouts, err := newLayouts("conenat_probe", Desired{Subnets: tryPrefixes, Guard: true, Map: &MapConfig{Size: 1}})
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range layouts {
			for _, r := range l.rules {
				for i, e := range r.Exprs {
					if _, ok := e.(*expr.Socket); ok {
						r.Exprs = slices.Clone(r.Exprs)
						r.Exprs[i] = &expr.Socket{Key: key, Register: register(0)}
					}
				}
			}
		}
		if err := table.tryLayouts(0, layouts); errors.Is(err, unix.EOPNOTSUPP) != (key == 99) {
			t.Errorf("key %d: %v", key, err)
		}
	}
	if got, err := l.Ruleset(); got != "" || err != nil {
		t.Error(got, err)
	}
}

func TestMissingFeaturesAreLeftOut(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	table, err := Open(Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	for i := range features {
		if features[i].Feature != FeatureTable {
			table.missing = append(table.missing, &features[i].UnsupportedError)
		}
	}
	if _, err := table.Set(Desired{Subnets: tryPrefixes, Guard: true, Spoofed: true, Helpers: tryHelpers, MaxChildren: 7, Map: &MapConfig{Size: 1}, Mapping: &tryMapping, UplinkMarks: &UplinkMarks{Mask: 1}, Quiet: true}); err != nil {
		t.Fatal(err)
	}
	got, err := l.Ruleset()
	if err != nil || !strings.Contains(got, "th dport 0") {
		t.Error(got, err)
	}
	for _, name := range []string{"chain guard", "chain no_way_back_outside", "set children", "permissions", "mappings", "uplink", "quiet"} {
		if strings.Contains(got, name) {
			t.Error(got)
		}
	}
	for _, m := range table.missing {
		if !strings.Contains(m.Error(), "not supported: load the module") {
			t.Error(m)
		}
	}
}

// Fails when a kernel without NAT chains, where expectations alone work, refuses the tables for "quiet".
func TestQuietIsLeftOutWithoutItsFeature(t *testing.T) {
	var all, none Tables
	for i := range features {
		none.missing = append(none.missing, &features[i].UnsupportedError)
	}
	if d := (Desired{Quiet: true}); !all.possible(d).Quiet || none.possible(d).Quiet {
		t.Errorf("quiet: %v with all features, %v without", all.possible(d).Quiet, none.possible(d).Quiet)
	}
}

// Features that only some kernels have are in the probe's rules. Fails when the probe has
// no links.
func TestProbeTriesWhatMappingsNeed(t *testing.T) {
	ls, err := new(Tables).tried(Desired{Mapping: &tryMapping})
	if err != nil {
		t.Fatal(err)
	}
	tried := map[string]bool{}
	for _, l := range ls {
		for _, r := range l.rules {
			for _, e := range r.Exprs {
				tried[fmt.Sprintf("%T", e)] = true
			}
		}
	}
	for _, e := range []expr.Any{&expr.Payload{}, &expr.NAT{}, &expr.Dynset{}, &expr.Lookup{}, &expr.Socket{}} {
		if name := fmt.Sprintf("%T", e); !tried[name] {
			t.Errorf("%s is not tried", name)
		}
	}
}

// Fails when a kernel without route lookups (CONFIG_NFT_FIB) seems to lack what works there
// without them.
func TestProbeTriesRouteLookupsByThemselves(t *testing.T) {
	for _, f := range features {
		switch f.Feature {
		case FeatureSpoofed, FeatureWayBack, FeaturePartial:
			continue
		}
		ls, err := new(Tables).tried(f.try)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range ls {
			for _, r := range l.rules {
				if slices.ContainsFunc(r.Exprs, func(e expr.Any) bool { _, is := e.(*expr.Fib); return is }) {
					t.Errorf("%s: a rule of chain %s looks up a route", f.Feature, r.Chain.Name)
				}
			}
		}
	}
}

// A kernel without IPsec has no policies to test; mappings work without the test.
func TestMappingsWithoutIPsec(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	table, err := Open(Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if table.noIPsec {
		t.Error("a kernel with IPsec is taken for one without")
	}
	for _, none := range []bool{false, true} {
		table.noIPsec = none
		if _, err := table.Set(Desired{OutsideLinks: []string{"wan0"}, Mapping: &MappingConfig{Pools: []Pool{{Ports: cone.PortRanges{{First: 50000, Last: 50999}}}}, Lifetime: time.Minute, Size: 10}}); err != nil {
			t.Fatal(err)
		}
		if got, err := l.Ruleset(); err != nil || strings.Contains(got, "rt ipsec missing") == none || !strings.Contains(got, "chain map_source") {
			t.Error(got, err)
		}
	}
}

// A kernel without random numbers (CONFIG_NFT_NUMGEN) learns as others do: each packet without
// an answer meets all rules.
func TestLearningWithoutRandomNumbers(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	table, err := Open(Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if table.noNumgen {
		t.Error("a kernel with random numbers is taken for one without")
	}
	for _, none := range []bool{false, true} {
		table.noNumgen = none
		if _, err := table.Set(Desired{OutsideLinks: []string{"wan0"}, Map: &tryLearning}); err != nil {
			t.Fatal(err)
		}
		if got, err := l.Ruleset(); err != nil || strings.Contains(got, "numgen") == none || !strings.Contains(got, "add @repeaters") {
			t.Error(got, err)
		}
	}
}

// A kernel that cannot count flows (CONFIG_NFT_CONNLIMIT) limits how many children begin in a time.
func TestChildrenAreLimitedWithoutACount(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	table, err := Open(Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if table.noCount {
		t.Error("a kernel that can count is taken for one that cannot")
	}
	for _, none := range []bool{false, true} {
		table.noCount = none
		if _, err := table.Set(Desired{OutsideLinks: []string{"wan0"}, Map: &tryLearning}); err != nil {
			t.Fatal(err)
		}
		if got, err := l.Ruleset(); err != nil || strings.Contains(got, "ct count") == none || !strings.Contains(got, "update @buckets_1") {
			t.Error(got, err)
		}
	}
}
