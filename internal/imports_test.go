// Package internal_test checks the direction of the imports between the project's
// packages.
package internal_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/conenatd/conenatd/"

// allowed lists, for each package, the packages of the project that its non-test files
// may import.
var allowed = map[string][]string{
	"internal/audit":                 {"internal/cone", "internal/episodes", "internal/watch"},
	"internal/budget":                nil,
	"internal/cone":                  nil,
	"internal/config":                {"internal/cone"},
	"internal/control":               nil,
	"internal/docs":                  nil,
	"internal/evidence":              nil,
	"internal/episodes":              {"internal/control"},
	"internal/episodes/episodestest": nil,
	"internal/handover":              {"internal/cone", "internal/control", "internal/rules/elements"},
	"internal/histogram":             nil,
	"internal/lab":                   nil,
	"internal/metrics":               {"internal/control"},
	"internal/nfnl":                  {"internal/cone"},
	"internal/page":                  {"internal/control", "internal/doctor"},
	"internal/logs":                  {"internal/config"},
	"internal/portpool":              {"internal/cone", "internal/config"},
	"internal/probe":                 {"internal/text"},
	"internal/reference":             {"internal/config", "internal/text"},
	"internal/sandbox":               nil,
	"internal/text":                  nil,
	"internal/watch":                 {"internal/cone"},
	"internal/top":                   {"internal/control", "internal/doctor"},
	"internal/gateway":               {"internal/cone", "internal/nfnl"},
	"internal/ctwatch":               {"internal/cone", "internal/nfnl"},
	"internal/engine":                {"internal/cone"},
	"internal/flows":                 {"internal/cone", "internal/ctwatch", "internal/gateway", "internal/userrules"},
	"internal/expect":                {"internal/cone", "internal/nfnl"},
	"internal/rules":                 {"internal/cone", "internal/nfnl", "internal/rules/elements"},
	"internal/rules/elements":        {"internal/cone", "internal/nfnl"},
	"internal/userrules":             {"internal/cone", "internal/nfnl"},
	"internal/mapping":               {"internal/cone", "internal/flows", "internal/gateway", "internal/rules/elements", "internal/userrules"},
	"internal/nfnl/nfnltest":         {"internal/nfnl"},
	"internal/rules/rulestest":       {"internal/lab", "internal/rules"},
	"internal/cone/conetest":         nil,
	"internal/demo":                  {"internal/lab"},
	"internal/doctor":                {"internal/control", "internal/text"},
	"internal/doctor/collect":        {"internal/cone", "internal/config", "internal/control", "internal/doctor", "internal/gateway", "internal/rules", "internal/userrules"},
	"internal/selftest":              {"internal/control", "internal/lab"},
	"internal/daemon": {
		"internal/audit", "internal/budget", "internal/cone", "internal/config", "internal/control", "internal/ctwatch", "internal/engine", "internal/episodes", "internal/evidence", "internal/expect", "internal/flows", "internal/gateway", "internal/handover", "internal/histogram", "internal/mapping", "internal/metrics", "internal/page", "internal/portpool", "internal/rules",
		"internal/rules/elements", "internal/userrules", "internal/watch",
	},
	"cmd/conenatd": {
		"internal/config", "internal/control", "internal/daemon", "internal/demo", "internal/doctor", "internal/doctor/collect",
		"internal/gateway", "internal/logs", "internal/portpool", "internal/probe", "internal/sandbox", "internal/selftest", "internal/top",
	},
}

// users lists the packages that may import a library, so that only they bear its cost
// and its limits of portability.
var users = map[string][]string{
	"github.com/google/nftables":    {"internal/rules", "internal/userrules"},
	"github.com/cpuguy83/go-md2man": {"internal/reference"},
	"github.com/pion/stun":          {"internal/probe"},
	"github.com/gdamore/tcell":      {"internal/top"},
}

// runners are the packages that may start other programs; the daemon starts none.
var runners = []string{"internal/lab", "internal/demo", "internal/selftest"}

// Fails, for example, when cone imports gateway, or when elements imports
// google/nftables.
func TestImportsPointOneWay(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports", "../internal/...", "../cmd/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for in := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := in.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, module)
		if name == "internal" {
			continue // the package of this test
		}
		seen++
		may, known := allowed[name]
		if !known {
			t.Errorf("%s: not in the picture of docs/architecture.md, nor here", name)
		}
		for _, i := range p.Imports {
			if i, ours := strings.CutPrefix(i, module); ours && !slices.Contains(may, i) {
				t.Errorf("%s imports %s", name, i)
			}
			for library, by := range users {
				if (i == library || strings.HasPrefix(i, library+"/")) && !slices.Contains(by, name) {
					t.Errorf("%s imports %s", name, i)
				}
			}
			if i == "os/exec" && !slices.Contains(runners, name) {
				t.Errorf("%s may start other programs", name)
			}
		}
	}
	if seen != len(allowed) {
		t.Errorf("%d packages, %d are known", seen, len(allowed))
	}
}
