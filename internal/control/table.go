package control

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// WriteTable writes permissions as a table for people. It sorts ps. The columns ZONE and
// REASON are left out if they would be empty.
func WriteTable(w io.Writer, ps []Permission, now time.Time) error {
	slices.SortFunc(ps, ComparePermissions)
	zones := slices.ContainsFunc(ps, func(p Permission) bool { return p.Zone != 0 })
	why := slices.ContainsFunc(ps, func(p Permission) bool { return p.Reason != "" })

	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(zone, reason any, cells ...any) {
		if zones {
			cells = slices.Insert(cells, 3, zone)
		}
		if why {
			cells = append(cells, reason)
		}
		fmt.Fprintf(tw, strings.Repeat("%v\t", len(cells)-1)+"%v\n", cells...)
	}
	row("ZONE", "REASON", "INT", "EXT", "PEER", "STATE", "FLOWS", "CHILDREN", "AGE", "EXPIRES")
	for _, p := range ps {
		row(p.Zone, cmp.Or(Words(p.Reason), "-"), p.Int, p.Ext, p.PeerText(), p.State, p.Flows, p.Children,
			between(p.Since, now), between(now, p.Expires))
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
