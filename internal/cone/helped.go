package cone

import "time"

// helperMemory is how long a conntrack helper counts as at work for two hosts after
// it was last seen: longer than a permission that it could meet stands by itself.
const helperMemory = time.Hour

// maxHelped bounds the memory of it.
const maxHelped = 1 << 16

// A pair is an inside address and a peer, between which a conntrack helper of the
// user's works. Where the inside address is not known it is zero, for any.
type pair struct{ in, peer Addr }

// helped reports whether a helper may want an expectation where p would have one:
// the kernel refuses the helper's then, and the helper drops the user's packet.
func (m *Model) helped(now time.Duration, p *Permission) bool {
	if len(m.pairs) == 0 {
		return false
	}
	seen, ok := m.pairs[pair{p.Int.Addr, p.Peer}]
	if !ok {
		seen, ok = m.pairs[pair{peer: p.Peer}]
	}
	return ok && now-seen < helperMemory
}

// SeeHelper tells the model that a conntrack helper of the user's is at work between
// an inside address, zero if it is not known, and a peer. Expectations of ours leave
// its way at once.
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
		if c.placed.By&ByExpectation != 0 && c.Peer == peer && (in == Addr{} || c.Int.Addr == in) {
			m.reconsider(now, int32(i))
		}
	}
}

// forgetHelpers makes room: the old ones go, or, if there is none, any one.
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

// seeHelped takes in that a helper works on f. A child may have the one of its anchor,
// on kernels that hand it down.
func (m *Model) seeHelped(now time.Duration, f *Flow) {
	if f.Status.Has(StatusExpected) && IsAnchor(f.MasterSrc, f.MasterDst) {
		return
	}
	if _, _, inside := m.policy.subnet(f.Src.Addr.Netip()); inside {
		m.SeeHelper(now, f.Src.Addr, f.ReplySrc.Addr)
	} else if _, _, inside := m.policy.subnet(f.ReplySrc.Addr.Netip()); inside {
		m.SeeHelper(now, f.ReplySrc.Addr, f.Src.Addr)
	}
}
