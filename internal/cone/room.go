package cone

import "time"

// A Room is what the kernel has for permissions that stand as expectations: each
// takes an entry of the conntrack table for its anchor, which the kernel never drops
// early.
type Room struct {
	// New is how many may stand while one more is made. Permissions that linger make
	// way for it.
	New int
	// Live is how many may stay that do not linger; it is not less than New.
	Live int
	// Lack is why there is room for no more.
	Lack Reason
}

// SetRoom tells how much room there is for expectations; until then there is no
// bound. Those beyond it end, the oldest first: permissions go on in the map where
// that can carry them. The first snapshot must be whole before any of them ends: until
// then nobody knows what lingers.
func (m *Model) SetRoom(now time.Duration, r Room) {
	m.room, m.bounded = r, true
	if !m.snap.whole {
		return
	}
	m.giveUp(now, lingering, r.New)
	m.giveUp(now, busy, r.Live)
}

// giveUp ends expectations that stand so until there are only so many in all.
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
	case m.policy.mappable(&c.Permission) && c.unmapped == ReasonNone:
		m.move(i, Placement{ByMap, m.room.Lack})
	case c.lingers():
		m.end(now, i, ReasonEvicted)
	default:
		m.Refused(now, c.Permission, m.room.Lack, true)
	}
}

// hasRoom reports whether c may stand as an expectation. One that does may stay until
// SetRoom says otherwise.
func (m *Model) hasRoom(c *claim) bool {
	return !m.bounded || c.room != notExpected || m.stats.Expected < m.room.New
}

// makeRoom ends expectations of lingering claims until there is room for one more, and
// reports whether there is.
func (m *Model) makeRoom(now time.Duration) bool {
	if m.snap.whole {
		m.giveUp(now, lingering, m.room.New-1)
	}
	return m.stats.Expected < m.room.New
}

// A standing is how a claim stands as an expectation.
type standing uint8

const (
	notExpected standing = iota
	lingering            // without a live flow that is fed from inside
	busy
)

func (c *claim) standing() standing {
	switch {
	case c.state != StateStanding || c.placed.By&ByExpectation == 0:
		return notExpected
	case c.lingers():
		return lingering
	}
	return busy
}

func inRoom(c *claim) *links { return &c.inRoom }

// accountRoom brings the lists of expectations up to date with claim i, after any
// change of it.
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
