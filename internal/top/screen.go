package top

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/gdamore/tcell/v3"
	"github.com/gdamore/tcell/v3/color"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/doctor"
)

// keys is the last line of the screen.
const keys = "q quit, < > sort by another column, r reverse, arrows PgUp PgDn Home End scroll"

// A model is what the screen shows, and what it will show next.
type model struct {
	width, height int // of the screen, in cells
	next          request
	status        control.Status
	page          page
	top           int   // index in page.rows of the first row on the screen
	err           error // why the daemon did not answer last
}

// A piece is text in one style, and a line is what stands side by side.
type (
	piece struct {
		text  string
		style tcell.Style
	}
	line []piece
)

var (
	plain  = tcell.StyleDefault
	bold   = plain.Bold(true)
	header = plain.Reverse(true)
	wrong  = plain.Foreground(color.Red).Bold(true)
	states = map[string]tcell.Style{"refused": plain.Foreground(color.Red), "waiting": plain.Foreground(color.Yellow)}
)

// head is how many lines stand above the rows: the verdict, the totals, and the header.
const head = 3

// foot is how many lines stand below the rows.
func (m *model) foot() int {
	if m.height < head+2 {
		return 0
	}
	return 1
}

// resize sets the size of the screen.
func (m *model) resize(width, height int) {
	m.width, m.height = width, height
	m.next.height = max(0, m.height-head-m.foot())
	m.top = m.page.find(m.next)
}

// accept takes an answer over. If there is none, the rows of the last one stay.
func (m *model) accept(a answer) {
	if m.err = a.err; a.err == nil {
		m.status, m.page = a.status, a.page
		m.top = m.page.find(m.next)
	}
}

// lines returns the lines of the screen, none wider than the screen is.
func (m *model) lines(now time.Time) []line {
	verdict, style := doctor.Verdict(m.status), bold
	if m.err != nil {
		verdict = m.err.Error()
	}
	if m.err != nil || !strings.HasPrefix(verdict, "works") {
		style = wrong
	}
	all := append([]line{{{verdict, style}}, {{m.totals(now), plain}}}, m.table()...)
	all = all[:min(len(all), m.height)]
	if m.foot() > 0 {
		for len(all) < m.height-1 {
			all = append(all, nil)
		}
		all = append(all[:m.height-1], line{{m.position() + "  ", bold}, {keys, plain}})
	}
	for i := range all {
		all[i] = cut(all[i], m.width)
	}
	return all
}

// totals counts the permissions of the daemon. If it did not answer, they are of its last answer.
func (m *model) totals(now time.Time) string {
	s := &m.status.Permissions
	text := fmt.Sprintf("%d standing of at most %d, %d refused, %d waiting, %s", s.Standing, s.Limit, s.Refused, s.Waiting, control.Several(m.status.Flows, "flow"))
	if m.err != nil {
		text = fmt.Sprintf("%v ago: %s", now.Sub(m.page.at).Truncate(time.Second), text)
	}
	return text
}

// position says which rows of how many are on the screen.
func (m *model) position() string {
	shown := m.shown()
	text := fmt.Sprintf("%d-%d of %d", m.page.before+m.top+1, m.page.before+m.top+len(shown), m.page.total)
	if len(shown) == 0 {
		text = fmt.Sprintf("0 of %d", m.page.total)
	}
	for _, part := range []struct {
		name  string
		value netip.Prefix
	}{{"host", m.next.filter.Host}, {"peer", m.next.filter.Peer}, {"subnet", m.next.filter.Subnet}} {
		switch {
		case part.value.IsSingleIP():
			text += fmt.Sprintf(", %s %v", part.name, part.value.Addr())
		case part.value.IsValid():
			text += fmt.Sprintf(", %s %v", part.name, part.value)
		}
	}
	if m.next.filter.State != "" {
		text += ", state " + m.next.filter.State
	}
	return text
}

// shown returns the permissions on the screen.
func (m *model) shown() []control.Permission {
	rows := m.page.rows[m.top:]
	return rows[:min(len(rows), m.next.height)]
}

// table returns the header of the table and its rows. The first column is always there. If
// not all others fit, the header has a mark where some are left out, and the one that sorts
// is not among these.
func (m *model) table() []line {
	columns, rows := m.page.columns, m.shown()
	if len(columns) == 0 {
		return nil // no answer yet
	}
	names, widths := make([]string, len(columns)), make([]int, len(columns))
	sorting := 0
	for i, c := range columns {
		names[i] = c.Name
		if c.Name == m.page.order.column {
			sorting = i
			names[i] += string(arrow(m.page.order))
		}
		widths[i] = utf8.RuneCountInString(names[i])
		for j := range m.page.rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(c.Cell(&m.page.rows[j], m.page.at)))
		}
	}
	first, last := fit(widths, m.width, sorting)
	top := line{{pad(names[0], widths[0]), header}, {mark(first > 1, "< "), header}}
	for i := first; i < last; i++ {
		top = append(top, piece{pad(names[i], widths[i]), header})
		top = append(top, piece{mark(i == last-1 && last < len(columns), " >"), header})
	}
	top = append(top, piece{strings.Repeat(" ", m.width), header})
	all := []line{top}
	for r := range rows {
		l := line{{pad(columns[0].Cell(&rows[r], m.page.at), widths[0]), plain}}
		for i := first; i < last; i++ {
			style := plain
			if columns[i].Name == "STATE" {
				style = states[rows[r].State]
			}
			l = append(l, piece{"  ", plain}, piece{pad(columns[i].Cell(&rows[r], m.page.at), widths[i]), style})
		}
		all = append(all, l)
	}
	return all
}

// arrow shows the direction of an order.
func arrow(o order) rune {
	if o.down() {
		return tcell.RuneDArrow
	}
	return tcell.RuneUArrow
}

// mark stands between two columns if some are left out there, and otherwise space.
func mark(missing bool, text string) string {
	if missing {
		return text
	}
	return "  "
}

// fit returns which columns, from first to before last, stand beside column 0 on a screen of
// this width. Columns that do not fit are left out, first those at the right, then, if the
// one that sorts is among these, those at the left.
func fit(widths []int, width, sorting int) (first, last int) {
	for first = 1; ; first++ {
		used := widths[0]
		for last = first; last < len(widths) && used+2+widths[last] <= width; last++ {
			used += 2 + widths[last]
		}
		if sorting < last || first >= sorting {
			return first, last
		}
	}
}

// pad fills a cell of the table.
func pad(text string, width int) string {
	return text + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(text)))
}

// cut shortens a line to this width.
func cut(l line, width int) line {
	var short line
	for _, p := range l {
		text := []rune(p.text)
		text = text[:min(len(text), width)]
		width -= len(text)
		short = append(short, piece{string(text), p.style})
	}
	return short
}

// press does what a key says. It returns whether another part of the list is to be shown, and
// whether to end.
func (m *model) press(key tcell.Key, text string) (changed, quit bool) {
	if key != tcell.KeyRune {
		text = "" // that of a control character
	}
	screen := max(1, m.next.height)
	switch {
	case key == tcell.KeyCtrlC, text == "q":
		return false, true
	case key == tcell.KeyRight, text == ">":
		changed = m.sort(1)
	case key == tcell.KeyLeft, text == "<":
		changed = m.sort(-1)
	case text == "r":
		m.next.order.reversed = !m.next.order.reversed
		changed = m.jump(false)
	case key == tcell.KeyDown, text == "j":
		changed = m.scroll(1)
	case key == tcell.KeyUp, text == "k":
		changed = m.scroll(-1)
	case key == tcell.KeyPgDn, text == " ":
		changed = m.scroll(screen)
	case key == tcell.KeyPgUp, text == "b":
		changed = m.scroll(-screen)
	case key == tcell.KeyHome, text == "g":
		changed = m.jump(false)
	case key == tcell.KeyEnd, text == "G":
		changed = m.jump(true)
	}
	return changed, false
}

// sort sorts by the column that stands so many to the right.
func (m *model) sort(by int) bool {
	columns := m.page.columns
	if len(columns) == 0 {
		return false // no answer yet
	}
	i := slices.IndexFunc(columns, func(c control.Column) bool { return c.Name == m.next.order.column })
	i = (max(i, 0) + by + len(columns)) % len(columns)
	m.next.order = order{column: columns[i].Name}
	return m.jump(false)
}

// jump shows the beginning of the list, or its end.
func (m *model) jump(end bool) bool {
	m.next.from, m.next.end = nil, end
	m.top = m.page.find(m.next)
	return true
}

// scroll shows rows further down, as far as the page has them.
func (m *model) scroll(by int) bool {
	top := max(0, min(m.top+by, len(m.page.rows)-m.next.height))
	if top == m.top || m.page.order != m.next.order {
		return false
	}
	m.top = top
	m.next.from, m.next.end = nil, false
	if m.page.before+top > 0 {
		from := m.page.rows[top]
		m.next.from = &from
	}
	return true
}
