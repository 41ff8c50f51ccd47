package cone

import "time"

// The claims of one Key form a queue: the first one stands, or is the next to stand. Those
// that the user revoked come last: they wait for a new flow, and must not hold up others.

// isRevoked reports whether the user revoked c and no new flow has asked for it since.
func (c *claim) isRevoked() bool { return c.state == StateRefused && c.reason == ReasonRevoked }

// enqueue puts claim i into the queue of its Key, ahead of all revoked claims. So the one
// that was revoked last comes first among these, and is denied if no other claim is.
func (m *Model) enqueue(i int32) {
	c := &m.claims[i]
	prev, next := none, m.owner(c.Key)
	for next != none && !m.claims[next].isRevoked() {
		prev, next = next, m.claims[next].nextKey
	}
	c.nextKey = next
	if prev == none {
		m.byKey.set(c.Key, i)
	} else {
		m.claims[prev].nextKey = i
	}
}

// dequeue takes claim i out of the queue of its Key.
func (m *Model) dequeue(i int32) {
	c := &m.claims[i]
	switch prev := m.owner(c.Key); {
	case prev != i:
		for m.claims[prev].nextKey != i {
			prev = m.claims[prev].nextKey
		}
		m.claims[prev].nextKey = c.nextKey
	case c.nextKey == none:
		m.byKey.remove(c.Key)
	default:
		m.byKey.set(c.Key, c.nextKey)
	}
	c.nextKey = none
}

// requeue moves claim i to its new place after it was revoked, or asked for again.
func (m *Model) requeue(i int32) {
	m.dequeue(i)
	m.enqueue(i)
}

// moveFirst moves claim i to the head of the queue of its Key.
func (m *Model) moveFirst(i int32) {
	c := &m.claims[i]
	m.dequeue(i)
	c.nextKey = m.owner(c.Key)
	m.byKey.set(c.Key, i)
}

// skipOverdue handles claim i, which is overdue when it comes first. The next claim of its Key that
// is not overdue stands instead. If there is none, the flows of i are queried: it stands only if
// its host has sent since they were last seen.
func (m *Model) skipOverdue(now time.Duration, i int32) {
	for n := m.claims[i].nextKey; n != none && !m.claims[n].isRevoked(); n = m.claims[n].nextKey {
		if m.isOverdue(now, &m.claims[n]) {
			continue
		}
		m.setState(i, StateWaiting, ReasonConflict)
		m.moveFirst(n)
		m.grant(now, n)
		return
	}
	m.setState(i, StateRefused, ReasonIdle)
	m.queryFlows(now, &m.claims[i])
}

// hasSuccessor reports whether another claim waits for the end of claim i, the first of its
// Key.
func (m *Model) hasSuccessor(i int32) bool {
	next := m.claims[i].nextKey
	return next != none && !m.claims[next].isRevoked()
}
