package cone

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// A snapshot is a dump in progress. Events go on while the dump runs, so a flow
// that ended meanwhile must not come back, and one that began must not count as
// missing.
type snapshot struct {
	gen     uint8         // flows that were seen since the last BeginSnapshot have it
	began   time.Duration // when that was
	before  time.Duration // when the last one began that was whole: all flows were looked at since
	running bool
	whole   bool                // there was one that showed all
	first   bool                // there was none before this one
	showing bool                // the model looks at one of its flows right now
	ended   map[uint32]struct{} // flows that ended while it runs
	inbound []Flow              // looked at last: children find their permission then
	led     map[lead]struct{}   // what flows of forwards in inbound lead to, whoever the peer

	unplaced bool // what the model had before

	inZones map[ends]uint16         // as in skips, of the flows that it showed and of those since
	second  map[netip.Prefix]uint16 // likewise
}

func (s *snapshot) gone(id uint32) {
	if s.running {
		s.ended[id] = struct{}{}
	}
}

// over reports whether flow id ended while the snapshot runs.
func (s *snapshot) over(id uint32) bool {
	_, ok := s.ended[id]
	return ok
}

// BeginSnapshot starts to take in a dump of all flows. It must be called before
// the dump is asked for. A snapshot that is under way is given up.
func (m *Model) BeginSnapshot(now time.Duration) {
	m.snap = snapshot{
		gen: m.snap.gen + 1, whole: m.snap.whole, first: !m.snap.whole, running: true, began: now, before: m.snap.before,
		ended:    make(map[uint32]struct{}),
		unplaced: m.unplaced || m.snap.unplaced,
	}
	m.unplaced = false
}

// SnapshotFlow takes in one flow of the dump.
func (m *Model) SnapshotFlow(now time.Duration, f *Flow) {
	if !m.snap.running || m.snap.over(f.ID) {
		return
	}
	m.seeHelped(now, f)
	m.noteZones(f)
	switch role, _, _ := m.role(f); role {
	case roleOut:
		m.show(now, f)
	case roleEarly: // a permission that comes to stand finds it
		m.show(now, f)
	case roleChild:
		m.snap.inbound = append(m.snap.inbound, *f)
	case roleDNAT:
		if m.unread || !m.policy.Labels { // else it is of no use
			m.snap.keepForwarded(f)
		}
	}
}

// A lead is where DNATed flows lead to.
type lead struct {
	extKey
	in Endpoint
}

// mostForwarded bounds the flows of forwards of the user's that a snapshot keeps.
const mostForwarded = 1 << 13

// keepForwarded keeps f, which may be a child of a permission that is seen later. If
// there are many such flows, one of each forward is enough: anybody outside can make as
// many as the table of conntrack has room for.
func (s *snapshot) keepForwarded(f *Flow) {
	k := lead{extKey{f.Dst, f.OrigZone}, f.ReplySrc}
	_, led := s.led[k]
	if led && len(s.inbound) >= mostForwarded || !led && len(s.led) >= mostForwarded {
		return
	}
	if s.led == nil {
		s.led = make(map[lead]struct{})
	}
	s.led[k] = struct{}{}
	s.inbound = append(s.inbound, *f)
}

func (m *Model) show(now time.Duration, f *Flow) {
	m.snap.showing = true
	m.FlowSeen(now, f)
	m.snap.showing = false
}

// EndSnapshot tells that the dump was whole: flows that it did not show are
// gone. They feed nothing, for nobody knows when they ended.
func (m *Model) EndSnapshot(now time.Duration) {
	if !m.snap.running {
		return
	}
	m.snap.whole, m.snap.unplaced = true, false
	for i := range m.snap.inbound {
		if f := &m.snap.inbound[i]; !m.snap.over(f.ID) {
			m.show(now, f)
		}
	}
	maps.DeleteFunc(m.revoked, func(_ Key, r revocation) bool { return r.in == Endpoint{} }) // no flow of theirs is there
	m.snap.before = m.snap.began
	m.skips.inZones, m.skips.second = m.snap.inZones, m.snap.second
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
	// Claimants that lost their flow go first, so that none of them inherits.
	for _, state := range []State{StateWaiting, StateRefused, StateStanding} {
		for _, i := range changed {
			if m.claims[i].state == state {
				m.settle(now, i)
			}
		}
	}
}

// AbortSnapshot tells that the dump failed: what it showed counts, what it did
// not show proves nothing.
func (m *Model) AbortSnapshot() {
	m.unplaced = m.unplaced || m.snap.unplaced
	m.snap = snapshot{gen: m.snap.gen, whole: m.snap.whole, before: m.snap.before}
}
