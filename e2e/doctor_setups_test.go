package e2e

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/doctor"
)

var update = flag.Bool("update", false, "write the table of docs/results/doctor.md")

const setupsPage = "../docs/results/doctor.md"

// A setup is a gateway of somebody else, as a row of docs/results/gateways.md has it.
type setup struct {
	row, what string
	cause     string // of what does not work; empty if all works
	fault            // how to build it
	bare      bool   // no daemon runs
	// plays makes packets meet the cause, or shows that all works; nil: a peer's other port
	// reaches the host, unless lost is set.
	plays func(p *patient)
	// finds are the findings without which doctor would not name the cause, or notes.
	finds []string
}

// doctor names the cause of what does not work on these gateways, before the user mends
// anything, and finds nothing else. Where it names none, a peer reaches the host from another
// port, and a stranger does not. The table of the page is what this test sees (-update).
//
// Fails when doctor keeps silent where packets are lost, when it has a finding too many, and
// when the page says something else.
func TestDoctorNamesTheCause(t *testing.T) {
	stage.OfTheDaemon(t)
	ownMode(t)
	rows := make([]string, len(setups))
	t.Cleanup(func() { compareSetups(t, rows) })
	for i, tt := range setups {
		t.Run(tt.row+" "+tt.what, func(t *testing.T) {
			t.Parallel() // mostly it waits
			rows[i] = tt.diagnosed(t)
		})
	}
}

// diagnosed plays the set-up and returns its row of the table.
func (tt setup) diagnosed(t *testing.T) string {
	p := &patient{newScene(t, tt.options), tt.fault, filepath.Join(t.TempDir(), "conenatd.toml")}
	if tt.set != nil {
		tt.set(p.scene)
	}
	if p.write(); !tt.bare {
		p.Start("--config", p.config)
	}
	if tt.later != nil {
		tt.later(p.scene)
	}
	switch {
	case tt.plays != nil:
		tt.plays(p)
	case !tt.bare:
		p.reaches(5060, !tt.lost)
	}
	var found []doctor.Finding
	var looks []string
	seen := func() bool {
		found = p.doctor().Findings
		found = slices.DeleteFunc(found, func(f doctor.Finding) bool { return f.ID == "expectations_few" }) // the machine's
		if look := fmt.Sprintf("%+v", found); !slices.Contains(looks, look) {
			looks = append(looks, look)
		}
		return slices.Equal(idsOf(found), tt.finds)
	}
	if tt.bare {
		if !seen() {
			t.Fatalf("doctor finds %+v, want %q", found, tt.finds)
		}
	} else {
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("doctor found:\n%s", strings.Join(looks, "\n"))
			}
		})
		p.readAgain()
		p.Until("doctor finds "+strings.Join(tt.finds, ", ")+" alone", seen)
	}
	out, _ := p.CLI("doctor", "--config", p.config)
	for _, f := range found {
		if !strings.Contains(out, f.ID) {
			t.Errorf("the text lacks %s:\n%s", f.ID, out)
		}
		for _, l := range f.Fix {
			if !strings.Contains(out, l.Line+"\n") {
				t.Errorf("the text lacks %q:\n%s", l.Line, out)
			}
		}
	}
	return tt.text(found)
}

func idsOf(findings []doctor.Finding) (ids []string) {
	for _, f := range findings {
		ids = append(ids, f.ID)
	}
	return ids
}

// text is a row of the page.
func (tt setup) text(found []doctor.Finding) string {
	cause, says, lines := tt.cause, "none: conenatd works there", ""
	if cause == "" {
		cause = "none"
	}
	for i, f := range found {
		if i == 0 {
			says = ""
		} else {
			says += ", "
		}
		says += fmt.Sprintf("`%s` (%s)", f.ID, f.Severity)
		for _, l := range f.Fix {
			if lines != "" {
				lines += "<br>"
			}
			lines += "`" + strings.ReplaceAll(l.Line, "|", "\\|") + "`"
			if l.In != doctor.Shell {
				lines += " in " + string(l.In)
			}
		}
	}
	return fmt.Sprintf("| %s | %s | %s | %s | %s |\n", tt.row, tt.what, cause, says, lines)
}

// compareSetups compares rows with those of the page, or writes them there. Empty rows were not
// played.
func compareSetups(t *testing.T, rows []string) {
	page, err := os.ReadFile(setupsPage)
	if err != nil {
		t.Fatal(err)
	}
	const head = "|---|---|---|---|---|\n"
	above, table, _ := strings.Cut(string(page), head)
	table, _, _ = strings.Cut(table, "\n\n")
	switch {
	case *update && !t.Failed() && !slices.Contains(rows, ""):
		if err := os.WriteFile(setupsPage, []byte(above+head+strings.Join(rows, "")), 0o644); err != nil {
			t.Fatal(err)
		}
	case len(slices.Collect(strings.Lines(table))) != len(rows):
		t.Errorf("%s has other rows than the test: run it with -update", setupsPage)
	default:
		for _, row := range rows {
			if !strings.Contains(table, row) {
				t.Errorf("%s lacks the row\n%s", setupsPage, row)
			}
		}
	}
}
