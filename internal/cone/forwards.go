package cone

import "time"

// forwardMemory is how long a port counts as forwarded after the last flow
// through the user's rule was seen. A forward that nobody uses for so long can
// be overridden once, until its next flow shows it again.
const forwardMemory = time.Hour

// maxForwarded bounds the memory that a forward of all ports can cost.
const maxForwarded = 1 << 16

// A forward is what DNATed flows that belong to no claim show of one outside
// endpoint: a forward of the user's, or children that outlived their permission.
type forward struct {
	to   Endpoint // inside endpoint of the flow seen last
	seen time.Duration
	// other is when a flow to another endpoint than to was last seen. No more
	// is needed to know for each inside endpoint when a flow to any other one
	// was: to's own is other, everybody else's is seen.
	other time.Duration
}

// forward notes that a flow to e, which belongs to no claim, was DNATed to an
// inside endpoint, and takes the permissions away that this bars.
func (m *Model) forward(now time.Duration, e extKey, to Endpoint) {
	f, known := m.forwarded[e]
	if !known && len(m.forwarded) >= maxForwarded {
		m.forgetForwards(now)
	}
	bars := true
	switch {
	case !known || now-f.seen >= forwardMemory:
		f = forward{to: to, other: now - forwardMemory}
	case f.to != to:
		bars = now-f.other >= forwardMemory // else all are barred already
		f.to, f.other = to, f.seen
	default:
		bars = false
	}
	f.seen = now
	m.forwarded[e] = f
	if bars {
		m.withdrawForwarded(now, e)
	}
}

// forgetForwards makes room in the table of forwards: the old ones go, or, if
// there is none, any one.
func (m *Model) forgetForwards(now time.Duration) {
	for e, f := range m.forwarded {
		if now-f.seen >= forwardMemory {
			delete(m.forwarded, e)
		}
	}
	for e := range m.forwarded {
		if len(m.forwarded) < maxForwarded {
			return
		}
		delete(m.forwarded, e)
	}
}

// forwardBars reports whether flows showed a forward that keeps p from standing.
// Where permissions stand in a map, one that leads to p's own inside endpoint
// takes nothing from anybody, and may be a child that p left behind.
func (m *Model) forwardBars(now time.Duration, p Permission) bool {
	f, ok := m.forwarded[p.extKey()]
	if !ok {
		return false
	}
	if now-f.seen >= forwardMemory {
		delete(m.forwarded, p.extKey())
		return false
	}
	if m.policy.Mapped && f.to == p.Int {
		return now-f.other < forwardMemory
	}
	return true
}

// forwardedTo reports whether a forward of the user's may lead to p's own inside
// endpoint.
func (m *Model) forwardedTo(now time.Duration, p Permission) bool {
	if m.ruled != nil && m.ruled(p.Ext) {
		return true
	}
	f, ok := m.forwarded[p.extKey()]
	return ok && (f.to == p.Int && now-f.seen < forwardMemory || now-f.other < forwardMemory)
}

// freshTime is how long after a forward was noticed a child may still be told of
// that was admitted before.
const freshTime = 2 * time.Second

// seeForwarded takes in that a forward covers the outside endpoint of claim i, which
// stands, as it did not before. The peers' packets are the forward's now, if they are
// among those that it is for: who may have been led elsewhere is led anew.
func (m *Model) seeForwarded(now time.Duration, i int32) {
	c := &m.claims[i]
	m.dropChildren(c)
	if now >= m.freshEnds {
		clear(m.fresh)
	}
	m.fresh[c.extKey()] = struct{}{}
	m.freshEnds = now + freshTime
}

// misled reports whether f, a new child of c that nobody answered, may have been
// admitted before the forward that is for it. One of an expectation was in any case.
func (m *Model) misled(now time.Duration, f *Flow, c *claim) bool {
	if c.placed.Why != ReasonForwarded || f.Status.Has(StatusSeenReply) {
		return false
	}
	_, fresh := m.fresh[c.extKey()]
	return f.Status.Has(StatusExpected) || fresh && now < m.freshEnds
}

// withdrawForwarded withdraws what a forward bars of one outside endpoint.
func (m *Model) withdrawForwarded(now time.Duration, e extKey) {
	// Listed first: one that ends may let another stand, and that evict a third.
	var barred []int32
	if i, ok := m.byExt[e]; ok {
		for ; i != none; i = m.claims[i].extNext {
			barred = append(barred, i)
		}
	}
	for _, i := range barred {
		m.reconsider(now, i)
	}
}

// A former is a claim that ended. The map may have admitted a child of it right
// before, whose event comes only now, and a child that was answered lives on:
// neither is a flow of a forward of the user's.
type former struct {
	Key
	Int Endpoint
}

// formers remembers the claims that ended, for forwardMemory since a flow of
// theirs was seen last. If there are too many, the older ones are forgotten.
type formers struct {
	recent, older map[former]time.Duration
}

func newFormers() formers {
	return formers{recent: make(map[former]time.Duration), older: make(map[former]time.Duration)}
}

func (s *formers) add(now time.Duration, f former) {
	if len(s.recent) >= maxForwarded {
		s.recent, s.older = s.older, s.recent
		clear(s.recent)
	}
	s.recent[f] = now
}

// has reports whether f is remembered. If it is, a flow of it was seen just now.
func (s *formers) has(now time.Duration, f former) bool {
	seen, ok := s.recent[f]
	if !ok {
		seen, ok = s.older[f]
	}
	if !ok || now-seen >= forwardMemory {
		return false
	}
	s.add(now, f)
	return true
}
