package cone

import "time"

// unreported tracks flows that the kernel does not report when they begin, because it learned
// their permission by itself. The model finds them in snapshots, or when they end.
type unreported struct {
	hiding   bool // the kernel hides them now
	possible bool // there may be some that began since the last complete snapshot
	// Children that were counted although no claim of their permission was known: since the
	// last snapshot, and before it.
	counted, earlier map[uint32]struct{}
	// Flows that were not known when they ended. Their Late counts from time 0.
	ended []Flow
}

// mostEnded bounds the ended flows that wait for TakeEnded; others give no permission.
const mostEnded = 1 << 16

// SetLean tells the model whether the kernel hides flows whose permission it learned. Call it
// before the kernel begins to hide them, and after it ends that.
func (m *Model) SetLean(on bool) {
	m.unreported.hiding = on
	m.unreported.possible = m.unreported.possible || on
	m.snap.reported = m.snap.reported && !on
}

// Lean reports whether the kernel hides flows now.
func (m *Model) Lean() bool { return m.unreported.hiding }

// Known returns the time up to which the model knows all flows, at most now.
func (m *Model) Known(now time.Duration) time.Duration {
	if m.unreported.possible {
		return m.snap.before
	}
	return now
}

// noteEnded keeps f, whose beginning was not reported, for TakeEnded.
func (u *unreported) noteEnded(now time.Duration, f *Flow) {
	if len(u.ended) < mostEnded {
		u.ended = append(u.ended, *f)
		u.ended[len(u.ended)-1].Late -= now
	}
}

// ManyEnded reports whether so many flows wait for TakeEnded that the caller should not wait
// for the next snapshot.
func (m *Model) ManyEnded() bool { return len(m.unreported.ended) >= mostEnded/2 }

// TakeEnded returns the flows that ended since the last call and that the model had not known.
// The event of a flow does not tell whether its source was faked: the caller hands those that
// were surely sent by their source back to SeeEnded.
func (m *Model) TakeEnded() []Flow {
	ended := m.unreported.ended
	m.unreported.ended = nil
	return ended
}

// SeeEnded handles a flow that TakeEnded returned.
func (m *Model) SeeEnded(now time.Duration, f *Flow) {
	f.Late += now
	role, p, _ := m.role(f)
	if role != roleOut {
		return
	}
	m.seeDumped(now, f)
	m.outGone(now, f, p)
}

// showed notes the end of a complete snapshot. reported says that the kernel hid no flow since
// the snapshot began. It returns whether all flows are known now and were not before.
func (u *unreported) snapshotEnded(reported bool) (all bool) {
	was := u.possible
	u.possible = u.hiding || u.possible && !reported
	u.earlier, u.counted = u.counted, nil
	return was && !u.possible
}

// passedBefore reports whether f, a child of claim i or of no claim that is known, has
// counted as passed before, while its claim was not known.
func (m *Model) passedBefore(f *Flow, i int32) bool {
	u := &m.unreported
	return m.snap.fromDump && u.has(f.ID) || i == none && (u.possible || m.snap.running) && !u.count(f.ID)
}

// staysUnclaimed reports whether f, a child of a permission that does not stand, was there
// when the last snapshot ended: this snapshot would show a flow that was not reported. It notes
// other children for the next snapshot, because the flow of their permission may have begun
// when the dump was past it.
func (m *Model) staysUnclaimed(f *Flow) bool {
	_, old := m.unreported.earlier[f.ID]
	if !old {
		m.unreported.count(f.ID)
	}
	return old && m.snap.fromDump
}

// count notes a child of an unknown claim. It returns false if that child counted before.
func (u *unreported) count(id uint32) bool {
	if u.has(id) {
		return false
	}
	const most = 1 << 16
	if u.counted == nil {
		u.counted = make(map[uint32]struct{})
	}
	if len(u.counted) < most {
		u.counted[id] = struct{}{}
	}
	return true
}

func (u *unreported) has(id uint32) bool {
	_, now := u.counted[id]
	_, before := u.earlier[id]
	return now || before
}

// holds reports whether the model knows f, an outbound flow that gives p.
func (m *Model) holds(f *Flow, p Permission) bool {
	first, n := m.policy.expand(&p)
	for i := range n {
		p.Peer = first.Plus(i)
		if c := m.find(p.Key, p.Int); c != none && m.flowOf(c, f.ReplySrc, false, f.ID) != none {
			return true
		}
	}
	return false
}
