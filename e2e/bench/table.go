package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// A table is what one of the tables of docs/results/bench.md has.
type table struct {
	key, title, about string

	base    string // the arm that the others are compared with
	rows    []row
	columns []string
	noise   map[string]interval // A/A, by column
	goals   []wanted
	// inverse says that ratios are of costs, so that less is better; otherwise they are of
	// packets a second.
	inverse bool
	// absolute says that there is no base: samples are values, of the unit in the column's name.
	absolute bool
	used     string // the column whose packets the CPU time of programs in gateways is divided by
	notes    []string
}

// A row is an arm.
type row struct {
	arm   string
	cells map[string]*result // by column
}

// A wanted is a goal for the ratio of two arms.
type wanted struct {
	column, arm, against string
	goal                 goal
}

// measure runs A/A, and then the race of the other gateways against the first. The second is
// of the same kind as the first.
func (t *table) measure(r *race, gateways []*gateway) error {
	base, again := gateways[0], gateways[1:2]
	fmt.Fprintf(r.log, "table %s, against %s: A/A, then %d arms\n", t.key, base.name, len(gateways)-2)
	noise, err := r.against(base, again)
	if err != nil {
		return err
	}
	rest, err := r.against(base, gateways[2:])
	if err != nil {
		return err
	}
	if t.noise == nil {
		t.noise = make(map[string]interval)
	}
	t.base = base.name
	if t.inverse {
		for _, x := range slices.Concat(noise, rest) {
			x.ratios = over(x.costs, x.base)
		}
	}
	for _, x := range noise {
		t.noise[x.cell] = intervalOf(x.ratios)
	}
	for _, c := range r.cells {
		t.columns = append(t.columns, c.name)
	}
	for _, x := range slices.Concat(noise, rest) {
		t.add(x)
		fmt.Fprintf(r.log, "  %-32s %-34s %s\n", x.arm, x.cell, intervalOf(x.ratios))
	}
	return nil
}

func (t *table) add(x *result) {
	i := slices.IndexFunc(t.rows, func(r row) bool { return r.arm == x.arm })
	if i < 0 {
		i = len(t.rows)
		t.rows = append(t.rows, row{x.arm, make(map[string]*result)})
	}
	t.rows[i].cells[x.cell] = x
}

// of returns the result of an arm, or nil.
func (t *table) of(arm, column string) *result {
	for _, r := range t.rows {
		if r.arm == arm {
			return r.cells[column]
		}
	}
	return nil
}

// ratio returns the ratio of two arms.
func (t *table) ratio(column, arm, against string) (interval, bool) {
	x := t.of(arm, column)
	if !x.measured() {
		return interval{}, false
	}
	if against == t.base {
		return x.interval(), true
	}
	y := t.of(against, column)
	if !y.measured() {
		return interval{}, false
	}
	return intervalOf(over(x.ratios, y.ratios)), true
}

// baseCost returns the cost of a packet through the base in ns, over the quads of all arms.
func (t *table) baseCost(column string) interval {
	var all []float64
	for _, r := range t.rows {
		if x := r.cells[column]; x != nil {
			all = append(all, x.base...)
		}
	}
	return intervalOf(all)
}

// write writes the table in Markdown. mark, if not empty, marks each row.
func (t *table) write(w io.Writer, mark string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "\n## %s) %s\n\n%s\n\n", t.key, t.title, t.about)
	fmt.Fprintf(&b, "![%s](bench-%s.svg)\n\n", t.title, t.key)
	head := append([]string{"against " + t.base}, t.columns...)
	if t.absolute {
		head[0] = "median and interval"
	}
	if t.used != "" {
		head = append(head, "CPU of the program in the gateway, us a flow "+t.used)
	}
	line(&b, head)
	line(&b, slices.Repeat([]string{"---"}, len(head)))
	if !t.absolute {
		cells := []string{t.base + mark}
		for _, c := range t.columns {
			cells = append(cells, fmt.Sprintf("%.0f ns", t.baseCost(c).Median))
		}
		if t.used != "" {
			cells = append(cells, "")
		}
		line(&b, cells)
	}
	for _, r := range t.rows {
		cells := []string{r.arm + mark}
		for _, c := range t.columns {
			cells = append(cells, r.cells[c].text())
		}
		if t.used != "" {
			used := ""
			if x := r.cells[t.used]; x != nil && slices.Max(x.used) > 0 {
				used = fmt.Sprintf("%.1f", intervalOf(x.used).Median/1e3)
			}
			cells = append(cells, used)
		}
		line(&b, cells)
	}
	t.writeGoals(&b, mark)
	for _, n := range t.notes {
		fmt.Fprintf(&b, "\n%s\n", n)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (x *result) text() string {
	if !x.measured() {
		return ""
	}
	return x.interval().String()
}

func (t *table) writeGoals(b *strings.Builder, mark string) {
	if len(t.goals) == 0 {
		return
	}
	b.WriteString("\n")
	headOfGoals(b)
	for _, g := range t.goals {
		seen, ok := t.ratio(g.column, g.arm, g.against)
		if !ok {
			continue
		}
		name, noise := fmt.Sprintf("%s, %s, against %s%s", g.column, g.arm, g.against, mark), t.noise[g.column]
		if t.absolute {
			name, noise = g.column+", "+g.arm+mark, interval{1, 1, 1, true}
		}
		v := string(g.goal.judge(seen, noise))
		if mark != "" {
			v = "none: disturbed"
		}
		line(b, []string{name, g.goal.String(), seen.String(), v})
	}
}

func headOfGoals(b *strings.Builder) {
	line(b, []string{"goal", "wanted", "seen", "verdict"})
	line(b, slices.Repeat([]string{"---"}, 4))
}

func line(b *strings.Builder, cells []string) {
	fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
}

// count writes a number with commas.
func count(n int) string {
	s := fmt.Sprint(n)
	for at := len(s) - 3; at > 0; at -= 3 {
		s = s[:at] + "," + s[at:]
	}
	return s
}

var errNothing = errors.New("no table was measured")
