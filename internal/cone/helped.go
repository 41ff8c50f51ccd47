package cone

import "time"

// helperMemory is how long a conntrack helper counts as at work between two hosts after it
// was last seen: longer than a permission that it could meet stands by itself.
const helperMemory = time.Hour

// maxHelped bounds the pairs that are remembered.
const maxHelped = 1 << 16

// A pair is an inside address and a peer between which a conntrack helper of the user's
// works. A zero value stands for any. ext is the outside endpoint of a flow that the helper works on:
// some helpers, such as that of TFTP, want an expectation there and nowhere else.
type pair struct {
	in, peer Addr
	ext      Endpoint
}

// helped reports whether a helper may want an expectation where p would have one. The
// kernel would refuse the helper's, and the helper would drop the user's packet.
func (m *Model) helped(now time.Duration, p *Permission) bool {
	if len(m.pairs) == 0 {
		return false
	}
	if p.HostBits > ExpandBits { // few, and of routed hosts alone
		for k, seen := range m.pairs {
			if k.meets(p) && now-seen < helperMemory {
				return true
			}
		}
		return false
	}
	works := func(k pair) bool {
		seen, ok := m.pairs[k]
		return ok && now-seen < helperMemory
	}
	for n := range 1 << p.HostBits {
		peer := p.Peer.Plus(n)
		if works(pair{in: p.Int.Addr, peer: peer}) || works(pair{peer: peer}) || works(pair{peer: peer, ext: p.Ext}) {
			return true
		}
	}
	return works(pair{in: p.Int.Addr})
}

// meets reports whether p is for the two hosts.
func (k pair) meets(p *Permission) bool {
	return (k.in == Addr{} || k.in == p.Int.Addr) && (k.peer == Addr{} || k.peer.WithoutLow(p.HostBits) == p.Peer) &&
		(k.ext == Endpoint{} || k.ext == p.Ext)
}

// SeeHelper tells the model that a conntrack helper of the user's works between an inside
// address and a peer. One of them may be zero, for any. Our expectations between them end
// at once.
func (m *Model) SeeHelper(now time.Duration, in, peer Addr) { m.seePair(now, pair{in: in, peer: peer}) }

func (m *Model) seePair(now time.Duration, k pair) {
	seen, known := m.pairs[k]
	if !known && len(m.pairs) >= maxHelped {
		m.forgetHelpers(now)
	}
	m.pairs[k] = now
	if !known && k.ext == (Endpoint{}) {
		m.stats.Helped++
	}
	if known && now-seen < helperMemory || m.stats.Expected == 0 {
		return
	}
	for i := range m.claims {
		c := &m.claims[i]
		if c.placed.By&ByExpectation != 0 && k.meets(&c.Permission) {
			m.reconsider(now, int32(i))
		}
	}
}

// forgetHelpers makes room for a pair: it forgets the old ones, or any one if none is old.
func (m *Model) forgetHelpers(now time.Duration) {
	for k, seen := range m.pairs {
		if now-seen >= helperMemory {
			m.forgetPair(k)
		}
	}
	for k := range m.pairs {
		if len(m.pairs) < maxHelped {
			return
		}
		m.forgetPair(k)
	}
}

func (m *Model) forgetPair(k pair) {
	if delete(m.pairs, k); k.ext == (Endpoint{}) {
		m.stats.Helped--
	}
}

// seeHelped notes a helper of the user's that works on f, or that expected f: for instance
// the helper of a TCP flow, of which no event tells. It skips our children: on some kernels
// they inherit the helper of their anchor.
func (m *Model) seeHelped(now time.Duration, f *Flow) {
	expected := f.Status.Has(StatusExpected) && f.MasterSrc != (Endpoint{})
	if expected && IsAnchor(f.MasterSrc, f.MasterDst) || !expected && !f.Helped {
		return
	}
	m.SeeHelped(now, f.Src.Addr, f.ReplySrc.Addr, f.ReplyDst)
}

// SeeHelped tells the model of a flow on which a helper of the user's works, by who opened it, who
// answers it, and where the answers go, zero for a flow of TCP. If that is an outside endpoint, other
// hosts may have permissions for the same peer there: hosts share an outside port towards different
// ports of a peer.
func (m *Model) SeeHelped(now time.Duration, opener, answerer Addr, ext Endpoint) {
	if _, _, inside := m.policy.subnet(opener.Netip()); inside {
		m.SeeHelper(now, opener, answerer)
		if ext != (Endpoint{}) {
			m.seePair(now, pair{peer: answerer, ext: ext})
		}
	} else if _, _, inside := m.policy.subnet(answerer.Netip()); inside {
		m.SeeHelper(now, answerer, opener)
	}
}

// A Foreign expectation is one that a conntrack helper of the user's made.
type Foreign struct {
	MasterSrc, MasterDst Addr // original direction of the flow that the helper works on
	Peer                 Addr // who is expected; zero for anybody
	Int                  Addr // where the peer is led; zero if unknown
}

// SeeForeign tells the model of an expectation that is not ours.
func (m *Model) SeeForeign(now time.Duration, x Foreign) {
	src, in := x.MasterSrc, x.Int
	if _, _, inside := m.policy.subnet(src.Netip()); inside {
		m.SeeHelper(now, src, x.MasterDst)
		m.SeeHelper(now, src, x.Peer)
		return
	}
	if _, _, inside := m.policy.subnet(in.Netip()); !inside && (in != (Addr{}) || !m.topo.outside(src.Netip())) {
		return // of a network that is not enabled
	}
	m.SeeHelper(now, in, src)
	if in != (Addr{}) || x.Peer != (Addr{}) {
		m.SeeHelper(now, in, x.Peer)
	}
}
