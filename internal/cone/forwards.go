package cone

import "time"

// forwardMemory is how long a port counts as forwarded after the last flow through a
// forward was seen that no rule tells of.
const forwardMemory = 5 * time.Minute

// maxForwarded bounds the memory that a forward of all ports can cost.
const maxForwarded = 1 << 16

// shown are the outside endpoints whose forwards flows showed, and when they did last. If
// there are too many, the older half is forgotten.
type shown struct {
	recent, older map[extKey]time.Duration
}

func newShown() shown {
	return shown{recent: make(map[extKey]time.Duration), older: make(map[extKey]time.Duration)}
}

func (s *shown) add(now time.Duration, e extKey) {
	if _, known := s.recent[e]; !known && len(s.recent) >= maxForwarded/2 {
		s.recent, s.older = s.older, s.recent
		clear(s.recent)
	}
	s.recent[e] = now
}

func (s *shown) has(now time.Duration, e extKey) bool {
	seen, ok := s.recent[e]
	if !ok {
		seen, ok = s.older[e]
	}
	return ok && now-seen < forwardMemory
}

// showForward notes that a flow to e, which is none of ours, was DNATed, and takes the
// expectations away that this bars.
func (m *Model) showForward(now time.Duration, e extKey) {
	known := m.shown.has(now, e)
	m.shown.add(now, e)
	if !known {
		m.withdrawForwarded(now, e)
	}
}

// forwarded reports whether a forward of the user's covers an outside endpoint, by his
// rules or by what flows show.
func (m *Model) forwarded(now time.Duration, e extKey) bool {
	return m.ruled != nil && m.ruled(e.ext) || m.unread && m.shown.has(now, e)
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
