package stage

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Fails when a test is skipped whose daemon differs from that of another run, or runs once more
// with the same daemon.
func TestOnlyTheWholeModeIsOverridden(t *testing.T) {
	for _, tt := range []struct {
		args, mode []string
		want       bool
	}{
		{Expect, nil, false},
		{Expect, NFT, true},
		{[]string{"--backend", "nft"}, Expect, true},
		{[]string{"--reconcile=1s"}, NFT, false},
		{[]string{"--backends=1"}, NFT, false},
		{NFT, NFTByEvent, false},
		{Auto, NFTByEvent, false},
		{AutoByEvent, NFTByEvent, true},
		{Expect, NFTByEvent, true},
	} {
		if got := overrides(slices.Concat([]string{"--subnet=10.47.11.0/24"}, tt.args), tt.mode); got != tt.want {
			t.Errorf("%q in the mode %q: %v", tt.args, tt.mode, got)
		}
	}
}

// Fails when tests that the Makefile selects by the beginning of their names get other names, and so
// would no longer run in lean mode, or run in each mode.
func TestSelectedTestsExist(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("../*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var tests []string
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^func Test(\w+)`).FindAllStringSubmatch(string(text), -1) {
			tests = append(tests, m[1])
		}
	}
	for _, name := range []string{"OWN_MODES", "LEAN"} {
		list := regexp.MustCompile(`(?m)^` + name + ` = \^Test\((.*)\)$`).FindStringSubmatch(string(makefile))
		if list == nil {
			t.Errorf("the Makefile has no %s", name)
			continue
		}
		for _, begin := range strings.Split(list[1], "|") {
			if !slices.ContainsFunc(tests, func(test string) bool { return strings.HasPrefix(test, begin) }) {
				t.Errorf("%s: no test is named Test%s...", name, begin)
			}
		}
	}
}
