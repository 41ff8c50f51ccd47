package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// knownSeries returns the names of the series that docs/metrics.md describes.
func knownSeries(t *testing.T) map[string]bool {
	t.Helper()
	text, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (\\w+) \\|").FindAllStringSubmatch(string(text), -1) {
		all[m[1]] = true
		if m[2] == "histogram" {
			all[m[1]+"_bucket"] = true
		}
	}
	return all
}

var series = regexp.MustCompile(`\bconenatd_\w+`)

// Fails when an alert has a metric that does not exist, or does not fire when it should.
func TestAlertsFire(t *testing.T) {
	tool := promtool(t)
	for _, args := range [][]string{{"check", "rules", "conenatd.rules.yml"}, {"test", "rules", "conenatd.rules.test.yml"}} {
		cmd := exec.CommandContext(t.Context(), tool, args...)
		cmd.Dir = "../deploy/prometheus"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %q: %v\n%s", args, err, out)
		}
	}
	known := knownSeries(t)
	for _, file := range []string{"conenatd.rules.yml", "conenatd.rules.test.yml"} {
		text, err := os.ReadFile(filepath.Join("../deploy/prometheus", file))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range series.FindAllString(string(text), -1) {
			if !known[name] {
				t.Errorf("%s: %s is no metric", file, name)
			}
		}
	}
}

// Fails when a query of the dashboard is no PromQL, or has a metric that does not exist.
func TestDashboardQueriesMetricsThatExist(t *testing.T) {
	text, err := os.ReadFile("../deploy/grafana/conenatd.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	known, rules, queries := knownSeries(t), "groups:\n- name: dashboard\n  rules:\n", 0
	for _, p := range dashboard.Panels {
		for _, q := range p.Targets {
			names := series.FindAllString(q.Expr, -1)
			if len(names) == 0 {
				t.Errorf("%s: %s has no metric", p.Title, q.Expr)
			}
			for _, name := range names {
				if !known[name] {
					t.Errorf("%s: %s is no metric", p.Title, name)
				}
			}
			queries++ // a JSON string is a YAML string
			expr, err := json.Marshal(strings.NewReplacer("$__rate_interval", "5m", "$instance", "gw").Replace(q.Expr))
			if err != nil {
				t.Fatal(err)
			}
			rules += fmt.Sprintf("  - {record: q%d, expr: %s}\n", queries, expr)
		}
	}
	file := filepath.Join(t.TempDir(), "rules.yml")
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), promtool(t), "check", "rules", file).CombinedOutput()
	if err != nil || queries == 0 {
		t.Errorf("promtool check rules: %v\n%s", err, out)
	}
}
