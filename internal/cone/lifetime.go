package cone

import "time"

// isIdle reports whether c makes way for another claim: it stands without a live flow that
// its host sends on, or it is refused for a reason of its own: no inside traffic, a limit,
// or no socket.
func (c *claim) isIdle() bool {
	switch c.state {
	case StateStanding:
		return c.outFlows == 0 && c.answered == 0
	case StateRefused:
		switch c.reason {
		case ReasonIdle, ReasonHostLimit, ReasonSubnetLimit, ReasonNoSocket:
			return true
		}
	}
	return false
}

// waitsForFlow reports whether c, which is refused, is tried again only when the inside
// host sends.
func (c *claim) waitsForFlow() bool {
	return c.reason == ReasonIdle || c.reason == ReasonRevoked
}

// flowsChanged decides what becomes of claim i after its flows changed.
func (m *Model) flowsChanged(now time.Duration, i int32) {
	c := &m.claims[i]
	switch {
	case c.state != StateStanding && c.outFlows == 0: // no flow asks for it any more
		m.end(now, i, ReasonExpired)
	case m.hasSuccessor(i) && m.yields(i, c.nextKey):
		m.end(now, i, ReasonYielded)
	}
}

// isOver reports whether c had no traffic from inside for a lifetime.
func (m *Model) isOverdue(now time.Duration, c *claim) bool {
	return now >= c.refreshed+m.policy.Lifetime
}

// refresh notes traffic from inside for claim i at the given time.
func (m *Model) refresh(now time.Duration, i int32, at time.Duration) {
	c := &m.claims[i]
	if c.adopted && at <= c.refreshed+m.timeoutResolution() {
		return
	}
	lapsed := c.adopted || m.isOverdue(now, c) && now >= c.renewal
	c.refreshed = max(c.refreshed, at)
	if m.isOverdue(now, c) {
		return
	}
	if lapsed && c.state == StateStanding { // at once: the kernel may have ended it already
		m.renew(now, i)
		c.adopted = false
		m.wheel.schedule(i, min(c.renewal, c.refreshed+m.policy.Lifetime))
	}
	if c.expiry != 0 { // its flows were queried: it no longer ends then
		c.expiry = 0
		m.wheel.schedule(i, min(c.renewal, c.refreshed+m.policy.Lifetime))
	}
	if c.state == StateRefused && c.reason == ReasonIdle {
		m.grant(now, i)
	}
}

// Tick does the work that is due at now (renewal, retry, expiry) for at most limit claims.
// It reports whether more is due.
func (m *Model) Tick(now time.Duration, limit int) (more bool) {
	for range limit {
		i := m.wheel.pop(now)
		if i == none {
			return false
		}
		m.timerFired(now, i)
	}
	return true
}

func (m *Model) timerFired(now time.Duration, i int32) {
	c := &m.claims[i]
	if c.state == StateRefused {
		switch {
		case now < c.retry:
			m.wheel.schedule(i, c.retry)
		case !c.waitsForFlow():
			m.grant(now, i)
		case c.reason == ReasonRevoked:
			m.keepDenied(now, i)
		}
		return
	}

	deadline := c.refreshed + m.policy.Lifetime
	overdue := m.isOverdue(now, c)
	if overdue {
		if c.expiry == 0 {
			c.expiry = m.queryFlows(now, c)
		}
		switch {
		case now < c.expiry:
			deadline = c.expiry
		case m.unreported.possible: // there may be a later flow; EndSnapshot goes on
			deadline = now + m.answerTimeout()
		default:
			m.expire(now, i)
			return
		}
	}
	renews := now >= c.renewal && !overdue
	if renews && c.adopted { // the kernel's timeout goes on; ask shortly before it ends
		renews = false
		if c.renewal = deadline - max(m.answerTimeout(), m.timeoutResolution()); now >= c.renewal {
			m.queryFlows(now, c)
			c.renewal = deadline
		}
	}
	if renews { // an overdue claim is not renewed before its flows are queried
		m.renew(now, i)
	}
	if !overdue {
		deadline = min(c.renewal, deadline)
	}
	m.wheel.schedule(i, deadline)
	if renews && c.noElement != ReasonNone { // the map may have room by now
		c.noElement = ReasonNone
		m.reconsider(now, i)
	}
}

// renew renews the kernel's timeouts of claim i, which stands.
func (m *Model) renew(now time.Duration, i int32) {
	c := &m.claims[i]
	m.op(Op{Kind: Renew, Permission: c.Permission, By: c.placed.By})
	c.renewal = now + m.policy.Lifetime/2
}

// queryFlows queries the flows of c before it expires, and returns until when to wait for the
// answers.
func (m *Model) queryFlows(now time.Duration, c *claim) time.Duration {
	if c.flows == none {
		return now
	}
	for f := c.flows; f != none; f = m.flows.all[f].next {
		fl := &m.flows.all[f]
		m.op(Op{Kind: Query, Permission: c.Permission, From: m.from(f), FromZone: fl.zone, ID: fl.id})
	}
	return now + m.answerTimeout()
}

// expireOverdue ends claims that are overdue, after a time when flows were not reported.
func (m *Model) expireOverdue(now time.Duration) {
	for i := range m.claims {
		if c := &m.claims[i]; c.state == StateStanding && c.expiry != 0 && now >= c.expiry && m.isOverdue(now, c) {
			m.expire(now, int32(i))
		}
	}
}

// timeoutResolution is how exactly it is known when an earlier daemon last wrote a claim to the kernel, which
// tells the time left of an expectation in seconds.
func (m *Model) timeoutResolution() time.Duration { return min(2*time.Second, m.policy.Lifetime/4) }

// answerTimeout is how long an overdue claim waits for answers before the next look.
func (m *Model) answerTimeout() time.Duration { return max(m.policy.Lifetime/16, m.wheel.grain) }

// FlowMissing handles the answer that the flow of a Query is gone, although no event said
// so. When it ended is unknown, so it refreshes nothing.
func (m *Model) FlowMissing(now time.Duration, o *Op) {
	i := m.find(o.Key, o.Int)
	if i == none {
		return
	}
	for _, child := range []bool{false, true} {
		if n := m.flowOf(i, o.From, child, o.ID); n != none {
			m.removeFlow(n)
			m.flowsChanged(now, i)
			return
		}
	}
}

// expire ends claim i, which had no traffic from inside for a lifetime. If the peer alone
// keeps an outbound flow alive, and no other claim waits, the claim stays refused and
// stands again as soon as it is refreshed.
func (m *Model) expire(now time.Duration, i int32) {
	if m.claims[i].outFlows == 0 || m.hasSuccessor(i) {
		m.end(now, i, ReasonExpired)
		return
	}
	m.withdraw(i, ReasonExpired)
	m.setState(i, StateRefused, ReasonIdle)
}

// Next returns when Tick must be called next. It returns false if nothing is scheduled.
func (m *Model) Next() (time.Duration, bool) { return m.wheel.next() }

// lastPacket returns when the last packet of f passed, from either side, as far as the kernel
// tells. If f has a shorter timeout than other flows, the result is too early. In a
// flowtable the timeout stands still, so the flow counts as just seen.
func (m *Model) lastPacket(now time.Duration, f *Flow) time.Duration {
	if f.Began || f.Status.Has(StatusOffload) {
		return now - f.Late
	}
	kept, left := m.timeouts.UDP, f.Left
	if f.Status.Has(StatusAssured) {
		kept = m.timeouts.Stream
	}
	if left > 0 {
		left += time.Second // it is rounded down
	}
	return now - f.Late - max(0, kept-left)
}
