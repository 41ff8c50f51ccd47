package page

import "github.com/conenatd/conenatd/internal/control"

// A step is a station on the way of packets, with what it counted.
type step struct {
	Title  string  `json:"title"`
	Counts []count `json:"counts"`
}

// A count is a number of a control.Status.
type count struct {
	Name string `json:"name"`
	N    uint64 `json:"n"`
	Why  string `json:"why,omitempty"` // its parts, by reason
	Now  bool   `json:"now,omitempty"` // how many there are now, not how many there have been
}

// path describes the way of packets in its order: out from an inside host, which earns a
// permission, and in from a peer.
func path(s *control.Status) []step {
	c, t := &s.Counters, &s.Tables
	children := t.Guard.Children + c.Crowded
	passedMap, passedExpected := min(t.Map.Passed, t.Map.Admitted), min(t.Expected.Passed, t.Expected.Admitted)
	return []step{
		{"Out, from inside hosts", []count{
			{Name: "kernel's messages about flows", N: s.Events.Received},
			{Name: "flows that led to no permission", N: control.Sum(c.Skipped), Why: control.SkippedReasons(*c)},
		}},
		{"Permissions", []count{
			{Name: "standing", N: uint64(s.Permissions.Standing), Now: true},
			{Name: "flows that belong to them", N: uint64(s.Flows), Now: true},
			{Name: "granted", N: c.Granted},
			{Name: "learned by the kernel itself", N: t.Map.Learned},
			{Name: "not learned: too many at a time", N: t.Map.Limited},
			{Name: "refused", N: control.Sum(c.Refused), Why: control.Reasons(c.Refused)},
			{Name: "ended", N: control.Sum(c.Revoked), Why: control.Reasons(c.Revoked)},
		}},
		{"In, from peers", []count{
			{Name: "children admitted by the map", N: t.Map.Admitted},
			{Name: "children admitted by expectations", N: t.Expected.Admitted},
		}},
		{"Your firewall", []count{
			{Name: "children passed", N: passedMap + passedExpected},
			{Name: "children not passed", N: t.Map.Admitted - passedMap + t.Expected.Admitted - passedExpected},
		}},
		{"Dropped by conenatd", []count{
			{Name: "packets that nobody waits for", N: t.Guard.Drops},
			{Name: "packets with a faked source", N: t.Guard.Spoofed},
			{Name: "children beyond max_children", N: children},
			{Name: "packets from or to port 0", N: t.Guard.PortZero},
		}},
	}
}
