package cone

import (
	"iter"
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
	at   map[revocation]noted
	bits []uint8 // each HostBits that a Key in at has, or had
}

// noted is when a revocation was noted, and which flows existed then, by their ID. Without
// flows, those that a snapshot shows existed.
type noted struct {
	at    time.Duration
	flows []uint32
}

// Revoked is a permission that the user revoked under an earlier daemon.
type Revoked struct {
	Key
	// Flows are the IDs of the flows that asked for it when that daemon stopped. Without
	// them, all flows that exist now did.
	Flows []uint32
}

// Revoked tells a new model what the user revoked under an earlier daemon: the flows of the
// first snapshot do not bring it back, unless they began since then.
func (m *Model) Revoked(now time.Duration, all []Revoked) {
	for _, r := range all {
		m.noteRevoked(now, revocation{r.Key, Endpoint{}}, r.Flows)
	}
}

// AllRevoked returns what the user revoked and no new flow has brought back, for the next
// daemon.
func (m *Model) AllRevoked(now time.Duration) (all []Revoked) {
	flows := make(map[Key][]uint32)
	for i := range m.claims {
		c := &m.claims[i]
		if !c.isRevoked() {
			continue
		}
		for f := c.flows; f != none; f = m.flows.all[f].next {
			if fl := &m.flows.all[f]; !fl.child {
				flows[c.Key] = append(flows[c.Key], fl.id)
			}
		}
	}
	for r, n := range m.revoked.at {
		if _, known := flows[r.Key]; !known && now-n.at <= revokedMemory {
			flows[r.Key] = n.flows
		}
	}
	for k, ids := range flows {
		if len(all) < mostRevoked {
			all = append(all, Revoked{k, ids})
		}
	}
	return all
}

// noteRevoked remembers a revocation, if there is room.
func (m *Model) noteRevoked(now time.Duration, r revocation, flows []uint32) {
	all := &m.revoked
	if all.at == nil {
		all.at = make(map[revocation]noted)
	}
	if len(all.at) >= mostRevoked {
		maps.DeleteFunc(all.at, func(_ revocation, n noted) bool { return now-n.at > revokedMemory })
		if len(all.at) >= mostRevoked {
			return
		}
	}
	all.at[r] = noted{now, flows}
	if !slices.Contains(all.bits, r.HostBits) {
		all.bits = append(all.bits, r.HostBits)
	}
}

// revokedBefore reports whether f, which asks for p, existed when the user revoked p. A flow
// that an event reports began after that, so it ends the revocation, and so does one that is
// none of the flows that were noted.
func (m *Model) revokedBefore(now time.Duration, f *Flow, p *Permission) (is bool) {
	if len(m.revoked.at) == 0 {
		return false
	}
	for r, n := range m.remembered(f, p) {
		if !m.snap.fromDump || now-n.at > revokedMemory || n.excludes(f) {
			delete(m.revoked.at, r)
		} else {
			is = true
		}
	}
	return is
}

// begunSince reports whether f, which asks for p, is known to have begun after an earlier
// daemon stopped, under which the user revoked p.
func (m *Model) begunSince(f *Flow, p *Permission) bool {
	for _, n := range m.remembered(f, p) {
		if n.excludes(f) {
			return true
		}
	}
	return false
}

// excludes reports whether f is not one of the flows that were noted.
func (n *noted) excludes(f *Flow) bool { return n.flows != nil && !slices.Contains(n.flows, f.ID) }

// remembered ranges over the revocations of p, for which f asks. The user may have revoked
// the permission for the peer, for its group or for everybody, because the policy and the
// carrier decide which of them there is, and may have changed since then.
func (m *Model) remembered(f *Flow, p *Permission) iter.Seq2[revocation, noted] {
	return func(yield func(revocation, noted) bool) {
		check := func(k Key) bool {
			for _, in := range [...]Endpoint{p.Int, {}} {
				r := revocation{k, in}
				if n, ok := m.revoked.at[r]; ok && !yield(r, n) {
					return false
				}
			}
			return true
		}
		if !check(p.Key) {
			return
		}
		for _, low := range m.revoked.bits {
			if !check(Key{Ext: p.Ext, Peer: f.ReplySrc.Addr.WithoutLow(low), Zone: p.Zone, HostBits: low}) {
				return
			}
		}
	}
}

// keepRevoked refuses claim i, which does not stand, until a new flow asks for it.
func (m *Model) keepRevoked(now time.Duration, i int32) {
	m.markRevoked(i)
	m.keepDenied(now, i)
}

// markRevoked marks claim i, which is not in the kernel, as revoked.
func (m *Model) markRevoked(i int32) {
	m.claims[i].expiry = 0
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
