package cone

import (
	"slices"
	"testing"
)

var (
	seedFlow = Flow{
		ID: 1, Status: StatusSrcNAT,
		Src: ep("10.47.11.109:5060"), Dst: ep("203.0.113.5:5060"),
		ReplySrc: ep("203.0.113.5:5060"), ReplyDst: ep("198.51.100.1:5060"),
	}
	earlyFlow1 = Flow{
		ID:  2,
		Src: ep("203.0.113.5:5070"), Dst: ep("198.51.100.1:5060"),
		ReplySrc: ep("198.51.100.1:5060"), ReplyDst: ep("203.0.113.5:5070"),
	}
)

// carryOut plays a kernel that grants everything and returns the kinds of ops.
func carryOut(m *Model) (kinds []OpKind) {
	for ops := m.Ops(); len(ops) > 0; ops = m.Ops() {
		for _, o := range ops {
			kinds = append(kinds, o.Kind)
			if o.Kind == Grant {
				m.Granted(o.Permission)
			}
		}
	}
	return kinds
}

func TestEarlyFlowIsDroppedWhicheverComesFirst(t *testing.T) {
	for name, flows := range map[string][]*Flow{
		"early packet first":  {&earlyFlow1, &seedFlow},
		"first contact first": {&seedFlow, &earlyFlow1},
	} {
		t.Run(name, func(t *testing.T) {
			m := New(testPolicy)
			m.SetTopology(0, testTopology)
			var kinds []OpKind
			for _, f := range flows {
				m.FlowSeen(0, f)
				kinds = append(kinds, carryOut(m)...)
			}
			if want := []OpKind{Grant, DropEarly}; !slices.Equal(kinds, want) {
				t.Errorf("ops %v, want %v", kinds, want)
			}
		})
	}
}

func TestEarlyFlowThatEndedIsForgotten(t *testing.T) {
	m := New(testPolicy)
	m.SetTopology(0, testTopology)
	m.FlowSeen(0, &earlyFlow1)
	m.FlowGone(0, &earlyFlow1)
	m.FlowSeen(0, &seedFlow)
	if kinds, want := carryOut(m), []OpKind{Grant}; !slices.Equal(kinds, want) {
		t.Errorf("ops %v, want %v", kinds, want)
	}
}

// A flood from outside fills the ring; the newest early flows are known.
func TestIndexOfEarlyFlowsIsBounded(t *testing.T) {
	m := New(testPolicy)
	m.SetTopology(0, testTopology)
	f := earlyFlow1
	for i := range 3 * earlySize {
		f.ID, f.Src.Port = uint32(i+10), uint16(i%60000+1)
		f.Dst.Port = uint16(i % 7)
		f.ReplySrc = f.Dst
		m.FlowSeen(0, &f)
	}
	if n := len(m.early.ring); n != earlySize {
		t.Errorf("the ring has %d places, want %d", n, earlySize)
	}
	linked := 0
	for _, i := range m.early.byKey {
		for ; i != none; i = m.early.ring[i].more {
			linked++
		}
	}
	if linked != earlySize {
		t.Errorf("%d flows are linked, want %d", linked, earlySize)
	}
	m.FlowSeen(0, &earlyFlow1)
	m.FlowSeen(0, &seedFlow)
	if kinds, want := carryOut(m), []OpKind{Grant, DropEarly}; !slices.Equal(kinds, want) {
		t.Errorf("ops %v, want %v", kinds, want)
	}
}

// A child whose permission is gone must not live for as long as its peer sends.
func TestChildWithoutPermissionIsDroppedOnceAllFlowsAreKnown(t *testing.T) {
	child := Flow{
		ID: 3, Status: StatusExpected | StatusDstNAT,
		Src: ep("203.0.113.5:5070"), Dst: ep("198.51.100.1:5060"),
		ReplySrc: ep("10.47.11.109:5060"), ReplyDst: ep("203.0.113.5:5070"),
		MasterSrc: ep("10.47.11.109:0"), MasterDst: ep("203.0.113.5:5060"),
	}
	m := New(testPolicy)
	m.SetTopology(0, testTopology)
	m.FlowSeen(0, &child)
	if kinds := carryOut(m); len(kinds) > 0 {
		t.Errorf("before the first snapshot: %v", kinds)
	}
	m.BeginSnapshot(0)
	m.SnapshotFlow(0, &child)
	m.EndSnapshot(0)
	if kinds, want := carryOut(m), []OpKind{DropUnanswered}; !slices.Equal(kinds, want) {
		t.Errorf("at the snapshot: %v, want %v", kinds, want)
	}
	child.Status |= StatusSeenReply
	m.FlowSeen(0, &child)
	if kinds := carryOut(m); len(kinds) > 0 {
		t.Errorf("answered: %v", kinds)
	}
}

// Deleting the flow helps only if the permission stands.
func TestEarlyFlowStaysWhereTheGrantIsRefusedOrRevoked(t *testing.T) {
	for name, outcome := range map[string]func(m *Model, p Permission){
		"refused": func(m *Model, p Permission) { m.Refused(0, p, ReasonTableFull, false) },
		"revoked": func(m *Model, p Permission) {
			m.Revoke(0, func(Permission) bool { return true })
			m.Granted(p) // the grant was carried out before
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := New(testPolicy)
			m.SetTopology(0, testTopology)
			m.FlowSeen(0, &seedFlow)
			m.FlowSeen(0, &earlyFlow1)
			grant := m.Ops()[0]
			outcome(m, grant.Permission)
			if kinds := carryOut(m); slices.Contains(kinds, DropEarly) {
				t.Errorf("ops %v, want no drop of the early flow", kinds)
			}
		})
	}
}

// Anybody outside can fill the conntrack table with flows to a port that the gateway
// serves, or that a user's rule forwards.
func TestSnapshotKeepsLittleOfAFlood(t *testing.T) {
	for name, tc := range map[string]struct{ labels, rulesRead bool }{
		"children are labelled": {true, true}, "rules cannot be read": {true, false}, "no labels": {false, true},
	} {
		t.Run(name, func(t *testing.T) {
			p := testPolicy
			p.Mapped, p.Labels = true, tc.labels
			m := New(p)
			m.SetTopology(0, testTopology)
			m.SetForwards(0, nil, tc.rulesRead)
			m.BeginSnapshot(0)
			flood := func(n int) {
				for i := range n {
					peer := Endpoint{AddrFrom4([4]byte{60, byte(i >> 16), byte(i >> 8), byte(i)}), 9}
					early := earlyFlow1
					early.ID, early.Src, early.ReplyDst = uint32(2*i+10), peer, peer
					m.SnapshotFlow(0, &early)
					m.SnapshotFlow(0, &Flow{
						ID: uint32(2*i + 11), Status: StatusDstNAT, Src: peer, Dst: ep("198.51.100.1:5000"),
						ReplySrc: ep("10.47.11.111:5000"), ReplyDst: peer,
					})
				}
			}
			flood(mostForwarded)
			kept := len(m.snap.inbound)
			flood(10 * mostForwarded)
			if n := len(m.snap.inbound); n != kept || n > mostForwarded {
				t.Errorf("%d flows kept, and %d of ten times as many", kept, n)
			}
			// Flows that are not part of the flood count as ever, before or after their
			// permission.
			m.SnapshotFlow(0, &Flow{
				ID: 3, Status: StatusDstNAT, Labelled: tc.labels, Src: ep("203.0.113.5:5071"), Dst: ep("198.51.100.1:5060"),
				ReplySrc: ep("10.47.11.109:5060"), ReplyDst: ep("203.0.113.5:5071"),
			})
			m.SnapshotFlow(0, &earlyFlow1)
			m.SnapshotFlow(0, &seedFlow)
			m.EndSnapshot(0)
			if kinds, want := carryOut(m), []OpKind{Grant, DropEarly}; !slices.Equal(kinds, want) {
				t.Errorf("ops %v, want %v", kinds, want)
			}
			if n := m.Stats().Flows; n != 2 {
				t.Errorf("%d flows of the permission, want the host's own and the child", n)
			}
		})
	}
}
