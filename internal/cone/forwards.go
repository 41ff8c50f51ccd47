package cone

import (
	"slices"
	"time"
)

// A Forwarding says where forwards of the user's may lead packets of a permission's peers. A
// greater one outweighs the others.
type Forwarding uint8

// The forwardings.
const (
	NotForwarded       Forwarding = iota
	ForwardedHere                 // to the permission's own endpoint alone
	ForwardedElsewhere            // to another or an unknown one
	ForwardedAll                  // likewise, and all of them: none reaches the map
)

// forwardMemory is how long a port counts as forwarded after the last flow through a
// forward that no known rule explains.
const forwardMemory = 5 * time.Minute

// maxForwarded bounds the memory that a forward of all ports can cost: entries of a recent.
const maxForwarded = 1 << 16

// seenForwards holds the outside endpoints whose forwards were seen in flows, each with the flow
// that showed it last. A flow that a rule explains is no evidence of another forward, not
// even when that rule is gone. If there are too many, the older half is forgotten.
type seenForwards struct {
	flows recent[extKey, forwardSeen]
	ruled recent[uint32, struct{}] // IDs of flows that a rule explained
}

// forwardSeen is the flow that showed a forward last.
type forwardSeen struct {
	at   time.Duration
	peer Addr
	id   uint32
}

func newSeenForwards() seenForwards {
	return seenForwards{newRecent[extKey, forwardSeen](), newRecent[uint32, struct{}]()}
}

func (s *seenForwards) has(now time.Duration, e extKey) bool {
	by, ok := s.flows.get(e)
	return ok && now-by.at < forwardMemory
}

// A recent holds the entries that were put into it last.
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

// seeForward handles f, a DNATed flow to e that is not ours. If no rule explains it, the
// expectations on that endpoint end.
func (m *Model) seeForward(now time.Duration, f *Flow, e extKey) {
	if m.isForwarded(e, f.Src.Addr) {
		m.seenForwards.ruled.put(f.ID, struct{}{})
		return
	}
	if _, told := m.seenForwards.ruled.get(f.ID); told {
		return
	}
	known := m.seenForwards.has(now, e)
	m.seenForwards.flows.put(e, forwardSeen{now, f.Src.Addr, f.ID})
	if !known {
		m.withdrawForwarded(now, e)
	}
}

// explainForwards forgets forwards that flows showed and rules now explain.
func (m *Model) explainForwards() {
	for _, some := range []map[extKey]forwardSeen{m.seenForwards.flows.newer, m.seenForwards.flows.older} {
		for e, by := range some {
			if m.isForwarded(e, by.peer) {
				delete(some, e)
				m.seenForwards.ruled.put(by.id, struct{}{})
			}
		}
	}
}

// isForwarded reports whether the user's rules forward what peer sends to e, to any destination.
func (m *Model) isForwarded(e extKey, peer Addr) bool {
	return m.forwarding(Permission{Key: Key{Ext: e.ext, Peer: peer, Zone: e.zone}}) != NotForwarded
}

// forwarding says where the user's rules may lead packets of peers of p.
func (m *Model) forwarding(p Permission) Forwarding {
	if m.forwards == nil {
		return NotForwarded
	}
	return m.forwards(p)
}

// forwarded says why p has no expectation, if a user's forward may take packets of its peers,
// according to the rules or to flows seen. One to the endpoint of p takes them too: it may
// translate their sources, and neither limits nor diversions of p concern it. shut says that there is
// such a one, and that the user's firewall drops what it takes.
func (m *Model) forwarded(now time.Duration, p *Permission) (why Reason, shut bool) {
	switch f := m.forwarding(*p); {
	case f >= ForwardedElsewhere, m.forwardsUnknown && m.seenForwards.has(now, p.extKey()):
		return ReasonForwarded, false
	case f == ForwardedHere && slices.ContainsFunc(m.policy.Shut, func(s Shut) bool { return s.has(p) }):
		return ReasonNone, true
	case f == ForwardedHere:
		return ReasonForwardedHere, false
	}
	return ReasonNone, false
}

// retryForwarded grants claim i if it was refused for a forward that is gone, or leads elsewhere now.
func (m *Model) retryForwarded(now time.Duration, i int32) {
	c := &m.claims[i]
	if c.state != StateRefused || !c.reason.isForward() || m.owner(c.Key) != i {
		return
	}
	if why, _ := m.forwarded(now, &c.Permission); why != c.reason {
		m.grant(now, i)
	}
}

// withdrawForwarded withdraws what conflicts with a new forward of one outside endpoint.
func (m *Model) withdrawForwarded(now time.Duration, e extKey) {
	// Collect the claims first: one that ends may let another stand, which may evict a
	// third.
	var conflicting []int32
	if i, ok := m.byExt[e]; ok {
		for ; i != none; i = m.claims[i].extNext {
			conflicting = append(conflicting, i)
		}
	}
	for _, i := range conflicting {
		m.reconsider(now, i)
	}
}
