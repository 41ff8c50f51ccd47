package cone

import "time"

// helperMemory is how long a conntrack helper counts as at work between two hosts after it
// was last seen: longer than a permission that it could meet stands by itself.
const helperMemory = time.Hour

// maxHelped bounds the pairs that are remembered.
const maxHelped = 1 << 16

// A pair is an inside address and a peer between which a conntrack helper of the user's
// works. A zero address stands for any.
type pair struct{ in, peer Addr }

// helped reports whether a helper may want an expectation where p would have one. The
// kernel would refuse the helper's, and the helper would drop the user's packet.
func (m *Model) helped(now time.Duration, p *Permission) bool {
	if len(m.pairs) == 0 {
		return false
	}
	for _, k := range [...]pair{{p.Int.Addr, p.Peer}, {peer: p.Peer}, {in: p.Int.Addr}} {
		if seen, ok := m.pairs[k]; ok && now-seen < helperMemory {
			return true
		}
	}
	return false
}

// SeeHelper tells the model that a conntrack helper of the user's works between an inside
// address and a peer. One of them may be zero, for any. Our expectations between them end
// at once.
func (m *Model) SeeHelper(now time.Duration, in, peer Addr) {
	k := pair{in, peer}
	seen, known := m.pairs[k]
	if !known && len(m.pairs) >= maxHelped {
		m.forgetHelpers(now)
	}
	m.pairs[k] = now
	m.stats.Helped = len(m.pairs)
	if known && now-seen < helperMemory || m.stats.Expected == 0 {
		return
	}
	for i := range m.claims {
		c := &m.claims[i]
		if c.placed.By&ByExpectation != 0 && (peer == Addr{} || c.Peer == peer) && (in == Addr{} || c.Int.Addr == in) {
			m.reconsider(now, int32(i))
		}
	}
}

// forgetHelpers makes room for a pair: it forgets the old ones, or any one if none is old.
func (m *Model) forgetHelpers(now time.Duration) {
	for k, seen := range m.pairs {
		if now-seen >= helperMemory {
			delete(m.pairs, k)
		}
	}
	for k := range m.pairs {
		if len(m.pairs) < maxHelped {
			return
		}
		delete(m.pairs, k)
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
	if _, _, inside := m.policy.subnet(f.Src.Addr.Netip()); inside {
		m.SeeHelper(now, f.Src.Addr, f.ReplySrc.Addr)
	} else if _, _, inside := m.policy.subnet(f.ReplySrc.Addr.Netip()); inside {
		m.SeeHelper(now, f.ReplySrc.Addr, f.Src.Addr)
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
