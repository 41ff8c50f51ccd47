package control

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"
)

// A Column is a column of the table of permissions.
type Column struct {
	Name string
	Cell func(p *Permission, now time.Time) string
	// Compare orders permissions by this column: numbers and times ascending, those without
	// a time last.
	Compare func(a, b *Permission) int
	// Used reports whether the column has something to say about p. A column that is used
	// by no permission is left out. It is nil for a column that is always there.
	Used func(p *Permission) bool
}

// Columns are the columns of the table of permissions.
var Columns = []Column{
	{"INT", func(p *Permission, _ time.Time) string { return p.Int.String() }, func(a, b *Permission) int { return a.Int.Compare(b.Int) }, nil},
	{"EXT", func(p *Permission, _ time.Time) string { return p.Ext.String() }, func(a, b *Permission) int { return a.Ext.Compare(b.Ext) }, nil},
	{"PEER", func(p *Permission, _ time.Time) string { return p.PeerText() }, func(a, b *Permission) int { return a.Peer.Compare(b.Peer) }, nil},
	{"ZONE", func(p *Permission, _ time.Time) string { return strconv.Itoa(int(p.Zone)) }, func(a, b *Permission) int { return cmp.Compare(a.Zone, b.Zone) }, func(p *Permission) bool { return p.Zone != 0 }},
	{"STATE", func(p *Permission, _ time.Time) string { return p.State }, func(a, b *Permission) int { return cmp.Compare(a.State, b.State) }, nil},
	{"FLOWS", func(p *Permission, _ time.Time) string { return strconv.Itoa(p.Flows) }, func(a, b *Permission) int { return cmp.Compare(a.Flows, b.Flows) }, nil},
	{"CHILDREN", func(p *Permission, _ time.Time) string { return strconv.Itoa(p.Children) }, func(a, b *Permission) int { return cmp.Compare(a.Children, b.Children) }, nil},
	{"AGE", func(p *Permission, now time.Time) string { return between(p.Since, now) }, func(a, b *Permission) int { return b.Since.Compare(a.Since) }, nil},
	{"EXPIRES", func(p *Permission, now time.Time) string { return between(now, p.Expires) }, compareExpires, nil},
	{"REASON", func(p *Permission, _ time.Time) string { return cmp.Or(Words(p.Reason), "-") }, func(a, b *Permission) int { return cmp.Compare(a.Reason, b.Reason) }, func(p *Permission) bool { return p.Reason != "" }},
}

// compareExpires puts permissions that do not expire last.
func compareExpires(a, b *Permission) int {
	if a.Expires.IsZero() || b.Expires.IsZero() {
		return b.Expires.Compare(a.Expires)
	}
	return a.Expires.Compare(b.Expires)
}

// sortedAtMost is the longest table that is sorted.
const sortedAtMost = 10_000

// A TableWriter writes permissions as a table for people. It sorts a table of up to 10,000
// permissions, and leaves out columns that say nothing about them. A longer table has all
// columns; its first 10,000 rows are sorted, the others follow as they come, so that it begins
// at once and takes no more memory however long it is.
type TableWriter struct {
	out     *bufio.Writer
	now     time.Time
	held    []Permission // not written yet
	columns []Column     // of a long table; nil before it is known to be one
	widths  []int
}

// NewTableWriter returns a TableWriter that shows times as seen at now. The caller must Close it.
func NewTableWriter(w io.Writer, now time.Time) *TableWriter {
	return &TableWriter{out: bufio.NewWriter(w), now: now}
}

// Write adds a permission to the table.
func (t *TableWriter) Write(p Permission) error {
	if t.columns != nil {
		return t.row(t.cells(&p))
	}
	if t.held = append(t.held, p); len(t.held) <= sortedAtMost {
		return nil
	}
	t.columns = Columns
	return errors.Join(t.writeHeld(), t.out.Flush())
}

// Close writes what is left of the table.
func (t *TableWriter) Close() error {
	if t.columns == nil {
		t.columns = slices.DeleteFunc(slices.Clone(Columns), func(c Column) bool {
			return c.Used != nil && !slices.ContainsFunc(t.held, func(p Permission) bool { return c.Used(&p) })
		})
		if err := t.writeHeld(); err != nil {
			return err
		}
	}
	return t.out.Flush()
}

// writeHeld writes the header and the permissions so far, sorted. They say how wide the columns
// are.
func (t *TableWriter) writeHeld() error {
	slices.SortFunc(t.held, ComparePermissions)
	rows := make([][]string, 1, len(t.held)+1)
	for _, c := range t.columns {
		rows[0] = append(rows[0], c.Name)
	}
	for i := range t.held {
		rows = append(rows, t.cells(&t.held[i]))
	}
	t.held = nil
	t.widths = make([]int, len(t.columns))
	for _, r := range rows {
		for i, cell := range r {
			t.widths[i] = max(t.widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, r := range rows {
		if err := t.row(r); err != nil {
			return err
		}
	}
	return nil
}

func (t *TableWriter) cells(p *Permission) []string {
	cells := make([]string, len(t.columns))
	for i, c := range t.columns {
		cells[i] = c.Cell(p, t.now)
	}
	return cells
}

func (t *TableWriter) row(cells []string) error {
	const apart = "  "
	for i, cell := range cells {
		_, _ = t.out.WriteString(cell) // the last write has the error
		if i+1 < len(cells) {
			for n := utf8.RuneCountInString(cell); n < t.widths[i]; n++ {
				_ = t.out.WriteByte(' ')
			}
			_, _ = t.out.WriteString(apart)
		}
	}
	return t.out.WriteByte('\n')
}

// ComparePermissions is the order of the table: by inside and outside endpoint, peer and zone.
func ComparePermissions(a, b Permission) int {
	return cmp.Or(a.Int.Compare(b.Int), a.Ext.Compare(b.Ext), a.Peer.Compare(b.Peer), cmp.Compare(a.Zone, b.Zone))
}

// PeerText names the peers that may send, for people.
func (p *Permission) PeerText() string {
	switch {
	case !p.Peers.IsValid():
		return p.Peer.String()
	case p.Peers.Bits() == 0:
		return "anybody"
	}
	return p.Peers.String()
}

// between is the time from a to b, or a dash if either is unknown.
func between(a, b time.Time) string {
	if a.IsZero() || b.IsZero() {
		return "-"
	}
	return span(b.Sub(a))
}

// span formats a duration in at most two units, which is enough for a reader.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < day:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%02dh", d/day, d%day/time.Hour)
}
