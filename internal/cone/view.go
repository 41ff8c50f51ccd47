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
	Placement        // zero unless it stands
	Flows     int    // live flows that the inside host opened
	Children  int    // live flows that the peer opened
	Answered  int    // children that the inside host answered
	Since     time.Duration
	// Expires is when the permission ends unless its host sends again. A live flow extends it each
	// time it is seen.
	Expires time.Duration
}

// UsesOutside reports whether a permission on the outside address ext stands.
func (m *Model) UsesOutside(ext Addr) bool {
	return slices.ContainsFunc(m.claims, func(c claim) bool { return c.state == StateStanding && c.Ext.Addr == ext })
}

// Lifetime returns the policy's lifetime.
func (m *Model) Lifetime() time.Duration { return m.policy.Lifetime }

// Walk calls f for up to n claims, in no order, starting at place from of the model. It
// returns the place to continue at, or -1 at the end. So a long list can be made in steps;
// claims that change between two steps may be missing. f must not call methods of m.
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
			Flows: int(c.outFlows), Children: int(c.children), Answered: int(c.answered),
			Since: c.made, Expires: c.refreshed + m.policy.Lifetime,
		})
	}
	if end == len(m.claims) {
		return -1
	}
	return end
}
