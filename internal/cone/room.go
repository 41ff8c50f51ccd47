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
	m.giveUp(now, idle, r.New)
	m.giveUp(now, busy, r.Live)
}

// giveUp ends expectations that stand as s says, until there are at most most of any kind.
func (m *Model) giveUp(now time.Duration, s standing, most int) {
	list := &m.expected[s]
	for n := m.stats.Expected - most; n > 0 && list.first != none; n-- {
		m.giveUpOne(now, list.first)
	}
}

// giveUpOne ends the expectation of claim i.
func (m *Model) giveUpOne(now time.Duration, i int32) {
	c := &m.claims[i]
	switch {
	case m.policy.mappable(&c.Permission) && c.noElement == ReasonNone:
		m.move(i, Placement{ByMap, m.room.Lack})
	case c.isIdle():
		m.end(now, i, ReasonEvicted)
	default:
		m.Refused(now, c.Permission, m.room.Lack, true)
	}
}

// hasRoom reports whether c may stand as an expectation. A claim that has one may keep it
// until SetRoom says otherwise.
func (m *Model) hasRoom(c *claim) bool {
	return !m.bounded || c.room != notExpected || m.stats.Expected < m.room.New
}

// makeRoom ends expectations of idle claims until there is room for one more, and
// reports whether there is.
func (m *Model) makeRoom(now time.Duration) bool {
	if m.snap.complete {
		m.giveUp(now, idle, m.room.New-1)
	}
	return m.stats.Expected < m.room.New
}

// A standing is how a claim stands as an expectation.
type standing uint8

const (
	notExpected standing = iota
	idle                 // without a live flow that is fed from inside
	busy
)

func (c *claim) standing() standing {
	switch {
	case c.state != StateStanding || c.placed.By&ByExpectation == 0:
		return notExpected
	case c.isIdle():
		return idle
	}
	return busy
}

func inRoom(c *claim) *links { return &c.inRoom }

// accountRoom updates the lists of expectations after any change of claim i.
func (m *Model) accountRoom(i int32) {
	c := &m.claims[i]
	now := c.standing()
	if now == c.room {
		return
	}
	if c.room != notExpected {
		m.unlink(&m.expected[c.room], i, inRoom)
	}
	if now != notExpected {
		m.link(&m.expected[now], i, inRoom)
	}
	c.room = now
}
