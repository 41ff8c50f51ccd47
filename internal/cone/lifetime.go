package cone

import "time"

// isIdle reports whether c makes way for another claim: it stands without a live flow that
// is fed from inside, or it is refused for a reason of its own: no inside traffic, a limit,
// or no socket.
func (c *claim) isIdle() bool {
	switch c.state {
	case StateStanding:
		return c.outs == 0 && c.answered == 0
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

// settle decides what becomes of claim i after its flows changed.
func (m *Model) settle(now time.Duration, i int32) {
	c := &m.claims[i]
	switch {
	case c.state != StateStanding && c.outs == 0: // no flow asks for it any more
		m.end(now, i, ReasonExpired)
	case m.isWanted(i) && m.yields(i, c.nextKey):
		m.end(now, i, ReasonYielded)
	}
}

// isOver reports whether c had no traffic from inside for a lifetime.
func (m *Model) isOver(now time.Duration, c *claim) bool { return now >= c.fed+m.policy.Lifetime }

// feed notes traffic from inside for claim i at the given time.
func (m *Model) feed(now time.Duration, i int32, at time.Duration) {
	c := &m.claims[i]
	if c.adopted && at <= c.fed+m.blur() {
		return
	}
	lapsed := c.adopted || m.isOver(now, c) && now >= c.refresh
	c.fed = max(c.fed, at)
	if m.isOver(now, c) {
		return
	}
	if lapsed && c.state == StateStanding { // at once: the kernel may have ended it already
		m.refresh(now, i)
		c.adopted = false
		m.wheel.schedule(i, min(c.refresh, c.fed+m.policy.Lifetime))
	}
	if c.ends != 0 { // its flows were queried: it no longer ends then
		c.ends = 0
		m.wheel.schedule(i, min(c.refresh, c.fed+m.policy.Lifetime))
	}
	if c.state == StateRefused && c.reason == ReasonIdle {
		m.grant(now, i)
	}
}

// Tick does the work that is due at now (refresh, retry, expiry) for at most limit claims.
// It reports whether more is due.
func (m *Model) Tick(now time.Duration, limit int) (more bool) {
	for range limit {
		i := m.wheel.pop(now)
		if i == none {
			return false
		}
		m.attend(now, i)
	}
	return true
}

func (m *Model) attend(now time.Duration, i int32) {
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

	deadline := c.fed + m.policy.Lifetime
	overdue := m.isOver(now, c)
	if overdue {
		if c.ends == 0 {
			c.ends = m.ask(now, c)
		}
		switch {
		case now < c.ends:
			deadline = c.ends
		case m.unreported.may: // there may be a later flow; EndSnapshot goes on
			deadline = now + m.patience()
		default:
			m.expire(now, i)
			return
		}
	}
	refreshed := now >= c.refresh && !overdue
	if refreshed && c.adopted { // the kernel's timeout goes on; ask shortly before it ends
		refreshed = false
		if c.refresh = deadline - max(m.patience(), m.blur()); now >= c.refresh {
			m.ask(now, c)
			c.refresh = deadline
		}
	}
	if refreshed { // an overdue claim is not refreshed before its flows are queried
		m.refresh(now, i)
	}
	if !overdue {
		deadline = min(c.refresh, deadline)
	}
	m.wheel.schedule(i, deadline)
	if refreshed && c.noElement != ReasonNone { // the map may have room by now
		c.noElement = ReasonNone
		m.reconsider(now, i)
	}
}

// refresh renews the kernel's timeouts of claim i, which stands.
func (m *Model) refresh(now time.Duration, i int32) {
	c := &m.claims[i]
	m.op(Op{Kind: Refresh, Permission: c.Permission, By: c.placed.By})
	c.refresh = now + m.policy.Lifetime/2
}

// ask queries the flows of c before it expires, and returns until when to wait for the
// answers.
func (m *Model) ask(now time.Duration, c *claim) time.Duration {
	if c.flows == none {
		return now
	}
	for f := c.flows; f != none; f = m.flows.all[f].next {
		fl := &m.flows.all[f]
		m.op(Op{Kind: Query, Permission: c.Permission, From: m.from(f), FromZone: fl.zone, ID: fl.id})
	}
	return now + m.patience()
}

// expireOverdue ends claims that are overdue, after a time when flows were not reported.
func (m *Model) expireOverdue(now time.Duration) {
	for i := range m.claims {
		if c := &m.claims[i]; c.state == StateStanding && c.ends != 0 && now >= c.ends && m.isOver(now, c) {
			m.expire(now, int32(i))
		}
	}
}

// blur is how exactly it is known when an earlier daemon last wrote a claim to the kernel, which
// tells the time left of an expectation in seconds.
func (m *Model) blur() time.Duration { return min(2*time.Second, m.policy.Lifetime/4) }

// patience is how long an overdue claim waits for answers before the next look.
func (m *Model) patience() time.Duration { return max(m.policy.Lifetime/16, m.wheel.grain) }

// FlowMissing handles the answer that the flow of a Query is gone, although no event said
// so. When it ended is unknown, so it feeds nothing.
func (m *Model) FlowMissing(now time.Duration, o *Op) {
	i := m.find(o.Key, o.Int)
	if i == none {
		return
	}
	for _, child := range []bool{false, true} {
		if n, ok := m.flows.byKey.find(m.flowKey(i, o.From, child)); ok && m.flows.all[n].id == o.ID {
			m.removeFlow(n)
			m.settle(now, i)
			return
		}
	}
}

// expire ends claim i, which had no traffic from inside for a lifetime. If the peer alone
// keeps an outbound flow alive, and no other claim waits, the claim stays refused and
// stands again as soon as it is fed.
func (m *Model) expire(now time.Duration, i int32) {
	if m.claims[i].outs == 0 || m.isWanted(i) {
		m.end(now, i, ReasonExpired)
		return
	}
	m.withdraw(i, ReasonExpired)
	m.setState(i, StateRefused, ReasonIdle)
}

// Next returns when Tick must be called next. It returns false if nothing is scheduled.
func (m *Model) Next() (time.Duration, bool) { return m.wheel.next() }

// heard returns when the last packet of f passed, from either side, as far as the kernel
// tells. If f has a shorter timeout than other flows, the result is too early. In a
// flowtable the timeout stands still, so the flow counts as just heard.
func (m *Model) heard(now time.Duration, f *Flow) time.Duration {
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
