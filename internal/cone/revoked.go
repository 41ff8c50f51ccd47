package cone

import (
	"maps"
	"slices"
	"time"
)

const (
	// revokedMemory is how long the model remembers a revocation that no claim holds.
	revokedMemory = 2 * time.Hour
	// mostRevoked limits the number of these revocations.
	mostRevoked = 1 << 16
)

// A revocation is a revoked permission that has no claim now. Flows that existed when it was
// revoked must not bring it back.
type revocation struct {
	Key
	in Endpoint // the inside endpoint; zero if an earlier daemon revoked it
}

// revocations are those that the model remembers.
type revocations struct {
	at   map[revocation]time.Duration // when each was noted
	bits []uint8                      // each Wild that a Key in at has, or had
}

// Revoked tells a new model what the user revoked under an earlier daemon: the flows of the
// first snapshot do not bring it back.
func (m *Model) Revoked(now time.Duration, keys []Key) {
	for _, k := range keys {
		m.noteRevoked(now, revocation{k, Endpoint{}})
	}
}

// noteRevoked remembers a revocation, if there is room.
func (m *Model) noteRevoked(now time.Duration, r revocation) {
	all := &m.revoked
	if all.at == nil {
		all.at = make(map[revocation]time.Duration)
	}
	if len(all.at) >= mostRevoked {
		maps.DeleteFunc(all.at, func(_ revocation, at time.Duration) bool { return now-at > revokedMemory })
		if len(all.at) >= mostRevoked {
			return
		}
	}
	all.at[r] = now
	if !slices.Contains(all.bits, r.Wild) {
		all.bits = append(all.bits, r.Wild)
	}
}

// revokedBefore reports whether f, which asks for p, existed when the user revoked p. A flow
// that an event reports began after that, so it ends the revocation. The user may have revoked
// the permission for the peer, for its group or for everybody, because the policy and the
// carrier decide which of them there is, and may have changed since then.
func (m *Model) revokedBefore(now time.Duration, f *Flow, p *Permission) (is bool) {
	if len(m.revoked.at) == 0 {
		return false
	}
	check := func(k Key) {
		for _, in := range [...]Endpoint{p.Int, {}} {
			at, ok := m.revoked.at[revocation{k, in}]
			switch {
			case !ok:
			case !m.snap.showing || now-at > revokedMemory:
				delete(m.revoked.at, revocation{k, in})
			default:
				is = true
			}
		}
	}
	check(p.Key)
	for _, low := range m.revoked.bits {
		check(Key{Ext: p.Ext, Peer: f.ReplySrc.Addr.WithoutLow(low), Zone: p.Zone, Wild: low})
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
