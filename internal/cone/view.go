package cone

import (
	"slices"
	"time"
)

// A View is one claim as a user wants to see it.
type View struct {
	Permission
	State     State
	Reason    Reason // why it does not stand
	Placement        // of one that stands
	Flows     int    // live flows that the inside host opened
	Children  int    // live flows that the peer opened
	Answered  int    // children that the inside host answered
	Since     time.Duration
	// Expires is when the permission ends unless it is fed again. A live flow
	// feeds it each time that it is seen.
	Expires time.Duration
}

// UsesOutside reports whether a permission with an outside address stands.
func (m *Model) UsesOutside(ext Addr) bool {
	return slices.ContainsFunc(m.claims, func(c claim) bool { return c.state == StateStanding && c.Ext.Addr == ext })
}

// Walk calls f for the claims in the places from to from+n of the model, which
// are in no order, and returns the place to go on from, or -1 at the end. A long
// list can so be made in steps; what changes between two steps may be missing.
// f must not call methods of m.
func (m *Model) Walk(from, n int, f func(View)) (next int) {
	end := min(from+n, len(m.claims))
	for i := from; i < end; i++ {
		c := &m.claims[i]
		if c.state == stateUnused {
			continue
		}
		f(View{
			Permission: c.Permission,
			State:      c.state, Reason: c.reason, Placement: c.placed,
			Flows: int(c.outs), Children: int(c.kids), Answered: int(c.answered),
			Since: c.made, Expires: c.fed + m.policy.Lifetime,
		})
	}
	if end == len(m.claims) {
		return -1
	}
	return end
}
