package doctor

import (
	"cmp"
	"slices"
)

// A Severity says how bad a finding is.
type Severity string

// The severities. Only the first two count for the exit status.
const (
	Error   Severity = "error"   // something that the user configured does not work
	Warning Severity = "warning" // something works only in part, or not for long
	Note    Severity = "note"    // good to know
)

func (s Severity) rank() int { return slices.Index([]Severity{Note, Warning, Error}, s) }

// A Report is what "conenatd doctor --json" prints (docs/doctor.md).
type Report struct {
	Daemon   bool      `json:"daemon"`   // a daemon runs
	Firewall Firewall  `json:"firewall"` // whose language the lines have
	Findings []Finding `json:"findings"` // the worst first
	// NotChecked are the findings of which nothing is known.
	NotChecked []NotChecked `json:"not_checked"`
}

// A Finding is one thing that is wrong, or good to know.
type Finding struct {
	ID       string   `json:"id"`
	About    string   `json:"about,omitempty"` // which link, subnet or rule, if there may be several
	Severity Severity `json:"severity"`
	What     string   `json:"what"`
	Why      string   `json:"why"` // why it matters
	Fix      []Line   `json:"fix"` // all of these lines repair it; there may be none
	Keep     string   `json:"keep,omitempty"`
}

// A Line is a line to run or to write.
type Line struct {
	In   Place  `json:"in"`
	Line string `json:"line"`
}

// A Place says where a Line belongs.
type Place string

// The places.
const (
	Shell   Place = "shell"                     // run it as root
	File    Place = "conenatd.toml"             // at the top of the configuration; then "conenatd reload"
	Subnets Place = "conenatd.toml, [[subnet]]" // in the part of the subnet; then "conenatd reload"
)

// NotChecked is a finding of which nothing is known.
type NotChecked struct {
	ID  string `json:"id"`
	Why string `json:"why"`
}

// Status returns the exit status of a report: 0, 1 with warnings, 2 with errors.
func (r *Report) Status() int {
	worst := 0
	for _, f := range r.Findings {
		worst = max(worst, f.Severity.rank())
	}
	return worst
}

// Diagnose returns what the facts say is wrong.
func Diagnose(f Facts) Report {
	r := Report{Daemon: f.Running, Firewall: f.firewall(), Findings: []Finding{}, NotChecked: f.notChecked()}
	for _, d := range f.Status.Findings {
		r.Findings = append(r.Findings, f.explain(d))
	}
	for _, c := range checks {
		for _, x := range c.find(&f) {
			x.ID, x.Severity, x.Why = c.id, c.severity, c.why
			r.Findings = append(r.Findings, x)
		}
	}
	for i := range r.Findings {
		if r.Findings[i].Fix == nil {
			r.Findings[i].Fix = []Line{}
		}
	}
	r.NotChecked = slices.DeleteFunc(r.NotChecked, func(n NotChecked) bool {
		return slices.ContainsFunc(r.Findings, func(x Finding) bool { return x.ID == n.ID })
	})
	slices.SortStableFunc(r.Findings, func(a, b Finding) int { return cmp.Compare(b.Severity.rank(), a.Severity.rank()) })
	return r
}

// needHelper are the findings that depend on whether a conntrack helper can be on anchors.
var needHelper = []string{"backend_missing", "children_dropped", "self_not_served", "expectations_few"}

// notChecked returns the findings that only a running daemon has, if none runs, those that need
// the user's rules, if these cannot be read, and those that need conntrack helpers, if these were
// not tried.
func (f *Facts) notChecked() []NotChecked {
	all := []NotChecked{}
	if f.Untried != "" {
		for _, id := range needHelper {
			all = append(all, NotChecked{id, f.Untried})
		}
	}
	if !f.Running {
		for _, m := range meanings {
			if m.flows {
				all = append(all, NotChecked{m.id, "no daemon runs that has seen flows"})
			}
		}
	}
	for _, c := range checks {
		if c.rules && f.Rules.Unread != "" {
			all = append(all, NotChecked{c.id, "your rules cannot be read: " + f.Rules.Unread})
		}
	}
	return all
}
