package cone

import (
	"iter"
	"slices"
	"testing"
	"time"
)

// A flowtable does not update the counters of its flows, and no event reports them.
func TestFlowInAFlowtableFeedsThoughItsCountersStandStill(t *testing.T) {
	const in, from, ext = "10.47.11.109:1", "203.0.113.5:77", "198.51.100.1:1"
	for name, tc := range map[string]struct {
		child bool
		more  Status
		fed   bool
	}{
		"the inside host's own":               {false, StatusOffload, true},
		"its own, in a network card":          {false, StatusOffload | StatusHWOffload, true},
		"its own, not in a flowtable":         {false, 0, false},
		"an answered child":                   {true, StatusOffload | StatusSeenReply, true},
		"an answered one, not in a flowtable": {true, StatusSeenReply, false},
		"a child that nobody answered":        {true, StatusOffload, false},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, mapped)
			f := d.open(0, in, "203.0.113.5:9")
			f.OrigPackets = 1 // the one that made it
			if tc.child {
				f, _ = d.admit(0, from, ext, in, tc.more)
			}
			f.HasCounters = true
			f.Status |= tc.more
			check := func(how string, now time.Duration) {
				want := lifetime
				if tc.fed {
					want += now
				}
				if got := d.view(in).Expires; got != want {
					t.Errorf("%s: it ends at %v, want %v", how, got, want)
				}
			}
			d.snapshot(2, f)
			check("shown by a snapshot", 2)
			d.seen(3, f)
			check("asked about", 3)
		})
	}
}

func TestDNATedChildIsAChildLikeAnyOther(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	d := newDesk(t, mapped)
	out := d.open(0, in, "203.0.113.5:9")
	f, kinds := d.admit(1, "203.0.113.5:77", ext, in, 0)
	d.wantOps("the child", kinds)
	if v := d.view(in); v.Children != 1 || v.Answered != 0 {
		t.Errorf("%d children, %d answered; want 1, 0", v.Children, v.Answered)
	}
	f.Status |= StatusSeenReply
	d.snapshot(2, f, out)
	if v := d.view(in); v.Children != 1 || v.Answered != 1 || v.Expires != lifetime+2 {
		t.Errorf("%d children, %d answered, ends at %v; want 1, 1, %v", v.Children, v.Answered, v.Expires, lifetime+2)
	}

	// The child alone holds the permission, and is queried before the end.
	d.gone(3, out)
	d.m.Tick(3+lifetime, 10)
	if kinds := d.carry(); !slices.Contains(kinds, Query) {
		t.Errorf("ops %v, want the child asked about", kinds)
	}
	d.seen(3+lifetime, f)
	d.want(in)
	d.gone(4+lifetime, f)
	if v := d.view(in); v.Children != 0 || v.Answered != 0 {
		t.Errorf("%d children, %d answered after its end", v.Children, v.Answered)
	}
	d.m.Tick(4+3*lifetime, 10)
	d.carry()
	d.want()
}

func TestUnansweredDNATedChildrenAreDroppedAtARevoke(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	d := newDesk(t, mapped)
	d.open(0, in, "203.0.113.5:9")
	d.admit(1, "203.0.113.5:77", ext, in, 0)
	d.admit(1, "203.0.113.5:78", ext, in, StatusSeenReply)
	d.m.Revoke(2, func(Permission) bool { return true })
	d.wantOps("revoked", d.carry(), Revoke, DropUnanswered, Deny)
	_, kinds := d.admit(3, "203.0.113.5:79", ext, in, 0)
	d.wantOps("the event of a child comes late", kinds, DropUnanswered)
}

func TestDNATedChildrenBeyondTheLimitAreDropped(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	d := newDesk(t, func(p *Policy) { p.Mapped, p.Limits.Children = true, 1 })
	d.open(0, in, "203.0.113.5:9")
	_, kinds := d.admit(1, "203.0.113.5:77", ext, in, 0)
	d.wantOps("the first child", kinds)
	_, kinds = d.admit(1, "203.0.113.5:78", ext, in, 0)
	d.wantOps("the child too many", kinds, DropUnanswered)
	if n := d.m.Stats().Crowded; n != 1 {
		t.Errorf("%d crowded, want 1", n)
	}
}

// The flow may have come in by a user's forward. That differs from a child that the
// permission admitted just before the forward was made.
func TestDNATedFlowThatAForwardMayHaveLetInIsNeverDropped(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	for name, tc := range map[string]struct {
		from, to string
		prepare  func(d *desk, out *Flow)
	}{
		"nobody sent to the peer":       {"203.0.113.6:77", in, nil},
		"the mapping is another host's": {"203.0.113.5:77", "10.47.11.110:1", nil},
		"the permission ended": {"203.0.113.5:77", in, func(d *desk, out *Flow) {
			d.gone(0, out)
			d.m.Review(0, func(Permission) Reason { return ReasonTableFull })
		}},
		"rules forward the port": {"203.0.113.5:77", in, func(d *desk, _ *Flow) {
			d.m.SetForwards(0, elsewhere, true)
		}},
		"refused, and flows show a forward to the mapping": {"203.0.113.5:77", in, func(d *desk, _ *Flow) {
			d.dnat(0, "192.0.2.77:1", ext, in, 0)
			d.m.Revoke(0, func(Permission) bool { return true })
		}},
		"flows show two forwards": {"203.0.113.5:77", in, func(d *desk, _ *Flow) {
			d.dnat(0, "192.0.2.77:1", ext, in, 0)
			d.dnat(0, "192.0.2.77:2", ext, "10.47.11.200:80", 0)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, mapped)
			out := d.open(0, in, "203.0.113.5:9")
			if tc.prepare != nil {
				tc.prepare(d, out)
			}
			d.carry()
			f, kinds := d.dnat(eventsLate, tc.from, ext, tc.to, 0)
			kinds = append(kinds, d.snapshot(eventsLate, f)...)
			if slices.Contains(kinds, DropUnanswered) {
				t.Errorf("ops %v, want no flow dropped", kinds)
			}
		})
	}
}

// The forward conflicts with the expectation; the map's rule comes after it in any case.
func TestForwardThatAFlowShowsBarsWhateverItsTarget(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	for name, tc := range map[string]struct {
		mapped bool
		from   string
		to     string
	}{
		"mapped, to the mapping's own endpoint":   {true, "192.0.2.77:1", in},
		"mapped, to another endpoint":             {true, "192.0.2.77:1", "10.47.11.200:80"},
		"mapped, to another port of the host":     {true, "192.0.2.77:1", "10.47.11.109:2"},
		"mapped, the peer itself, elsewhere":      {true, "203.0.113.5:77", "10.47.11.200:80"},
		"expected, to the mapping's own endpoint": {false, "192.0.2.77:1", in},
		"expected, the peer itself":               {false, "203.0.113.5:77", in},
		"expected, to another endpoint":           {false, "192.0.2.77:1", "10.47.11.200:80"},
	} {
		t.Run(name, func(t *testing.T) {
			for order, early := range map[string]bool{"forward first": true, "permission first": false} {
				d := newDesk(t, func(p *Policy) {
					if tc.mapped {
						both(p)
					}
				})
				if early {
					d.dnat(0, tc.from, ext, tc.to, 0)
				}
				d.open(1, in, "203.0.113.5:9")
				if !early {
					d.dnat(2, tc.from, ext, tc.to, 0)
				}
				v := d.view(in)
				want := Placement{}
				if tc.mapped {
					want = Placement{By: ByMap, Why: ReasonForwarded}
				}
				if v.Placement != want || d.by[v.Key] != want.By || (v.State == StateStanding) != tc.mapped || v.State == StateRefused && v.Reason != ReasonForwarded {
					t.Errorf("%s: it is %v (%v), by %+v, want %+v", order, v.State, v.Reason, v.Placement, want)
				}
			}
		})
	}
}

// A child whose permission is gone, or was known to an earlier daemon only, shows no
// forward and keeps nobody from an expectation. It is dropped if nobody answered it.
func TestChildWithoutAPermissionIsNoForward(t *testing.T) {
	const one, two, ext = "10.47.11.109:1", "10.47.11.110:1", "198.51.100.1:1"
	for name, tc := range map[string]struct {
		more Status
		want []OpKind
	}{"answered": {StatusSeenReply, nil}, "unanswered": {0, []OpKind{DropUnanswered}}} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, both)
			d.open(0, two, "192.0.2.9:9")
			child, kinds := d.admit(1, "203.0.113.5:77", ext, one, tc.more)
			d.wantOps("the event, which that of its permission may follow", kinds)
			d.wantOps("the next snapshot", d.snapshot(1, child), tc.want...)
			if v := d.view(two); v.By != AllCarriers {
				t.Errorf("another host's stands by %v", v.Placement)
			}

			n := New(d.m.policy.Policy)
			n.SetTopology(0, testTopology)
			n.SetForwards(0, nil, false)
			n.BeginSnapshot(2)
			n.SnapshotFlow(2, child)
			if ops := n.Ops(); len(ops) > 0 {
				t.Errorf("ops %v before it is known which permissions there are", ops)
			}
			n.EndSnapshot(2)
			if got := slices.Collect(opKinds(n.Ops())); !slices.Equal(got, tc.want) {
				t.Errorf("shown to a new model: ops %v, want %v", got, tc.want)
			}
		})
	}
}

func opKinds(ops []Op) iter.Seq[OpKind] {
	return func(yield func(OpKind) bool) {
		for _, o := range ops {
			if !yield(o.Kind) {
				return
			}
		}
	}
}

// If all rules are known, no flow is needed to show what they forward.
func TestFlowsShowForwardsOnlyWhereRulesMayBeMissing(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	for _, whole := range []bool{false, true} {
		d := newDesk(t, both)
		d.m.SetForwards(0, nil, whole)
		d.open(0, in, "203.0.113.5:9")
		d.dnat(1, "192.0.2.77:1", ext, "10.47.11.200:80", 0)
		want := Placement{By: ByMap, Why: ReasonForwarded}
		if whole {
			want = Placement{By: AllCarriers}
		}
		if v := d.view(in); v.Placement != want {
			t.Errorf("whole %v: it stands by %+v, want %+v", whole, v.Placement, want)
		}
		d.m.SetForwards(2, nil, true) // the legacy tables are gone
		d.carry()
		if v := d.view(in); v.Placement != (Placement{By: AllCarriers}) {
			t.Errorf("when all is known: it stands by %+v", v.Placement)
		}
	}
}

func TestForwardsThatFlowsShowAreForgotten(t *testing.T) {
	nth := func(i int) extKey { return extKey{ext: Endpoint{Port: uint16(i)}, zone: uint16(i >> 16)} }
	s := newSeenForwards()
	for i := range 5 * maxForwarded {
		s.flows.put(nth(i), forwardSeen{})
	}
	if n := len(s.flows.newer) + len(s.flows.older); n > maxForwarded {
		t.Errorf("%d are remembered, want at most %d", n, maxForwarded)
	}
	newest := nth(5*maxForwarded - 1)
	if !s.has(forwardMemory-1, newest) || s.has(forwardMemory, newest) || s.has(0, nth(0)) {
		t.Error("the newest is to be remembered for a while, the oldest is not")
	}

	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	d := newDesk(t, both)
	d.dnat(0, "192.0.2.77:1", ext, "10.47.11.200:80", 0)
	f := d.open(1, in, "203.0.113.5:9")
	d.snapshot(forwardMemory, f)
	d.m.Retry(forwardMemory, d.view(in).Permission) // at each reconcile
	d.carry()
	if v := d.view(in); v.By != AllCarriers {
		t.Errorf("it stands by %+v", v.Placement)
	}
}

// A forward takes over the ports that it covers: unanswered children that our permission
// led elsewhere before are dropped. Answered ones, and later flows of the forward itself,
// are not.
func TestForwardTakesUnansweredChildren(t *testing.T) {
	const in, ext, other = "10.47.11.109:1", "198.51.100.1:1", "10.47.11.200:80"
	for name, tc := range map[string]struct {
		change  func(*Policy)
		forward func(d *desk)
		want    []OpKind
	}{
		"of a rule, the map":   {mapped, func(d *desk) { d.m.SetForwards(1, elsewhere, true) }, []OpKind{DropUnanswered}},
		"of a rule, both":      {both, func(d *desk) { d.m.SetForwards(1, elsewhere, true) }, []OpKind{Revoke, DropUnanswered}},
		"seen by a flow":       {mapped, func(d *desk) { d.dnat(1, "192.0.2.77:1", ext, other, 0) }, []OpKind{DropUnanswered}},
		"seen by a flow, both": {both, func(d *desk) { d.dnat(1, "192.0.2.77:1", ext, other, 0) }, []OpKind{Revoke, DropUnanswered}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, tc.change)
			d.open(0, in, "203.0.113.5:9")
			lost, _ := d.admit(0, "203.0.113.5:77", ext, in, 0)
			d.admit(0, "203.0.113.5:78", ext, in, StatusSeenReply)
			d.ops = nil
			tc.forward(d)
			d.carry()
			var kinds []OpKind
			for _, o := range d.ops {
				kinds = append(kinds, o.Kind)
				if o.Kind == DropUnanswered && o.ID != lost.ID {
					t.Errorf("child %d is dropped, want %d", o.ID, lost.ID)
				}
			}
			d.wantOps("the forward", kinds, tc.want...)
			d.gone(1, lost)
			if v := d.view(in); v.Placement != (Placement{By: ByMap, Why: ReasonForwarded}) || v.Children != 1 {
				t.Errorf("it stands by %+v with %d children", v.Placement, v.Children)
			}
			_, kinds = d.admit(2, "203.0.113.5:79", ext, in, 0)
			d.wantOps("the event of a child comes late", kinds, DropUnanswered)
			f, kinds := d.admit(1+eventsLate, "203.0.113.5:80", ext, in, 0)
			d.wantOps("a child of the map, or of the forward", kinds)
			d.m.SetForwards(2+eventsLate, elsewhere, true)
			d.wantOps("the same forward", d.carry())
			late := *f
			late.ID, late.Status = 999, StatusDstNAT|StatusExpected
			late.Src.Port, late.MasterSrc, late.MasterDst = 81, Endpoint{Addr: f.ReplySrc.Addr}, Endpoint{f.Src.Addr, f.Dst.Port}
			d.wantOps("a child of the expectation that is gone", d.seen(3+eventsLate, &late), DropUnanswered)
		})
	}
}

// When the map goes away its children must stay, also those whose events come later.
func TestPolicySwitchesMappedOnAndOff(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	on, off := testPolicy, testPolicy
	on.Mapped = true

	d := newDesk(t, mapped)
	out := d.open(0, in, "203.0.113.5:9")
	child, _ := d.admit(1, "203.0.113.5:77", ext, in, StatusSeenReply)
	d.m.SetPolicy(2, off)
	d.wantOps("off", d.carry(), Grant, Revoke) // before it goes
	d.snapshot(3, out, child)
	last, _ := d.admit(4, "203.0.113.5:78", ext, in, 0)
	d.want(in)
	if v := d.view(in); v.Children != 2 {
		t.Errorf("%d children are left, want 2", v.Children)
	}
	d.dnat(5, "203.0.113.5:79", ext, in, 0)
	d.want()
	d.gone(6, child)
	d.gone(6, last)
	if v := d.view(in); v.Children != 0 {
		t.Errorf("%d children after their end", v.Children)
	}

	d.m.SetPolicy(7, on)
	d.m.Tick(2*testPolicy.Retry, 10)
	d.carry()
	d.want(in)
	d.m.SetPolicy(2*testPolicy.Retry, off)
	d.wantOps("off once more", d.carry(), Revoke)
	d.want()
}

func TestDNATedChildrenAllocateNothing(t *testing.T) {
	d := newDesk(t, func(p *Policy) { p.Mapped, p.Learned, p.Limits.Children = true, true, 1 })
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	d.open(0, in, "203.0.113.5:9")
	forward, _ := d.dnat(0, "192.0.2.77:1", ext, in, 0)
	child, _ := d.admit(0, "203.0.113.5:77", ext, in, StatusSeenReply)
	crowded, _ := d.admit(0, "203.0.113.5:78", ext, in, 0)
	p := d.view(in).Permission
	cycle := func() {
		d.m.FlowSeen(0, forward)
		d.m.FlowSeen(0, child)
		d.m.FlowSeen(0, crowded)
		d.m.FlowGone(0, child)
		d.m.Refused(0, p, ReasonLocalSocket, true) // denied
		d.m.FlowSeen(0, crowded)                   // dropped
		d.m.Tick(0, 1)
		d.m.Ops()
	}
	cycle()
	if n := testing.AllocsPerRun(100, cycle); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Flows that began before nf_conntrack_acct was turned on have no counters, and others
// have. Each extends its permission by what is known of it.
//
// Fails when a flow without counters counts as one whose counters stand still.
func TestFlowWithoutCountersExtendsBesideOneWithThem(t *testing.T) {
	const in, from, ext = "10.47.11.109:1", "203.0.113.5:77", "198.51.100.1:1"
	for name, tc := range map[string]struct {
		child, counters bool
		extends         bool
	}{
		"the inside host's own":            {false, false, true},
		"its own, with counters":           {false, true, false},
		"an answered child":                {true, false, true},
		"an answered child, with counters": {true, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, mapped)
			other := d.open(0, in, "203.0.113.5:9")
			other.OrigPackets, other.HasCounters = 1, true // it is silent
			f := other
			if tc.child {
				f, _ = d.admit(0, from, ext, in, StatusSeenReply)
			} else {
				f = d.open(0, in, "203.0.113.5:10")
				f.OrigPackets = 1
			}
			f.HasCounters = tc.counters
			d.snapshot(2, other, f)
			d.seen(3, other)
			d.seen(3, f)
			want := lifetime
			if tc.extends {
				want += 3
			}
			if got := d.view(in).Expires; got != want {
				t.Errorf("it ends at %v, want %v", got, want)
			}
		})
	}
}

// A child whose event was lost has nevertheless passed the user's firewall.
//
// Fails when a dump does not count it, when each dump does, and when the first dump does,
// whose children may be older than the daemon.
func TestDumpShowsThatChildrenPassed(t *testing.T) {
	d := newDesk(t, choose(ChooseMap))
	f := d.open(0, "10.47.11.109:5060", "203.0.113.5:5060")
	child := &Flow{
		ID: 99, Status: StatusDstNAT, Labelled: true,
		Src: ep("203.0.113.5:5070"), Dst: f.ReplyDst, ReplySrc: f.Src, ReplyDst: ep("203.0.113.5:5070"),
	}
	for range 2 {
		d.snapshot(0, f, child)
		if n := d.m.Passed().Mapped; n != 1 {
			t.Errorf("%d children passed, want 1", n)
		}
	}
	p := testPolicy
	p.Mapped = true
	d.m = New(p)
	d.m.SetTopology(0, testTopology)
	d.snapshot(0, f, child)
	if n := d.m.Passed().Mapped; n != 0 || d.view("10.47.11.109:5060").Children != 1 {
		t.Errorf("%d children of before passed, want 0", n)
	}
}
