package doctor

import (
	"fmt"
	"io"
	"strings"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/text"
)

// Write writes a report for people. With color it has the colours of a terminal.
func (r *Report) Write(w io.Writer, color bool) error {
	var b strings.Builder
	for i := range r.Findings {
		r.Findings[i].write(&b, color)
	}
	if len(r.NotChecked) > 0 {
		why := map[string][]string{}
		var order []string
		for _, n := range r.NotChecked {
			if why[n.Why] == nil {
				order = append(order, n.Why)
			}
			why[n.Why] = append(why[n.Why], n.ID)
		}
		for _, reason := range order {
			fmt.Fprintf(&b, "not checked, because %s:\n%s", reason, text.Wrap(strings.Join(why[reason], ", "), "  "))
		}
		b.WriteString("\n")
	}
	counts := map[Severity]int{}
	for _, f := range r.Findings {
		counts[f.Severity]++
	}
	var sums []string
	for _, s := range []Severity{Error, Warning, Note} {
		sums = append(sums, control.Several(counts[s], string(s)))
	}
	b.WriteString(strings.Join(sums, ", ") + "\n")
	_, err := io.WriteString(w, b.String())
	return err
}

var colors = map[Severity]string{Error: "\x1b[31m", Warning: "\x1b[33m", Note: "\x1b[36m"}

func (f *Finding) write(b *strings.Builder, color bool) {
	severity := string(f.Severity)
	if color {
		severity = colors[f.Severity] + severity + "\x1b[0m"
	}
	fmt.Fprintf(b, "%s: %s\n%s%s", severity, f.ID, text.Wrap(f.What, "  "), text.Wrap("Why it matters: "+f.Why, "  "))
	switch {
	case len(f.Fix) == 0 && f.Keep == "":
		b.WriteString("  No single line repairs it.\n")
	case len(f.Fix) == 0:
	case f.Severity == Note:
		b.WriteString("  To change it:\n")
	default:
		b.WriteString("  To repair it:\n")
	}
	for _, l := range f.Fix {
		if l.In == Shell {
			fmt.Fprintf(b, "    %s\n", l.Line)
		} else {
			fmt.Fprintf(b, "    %s: %s\n", l.In, l.Line)
		}
	}
	if flags := f.flags(); len(flags) > 0 {
		b.WriteString(text.Wrap("Then: 'conenatd reload'. Without a configuration file, start the daemon again with "+strings.Join(flags, " and ")+" instead", "  "))
	}
	if f.Keep != "" {
		b.WriteString(text.Wrap("To keep it: "+f.Keep, "  "))
	}
	b.WriteString("\n")
}

// flags returns the flags of "conenatd run" that are the keys of the lines for the configuration.
func (f *Finding) flags() (names []string) {
	for _, l := range f.Fix {
		if key, _, ok := strings.Cut(l.Line, " = "); ok && l.In != Shell {
			names = append(names, "--"+strings.ReplaceAll(key, "_", "-"))
		}
	}
	return names
}
