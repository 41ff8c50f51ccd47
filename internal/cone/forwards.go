package cone

import "time"

// forwardMemory is how long a port counts as forwarded after the last flow through a
// forward was seen that no rule tells of.
const forwardMemory = 5 * time.Minute

// maxForwarded bounds the memory that a forward of all ports can cost.
const maxForwarded = 1 << 16

// shown are the outside endpoints whose forwards flows showed, and the flows that did so
// last. Those of which a rule told are no evidence of another one, and still none when
// that rule is gone. If there are too many, the older half is forgotten.
type shown struct {
	flows recent[extKey, shownBy]
	ruled recent[uint32, struct{}] // identifiers of the flows of which a rule told
}

// shownBy is the flow that showed a forward last.
type shownBy struct {
	at   time.Duration
	peer Addr
	id   uint32
}

func newShown() shown {
	return shown{newRecent[extKey, shownBy](), newRecent[uint32, struct{}]()}
}

func (s *shown) has(now time.Duration, e extKey) bool {
	by, ok := s.flows.get(e)
	return ok && now-by.at < forwardMemory
}

// A recent holds what was put into it last.
type recent[K comparable, V any] struct{ newer, older map[K]V }

func newRecent[K comparable, V any]() recent[K, V] {
	return recent[K, V]{make(map[K]V), make(map[K]V)}
}

func (r *recent[K, V]) put(k K, v V) {
	if _, known := r.newer[k]; !known && len(r.newer) >= maxForwarded/2 {
		r.newer, r.older = r.older, r.newer
		clear(r.newer)
	}
	r.newer[k] = v
}

func (r *recent[K, V]) get(k K) (v V, ok bool) {
	if v, ok = r.newer[k]; !ok {
		v, ok = r.older[k]
	}
	return v, ok
}

func (r *recent[K, V]) drop(k K) {
	delete(r.newer, k)
	delete(r.older, k)
}

// showForward takes in f, a flow to e that is none of ours and was DNATed. If no rule
// tells of it, it takes the expectations away that this bars.
func (m *Model) showForward(now time.Duration, f *Flow, e extKey) {
	if m.leads(e, f.Src.Addr) {
		m.shown.ruled.put(f.ID, struct{}{})
		return
	}
	if _, told := m.shown.ruled.get(f.ID); told {
		return
	}
	known := m.shown.has(now, e)
	m.shown.flows.put(e, shownBy{now, f.Src.Addr, f.ID})
	if !known {
		m.withdrawForwarded(now, e)
	}
}

// explainShown forgets what flows showed of forwards of which rules tell now.
func (m *Model) explainShown() {
	for _, some := range []map[extKey]shownBy{m.shown.flows.newer, m.shown.flows.older} {
		for e, by := range some {
			if m.leads(e, by.peer) {
				delete(some, e)
				m.shown.ruled.put(by.id, struct{}{})
			}
		}
	}
}

// leads reports whether the user's rules forward what a peer sends to e, wherever to.
func (m *Model) leads(e extKey, peer Addr) bool {
	return m.ruled != nil && m.ruled(Permission{Key: Key{Ext: e.ext, Peer: peer, Zone: e.zone}})
}

// forwarded reports whether a forward of the user's may lead peers of p elsewhere than p
// does, by his rules or by what flows show.
func (m *Model) forwarded(now time.Duration, p *Permission) bool {
	return m.ruled != nil && m.ruled(*p) || m.unread && m.shown.has(now, p.extKey())
}

// retryForwarded lets claim i stand, if it was refused for a forward that is gone.
func (m *Model) retryForwarded(now time.Duration, i int32) {
	c := &m.claims[i]
	if c.state == StateRefused && c.reason == ReasonForwarded && m.owner(c.Key) == i && !m.forwarded(now, &c.Permission) {
		m.grant(now, i)
	}
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
