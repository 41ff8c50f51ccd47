package cone

import (
	"maps"
	"time"
)

const (
	// revokedMemory is how long the model remembers a revocation that no claim holds.
	revokedMemory = 2 * time.Hour
	// mostRevoked limits the number of these revocations.
	mostRevoked = 1 << 16
)

// A revocation remembers a revoked permission that has no claim now. Flows that existed when it
// was revoked must not bring it back.
type revocation struct {
	in    Endpoint // the inside endpoint; zero if an earlier daemon revoked it
	noted time.Duration
}

// Revoked tells a new model what the user revoked under an earlier daemon: the flows of the
// first snapshot do not bring it back.
func (m *Model) Revoked(now time.Duration, keys []Key) {
	for _, k := range keys {
		m.noteRevoked(now, k, Endpoint{})
	}
}

// noteRevoked remembers a revocation, if there is room.
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

// revokedBefore reports whether f, which asks for p, existed when the user revoked p. A flow
// that an event reports began after that, so it ends the revocation. The user may have revoked
// the permission for the peer or the one for its group, because the carrier decides which of
// the two there is, and may have changed since then.
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

// markRevoked marks claim i, which is not in the kernel, as revoked.
func (m *Model) markRevoked(i int32) {
	m.claims[i].ends = 0
	m.setState(i, StateRefused, ReasonRevoked)
	m.requeue(i)
}

// keepDenied denies claim i, which was revoked, and schedules the next denial: revoked
// claims, unlike other refused ones, are not retried, so nothing else would renew it.
func (m *Model) keepDenied(now time.Duration, i int32) {
	m.deny(i)
	m.claims[i].retry = now + m.policy.Retry
	m.wheel.schedule(i, m.claims[i].retry)
}
