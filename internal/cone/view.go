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

// OutsideInUse returns those of the outside addresses exts on which a permission stands, in order.
func (m *Model) OutsideInUse(exts []Addr) (used []Addr) {
	if len(exts) == 0 {
		return nil
	}
	left := make(map[Addr]bool, len(exts))
	for _, a := range exts {
		left[a] = true
	}
	for i := range m.claims {
		if c := &m.claims[i]; c.state == StateStanding && left[c.Ext.Addr] {
			delete(left, c.Ext.Addr)
			if used = append(used, c.Ext.Addr); len(left) == 0 {
				break
			}
		}
	}
	slices.SortFunc(used, func(a, b Addr) int { return a.Netip().Compare(b.Netip()) })
	return used
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
