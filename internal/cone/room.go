package cone

import "time"

// A Room is what the kernel can hold of permissions that stand as expectations: each takes
// an entry of the conntrack table for its anchor, which the kernel never drops early.
type Room struct {
	// New is the most that may stand after one more is made. Idle ones make way for
	// it.
	New int
	// Live is the most that may stay if none is idle. It is not less than New.
	Live int
	// Lack is the reason if there is no room for more.
	Lack Reason
}

// SetRoom sets how much room there is for expectations; before the first call there is no
// bound. Expectations beyond it end, the oldest first; the map goes on to carry those
// permissions that it can. None ends before the first snapshot is complete: until then it
// is unknown which are idle.
func (m *Model) SetRoom(now time.Duration, r Room) {
	m.room, m.bounded = r, true
	if !m.snap.complete {
		return
	}
	m.endExpectations(now, idle, r.New)
	m.endExpectations(now, busy, r.Live)
}

// endExpectations ends expectations that stand as s says, until there are at most most of any kind.
func (m *Model) endExpectations(now time.Duration, s expectState, most int) {
	list := &m.expected[s]
	for n := m.stats.Expected - most; n > 0 && list.first != none; n-- {
		m.endExpectation(now, list.first)
	}
}

// endExpectation ends the expectation of claim i.
func (m *Model) endExpectation(now time.Duration, i int32) {
	c := &m.claims[i]
	switch {
	case m.policy.mappable(&c.Permission) && c.noElement == ReasonNone:
		m.changeCarriers(i, Placement{By: ByMap, Why: m.room.Lack})
	case c.isIdle():
		m.end(now, i, ReasonEvicted)
	default:
		m.Refused(now, c.Permission, m.room.Lack, true)
	}
}

// hasRoom reports whether c may stand as an expectation. A claim that has one may keep it
// until SetRoom says otherwise.
func (m *Model) hasRoom(c *claim) bool {
	return !m.bounded || c.expectState != notExpected || m.stats.Expected < m.room.New
}

// makeRoom ends expectations of idle claims until there is room for one more, and
// reports whether there is.
func (m *Model) makeRoom(now time.Duration) bool {
	if m.snap.complete {
		m.endExpectations(now, idle, m.room.New-1)
	}
	return m.stats.Expected < m.room.New
}

// An expectState is how a claim stands as an expectation.
type expectState uint8

const (
	notExpected expectState = iota
	idle                    // without a live flow of which its host sends
	busy
)

func (c *claim) expectStateNow() expectState {
	switch {
	case c.state != StateStanding || c.placed.By&ByExpectation == 0:
		return notExpected
	case c.isIdle():
		return idle
	}
	return busy
}

func inRoom(c *claim) *links { return &c.inRoom }

// updateExpected updates the lists of expectations after any change of claim i.
func (m *Model) updateExpected(i int32) {
	c := &m.claims[i]
	now := c.expectStateNow()
	if now == c.expectState {
		return
	}
	if c.expectState != notExpected {
		m.unlink(&m.expected[c.expectState], i, inRoom)
	}
	if now != notExpected {
		m.link(&m.expected[now], i, inRoom)
	}
	c.expectState = now
}
