package cone

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// A snapshot is a dump in progress. Events go on while the dump runs: a flow that ended
// meanwhile must not come back, and a flow that began must not count as missing.
type snapshot struct {
	gen      uint8         // stamped on flows seen since the last BeginSnapshot
	began    time.Duration // time of the last BeginSnapshot
	before   time.Duration // when the last complete snapshot began: all flows were looked at since
	running  bool
	complete bool                       // there was a complete snapshot
	first    bool                       // there was no complete snapshot before this one
	fromDump bool                       // the model handles one of its flows right now
	ended    map[uint32]struct{}        // flows that ended while it runs
	inbound  []Flow                     // handled last, when the permissions of children are known
	targets  map[forwardTarget]struct{} // where flows of forwards in inbound lead, whoever the peer

	unplaced bool // Model.unplaced before this snapshot
	reported bool // the kernel reported all flows since this snapshot began

	inZones map[ends]uint16         // as in skips, but only of flows seen since it began
	second  map[netip.Prefix]uint16 // likewise

	othersLabel bool // as in Model, but only of flows seen since it began
}

func (s *snapshot) noteEnded(id uint32) {
	if s.running {
		s.ended[id] = struct{}{}
	}
}

// over reports whether flow id ended while the snapshot runs.
func (s *snapshot) hasEnded(id uint32) bool {
	_, ok := s.ended[id]
	return ok
}

// BeginSnapshot begins a snapshot, a dump of all flows. Call it before asking for the dump.
// It abandons a snapshot that is under way.
func (m *Model) BeginSnapshot(now time.Duration) {
	m.snap = snapshot{
		gen: m.snap.gen + 1, complete: m.snap.complete, first: !m.snap.complete, running: true, began: now, before: m.snap.before,
		ended:    make(map[uint32]struct{}),
		unplaced: m.unplaced || m.snap.unplaced,
		reported: !m.unreported.hiding,
	}
	m.unplaced = false
}

// SnapshotFlow handles one flow of the dump.
func (m *Model) SnapshotFlow(now time.Duration, f *Flow) {
	if !m.snap.running || m.snap.hasEnded(f.ID) {
		return
	}
	m.seeHelped(now, f)
	m.noteZones(f)
	m.noteLabel(f)
	switch role, _, _ := m.role(f); role {
	case roleOut:
		m.seeDumped(now, f)
	case roleEarly: // kept for a permission that comes to stand later
		m.seeDumped(now, f)
	case roleChild:
		m.snap.inbound = append(m.snap.inbound, *f)
	case roleDNAT:
		if m.forwardsUnknown || !m.labels() { // else nothing needs it
			m.snap.keepForwarded(f)
		}
	}
}

// A forwardTarget is where DNATed flows lead to.
type forwardTarget struct {
	extKey
	in Endpoint
}

// mostForwarded bounds the flows of forwards of the user's that a snapshot keeps.
const mostForwarded = 1 << 13

// keepForwarded keeps f, which may be a child of a permission that is seen later. If there
// are many such flows, it keeps only one of each forward: anybody outside can make as many
// as the conntrack table has room for.
func (s *snapshot) keepForwarded(f *Flow) {
	k := forwardTarget{extKey{f.Dst, f.OrigZone}, f.ReplySrc}
	_, led := s.targets[k]
	if led && len(s.inbound) >= mostForwarded || !led && len(s.targets) >= mostForwarded {
		return
	}
	if s.targets == nil {
		s.targets = make(map[forwardTarget]struct{})
	}
	s.targets[k] = struct{}{}
	s.inbound = append(s.inbound, *f)
}

func (m *Model) seeDumped(now time.Duration, f *Flow) {
	m.snap.fromDump = true
	m.FlowSeen(now, f)
	m.snap.fromDump = false
}

// EndSnapshot says that the dump was complete: flows that it did not show are gone. They
// refresh nothing, because when they ended is unknown.
func (m *Model) EndSnapshot(now time.Duration) {
	if !m.snap.running {
		return
	}
	m.snap.complete, m.snap.unplaced = true, false
	for i := range m.snap.inbound {
		if f := &m.snap.inbound[i]; !m.snap.hasEnded(f.ID) {
			m.seeDumped(now, f)
		}
	}
	maps.DeleteFunc(m.revoked.at, func(r revocation, _ noted) bool { return r.in == Endpoint{} }) // those of an earlier daemon
	m.snap.before = m.snap.began
	if m.unreported.snapshotEnded(m.snap.reported) {
		defer m.expireOverdue(now)
	}
	m.skips.inZones, m.skips.second = m.snap.inZones, m.snap.second
	m.othersLabel = m.snap.othersLabel
	m.AbortSnapshot()
	var changed []int32
	for n := range m.flows.all {
		fl := &m.flows.all[n]
		if fl.claim != none && fl.gen != m.snap.gen {
			changed = append(changed, fl.claim)
			m.removeFlow(int32(n))
		}
	}
	slices.Sort(changed)
	changed = slices.Compact(changed)
	// Begin with claims that do not stand, so that none that lost its flow inherits.
	for _, state := range []State{StateWaiting, StateRefused, StateStanding} {
		for _, i := range changed {
			if m.claims[i].state == state {
				m.flowsChanged(now, i)
			}
		}
	}
}

// AbortSnapshot says that the dump failed: flows that it showed count, but flows that it
// did not show may still be there.
func (m *Model) AbortSnapshot() {
	m.unplaced = m.unplaced || m.snap.unplaced
	m.snap = snapshot{gen: m.snap.gen, complete: m.snap.complete, before: m.snap.before}
}
