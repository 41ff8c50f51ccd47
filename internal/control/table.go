package control

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
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

// WriteTable writes permissions as a table for people. It sorts ps.
func WriteTable(w io.Writer, ps []Permission, now time.Time) error {
	slices.SortFunc(ps, ComparePermissions)
	columns := slices.DeleteFunc(slices.Clone(Columns), func(c Column) bool {
		return c.Used != nil && !slices.ContainsFunc(ps, func(p Permission) bool { return c.Used(&p) })
	})

	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(cell func(c Column) string) {
		var cells []string
		for _, c := range columns {
			cells = append(cells, cell(c))
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	row(func(c Column) string { return c.Name })
	for i := range ps {
		row(func(c Column) string { return c.Cell(&ps[i], now) })
	}
	return tw.Flush()
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
