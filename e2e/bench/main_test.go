package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// Fails when bad flags are accepted, or the message does not name the flag.
func TestBadFlagsAreNamed(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ args, about string }{
		{"-tables ax", "-tables"},
		{"-tables f", "-tables"},
		{"-sizes 0", "-sizes"},
		{"-sizes 1,x", "-sizes"},
		{"-start-flows 2000000", "-start-flows"},
		{"-flows 8001", "-flows"},
		{"-rounds 0", "-rounds"},
		{"-exe /nowhere", "-exe"},
		{"b", `"b"`},
	} {
		args := append([]string{"-exe", self}, strings.Fields(test.args)...)
		if _, err := parse(args, io.Discard); err == nil || !strings.Contains(err.Error(), test.about) {
			t.Errorf("%s: %v", test.args, err)
		}
	}
	o, err := parse([]string{"-exe", self, "-sizes", "100,1"}, io.Discard)
	if err != nil || !slices.Equal(o.sizes, []int{1, 100}) || o.tables != "abcdehf" {
		t.Errorf("%+v (%v)", o, err)
	}
}

// Fails when a chart is missing, or the page does not say that it was disturbed.
func TestPageHasAChartForEachTable(t *testing.T) {
	for _, disturbed := range []bool{false, true} {
		o := &options{out: filepath.Join(t.TempDir(), "bench.md"), rounds: 9, disturbed: disturbed}
		if err := o.write([]*table{sample()}); err != nil {
			t.Fatal(err)
		}
		page, err := os.ReadFile(o.out)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(filepath.Dir(o.out), "bench-x.svg")); err != nil || !strings.Contains(string(page), "(bench-x.svg)") {
			t.Errorf("no chart (%v)", err)
		}
		if strings.Contains(string(page), "isturbed") != disturbed || strings.Contains(string(page), "Nobody else on") == disturbed {
			t.Errorf("disturbed: %v, and the page is\n%s", disturbed, page)
		}
	}
	if err := new(options).write(nil); err == nil {
		t.Error("it writes a page without tables")
	}
}

// Fails when a gateway outlives a failed preparation, or an interrupt.
func TestGatewaysAreRemovedAfterAnError(t *testing.T) {
	lab.ForTest(t, lab.Options{}) // skips without privilege
	broken := errors.New("broken")
	for name, o := range map[string]*options{
		"preparation": {log: io.Discard, stopped: func() error { return nil }},
		"interrupt":   {log: io.Discard},
	} {
		var made []*gateway
		if o.stopped == nil {
			o.stopped = func() error {
				if len(made) > 1 {
					return broken
				}
				return nil
			}
		}
		_, done, err := o.gateways(named(stock, stockAgain, handAlone), func(g *gateway) error {
			made = append(made, g)
			if name == "preparation" && len(made) == 2 {
				return broken
			}
			return nil
		})
		done()
		if !errors.Is(err, broken) || len(made) != 2 {
			t.Errorf("%s: %d gateways, then %v", name, len(made), err)
		}
		for _, g := range made {
			if fd := g.Gateway.FD(); fd != -1 {
				t.Errorf("%s: %s is still there", name, g.name)
			}
		}
	}
}

// Fails when a part is not in conenatd's tables any more, or more than the part is cut out.
func TestPartsAreInTheTables(t *testing.T) {
	text, err := os.ReadFile("../../internal/rules/testdata/tables/map_alone.nft")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range partsOf {
		cut, err := p.cut(string(text))
		if err != nil {
			t.Error(err)
			continue
		}
		for chain := range strings.FieldsSeq("way_back before_conntrack admit learn guard") {
			gone := slices.Contains(strings.Fields(p.hook), chain)
			if strings.Contains(cut, "\tchain "+chain+" {") == gone {
				t.Errorf("%s: chain %s: want gone %v", p.name, chain, gone)
			}
		}
		if p.name != allParts.name && strings.Count(cut, "\n") > strings.Count(string(text), "\n") {
			t.Errorf("%s: nothing was cut", p.name)
		}
		if strings.Count(cut, "{") != strings.Count(cut, "}") {
			t.Errorf("%s: a chain is cut in two:\n%s", p.name, cut)
		}
	}
	if _, err := (part{name: "other", rules: []string{"@nowhere"}}).cut(string(text)); err == nil {
		t.Error("a part that is not there was cut out")
	}
}
