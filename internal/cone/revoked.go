package cone

import (
	"maps"
	"time"
)

const (
	// revokedMemory is how long it is remembered what the user revoked, while no claim has it.
	revokedMemory = 2 * time.Hour
	// mostRevoked bounds how many of these there are.
	mostRevoked = 1 << 16
)

// A revocation is of a permission that no claim has now, or never had in this model. The flows
// that are there must not bring the permission back.
type revocation struct {
	in    Endpoint // the inside endpoint; zero until the first snapshot tells it
	noted time.Duration
}

// Revoked tells a new model what the user revoked while an earlier one was there: the
// flows of the first snapshot do not bring it back.
func (m *Model) Revoked(now time.Duration, keys []Key) {
	for _, k := range keys {
		m.noteRevoked(now, k, Endpoint{})
	}
}

// noteRevoked notes a revocation, if there is room.
func (m *Model) noteRevoked(now time.Duration, k Key, in Endpoint) {
	if m.revoked == nil {
		m.revoked = make(map[Key]revocation)
	}
	if len(m.revoked) >= mostRevoked {
		maps.DeleteFunc(m.revoked, func(_ Key, r revocation) bool { return now-r.noted > revokedMemory })
		if len(m.revoked) >= mostRevoked {
			return
		}
	}
	m.revoked[k] = revocation{in, now}
}

// revokedBefore reports whether f, which asks for p, was there when the user revoked that. A
// flow that is told of by an event began since then: with it the revocation ends. What
// carries a permission may have changed meanwhile, and with it whether there is one for the
// group of a peer or one for each.
func (m *Model) revokedBefore(now time.Duration, f *Flow, p *Permission) (is bool) {
	if len(m.revoked) == 0 {
		return false
	}
	peer := f.ReplySrc.Addr
	low := groupBits(m.policy.groups, peer)
	for _, k := range [...]Key{
		p.Key,
		{Ext: p.Ext, Peer: peer, Zone: p.Zone},
		{Ext: p.Ext, Peer: peer.WithoutLow(low), Zone: p.Zone, Wild: low},
	} {
		r, ok := m.revoked[k]
		switch {
		case !ok || r.in != (Endpoint{}) && r.in != p.Int:
		case !m.snap.showing || now-r.noted > revokedMemory:
			delete(m.revoked, k)
		default:
			is = true
		}
	}
	return is
}

// keepRevoked refuses claim i, which does not stand, until a new flow asks for it.
func (m *Model) keepRevoked(now time.Duration, i int32) {
	m.markRevoked(i)
	m.keepDenied(now, i)
}

// markRevoked notes that claim i, which is not in the kernel, was revoked.
func (m *Model) markRevoked(i int32) {
	m.claims[i].ends = 0
	m.setState(i, StateRefused, ReasonRevoked)
	m.requeue(i)
}

// keepDenied denies claim i, which was revoked, and comes back to do so again:
// unlike the others that are refused, nothing tries it again.
func (m *Model) keepDenied(now time.Duration, i int32) {
	m.deny(i)
	m.claims[i].retry = now + m.policy.Retry
	m.wheel.schedule(i, m.claims[i].retry)
}
