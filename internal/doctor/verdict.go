package doctor

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/control"
)

// Verdict says in one line whether a daemon with this status works: for all of its subnets,
// for some, or for none, and why not.
func Verdict(st control.Status) string {
	var errors []control.Finding
	for _, d := range st.Findings {
		if severityOf(d) == Error {
			errors = append(errors, d)
		}
	}
	switch {
	case len(st.Outside) == 0:
		return "does not work: " + because(errors, "there is no outside link")
	case len(st.Subnets) == 0 && len(errors) > 0:
		return "does not work: " + because(errors, "")
	case len(st.Subnets) == 0:
		return "works, for the gateway's own programs: no subnet is enabled"
	}
	type cause struct {
		first, text string // the first subnet, and the text for it
		more        int
	}
	wrong, causes := 0, []cause{}
	for _, s := range st.Subnets {
		i := slices.IndexFunc(errors, func(d control.Finding) bool { return d.About == s.Prefix.String() })
		if i < 0 {
			continue
		}
		wrong++
		c := cause{first: s.Prefix.String(), text: brief(errors[i].Text)}
		same := slices.IndexFunc(causes, func(other cause) bool { return strings.ReplaceAll(c.text, c.first, other.first) == other.text })
		if same >= 0 {
			causes[same].more++
		} else {
			causes = append(causes, c)
		}
	}
	var texts []string
	for _, c := range causes {
		if c.more > 0 {
			c.first += fmt.Sprintf(" and %d more", c.more)
		}
		texts = append(texts, c.first+": "+c.text)
	}
	why := strings.Join(control.Few(texts), "; ")
	errors = slices.DeleteFunc(errors, func(d control.Finding) bool {
		return slices.ContainsFunc(st.Subnets, func(s control.Subnet) bool { return s.Prefix.String() == d.About })
	})
	switch n := len(st.Subnets); {
	case wrong == n:
		return "does not work: " + why
	case wrong > 0:
		return fmt.Sprintf("works for %d of %d subnets: %s", n-wrong, n, why)
	case len(errors) > 0:
		return "works in part: " + because(errors, "")
	}
	return "works"
}

// WorstFirst returns the warnings of a status, the worst first.
func WorstFirst(st control.Status) []string {
	all := slices.Clone(st.Findings)
	slices.SortStableFunc(all, func(a, b control.Finding) int { return cmp.Compare(severityOf(b).rank(), severityOf(a).rank()) })
	texts := make([]string, len(all))
	for i, d := range all {
		texts[i] = d.Text
	}
	return texts
}

// severityOf returns the severity of a finding of the daemon. One of a newer daemon is a warning.
func severityOf(d control.Finding) Severity {
	if m := meaningOf(d); m != nil {
		return m.severity
	}
	return Warning
}

// because names the first error; otherwise is the text without one.
func because(errors []control.Finding, otherwise string) string {
	if len(errors) == 0 {
		return otherwise
	}
	return brief(errors[0].Text)
}

// brief returns the beginning of a warning, which says what is wrong.
func brief(text string) string {
	end := len(text)
	for _, stop := range []string{": ", ", ", "; "} {
		if i := strings.Index(text, stop); i >= 0 {
			end = min(end, i)
		}
	}
	return text[:end]
}
