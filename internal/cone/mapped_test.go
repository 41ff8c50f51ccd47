package cone

import (
	"slices"
	"testing"
	"time"
)

func mapped(p *Policy) { p.Mapped = true }

// both has each permission carried by both.
func both(p *Policy) { choose(ChooseBoth)(p) }

func choose(c Choice) func(*Policy) {
	return func(p *Policy) {
		p.Mapped = true
		p.Subnets = slices.Clone(p.Subnets)
		for i := range p.Subnets {
			p.Subnets[i].Choice = c
		}
	}
}

// dnat lets from send to ext, from where it is DNATed to in.
func (d *desk) dnat(now time.Duration, from, ext, in string, more Status) (*Flow, []OpKind) {
	d.id++
	f := &Flow{
		ID: d.id, Status: StatusDstNAT | more,
		Src: ep(from), Dst: ep(ext), ReplySrc: ep(in), ReplyDst: ep(from),
	}
	d.m.FlowSeen(now, f)
	return f, d.carry()
}

func (d *desk) seen(now time.Duration, f *Flow) []OpKind {
	d.m.FlowSeen(now, f)
	return d.carry()
}

func (d *desk) snapshot(now time.Duration, flows ...*Flow) []OpKind {
	d.m.BeginSnapshot()
	for _, f := range flows {
		d.m.SnapshotFlow(now, f)
	}
	d.m.EndSnapshot(now)
	return d.carry()
}

// view returns the only claim of in.
func (d *desk) view(in string) (v View) {
	d.t.Helper()
	n := 0
	d.m.Walk(0, 1000, func(w View) {
		if w.Int == ep(in) {
			v = w
			n++
		}
	})
	if n != 1 {
		d.t.Fatalf("%d claims of %s, want 1", n, in)
	}
	return v
}

// wantOps checks the kinds of ops.
func (d *desk) wantOps(what string, got []OpKind, want ...OpKind) {
	d.t.Helper()
	if !slices.Equal(got, want) {
		d.t.Errorf("%s: ops %v, want %v", what, got, want)
	}
}

// A flowtable keeps the counters of its flows, and no event tells of them.
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
				f, _ = d.dnat(0, from, ext, in, tc.more)
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
	f, kinds := d.dnat(1, "203.0.113.5:77", ext, in, 0)
	d.wantOps("the child", kinds)
	if v := d.view(in); v.Children != 1 || v.Answered != 0 {
		t.Errorf("%d children, %d answered; want 1, 0", v.Children, v.Answered)
	}
	f.Status |= StatusSeenReply
	d.snapshot(2, f, out)
	if v := d.view(in); v.Children != 1 || v.Answered != 1 || v.Expires != lifetime+2 {
		t.Errorf("%d children, %d answered, ends at %v; want 1, 1, %v", v.Children, v.Answered, v.Expires, lifetime+2)
	}

	// It holds the permission alone, and is asked about before the end.
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
	d.dnat(1, "203.0.113.5:77", ext, in, 0)
	d.dnat(1, "203.0.113.5:78", ext, in, StatusSeenReply)
	d.m.Revoke(2, func(Permission) bool { return true })
	d.wantOps("revoked", d.carry(), Revoke, DropUnanswered)
	_, kinds := d.dnat(3, "203.0.113.5:79", ext, in, 0)
	d.wantOps("the event of a child comes late", kinds, DropUnanswered)
}

func TestDNATedChildrenBeyondTheLimitAreDropped(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	d := newDesk(t, func(p *Policy) { p.Mapped, p.Limits.Children = true, 1 })
	d.open(0, in, "203.0.113.5:9")
	_, kinds := d.dnat(1, "203.0.113.5:77", ext, in, 0)
	d.wantOps("the first child", kinds)
	_, kinds = d.dnat(1, "203.0.113.5:78", ext, in, 0)
	d.wantOps("the child too many", kinds, DropUnanswered)
	if n := d.m.Stats().Crowded; n != 1 {
		t.Errorf("%d crowded, want 1", n)
	}
}

// It may have come in by a forward of the user's. What the permission admitted right
// before that came is another matter.
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
			d.m.SetForwards(0, func(Endpoint) bool { return true })
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
			f, kinds := d.dnat(freshTime, tc.from, ext, tc.to, 0)
			kinds = append(kinds, d.snapshot(freshTime, f)...)
			if slices.Contains(kinds, DropUnanswered) {
				t.Errorf("ops %v, want no flow dropped", kinds)
			}
		})
	}
}

// It bars the expectation; the map comes after it in any case.
func TestForwardBarsByItsTarget(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	for name, tc := range map[string]struct {
		mapped   bool
		from     string
		to       string
		expected bool
	}{
		"mapped, to the mapping's own endpoint":   {true, "192.0.2.77:1", in, true},
		"mapped, to another endpoint":             {true, "192.0.2.77:1", "10.47.11.200:80", false},
		"mapped, to another port of the host":     {true, "192.0.2.77:1", "10.47.11.109:2", false},
		"mapped, the peer itself, elsewhere":      {true, "203.0.113.5:77", "10.47.11.200:80", false},
		"expected, to the mapping's own endpoint": {false, "192.0.2.77:1", in, false},
		"expected, the peer itself":               {false, "203.0.113.5:77", in, false},
		"expected, to another endpoint":           {false, "192.0.2.77:1", "10.47.11.200:80", false},
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
				want := Placement{By: AllCarriers}
				switch {
				case !tc.mapped:
					want = Placement{}
				case !tc.expected:
					want = Placement{ByMap, ReasonForwarded}
				}
				if v.Placement != want || d.by[v.Key] != want.By || (v.State == StateStanding) != tc.mapped || v.State == StateRefused && v.Reason != ReasonForwarded {
					t.Errorf("%s: it is %v (%v), by %+v, want %+v", order, v.State, v.Reason, v.Placement, want)
				}
			}
		})
	}
}

// Two hosts share an outside port. What the permission of one admitted before it
// ended is no forward that would bar the other's, however late its event comes.
func TestChildOfAFormerPermissionIsNoForward(t *testing.T) {
	const one, two, ext = "10.47.11.109:1", "10.47.11.110:1", "198.51.100.1:1"
	d := newDesk(t, mapped)
	d.gone(0, d.open(0, one, "203.0.113.5:9"))
	d.open(0, two, "192.0.2.9:9")
	d.m.Tick(lifetime, 10)
	d.carry()
	d.m.Tick(2*lifetime, 10)
	d.carry()
	var now time.Duration
	for i := range 4 {
		now = 2*lifetime + time.Duration(i)*forwardMemory/2
		child, kinds := d.dnat(now, "203.0.113.5:77", ext, one, StatusSeenReply)
		d.wantOps("the child", kinds)
		d.gone(now, child)
		if f := d.m.forwarded; len(f) > 0 {
			t.Fatalf("forwards %v, want none", f)
		}
	}
	d.dnat(now, "203.0.113.6:77", ext, one, 0) // no permission of this peer's ended
	if f := d.m.forwarded; len(f) != 1 {
		t.Errorf("forwards %v, want one", f)
	}
	d.dnat(now+forwardMemory, "203.0.113.5:78", ext, one, 0) // long forgotten
	if f := d.m.forwarded[extKey{ext: ep(ext)}]; f.seen != now+forwardMemory {
		t.Errorf("forwards %v, want one that was seen just now", d.m.forwarded)
	}
}

func TestFormerPermissionsAreForgottenWhenThereAreTooMany(t *testing.T) {
	s := newFormers()
	nth := func(i int) former {
		return former{Key: Key{Zone: uint16(i >> 16)}, Int: Endpoint{Port: uint16(i)}}
	}
	for i := range 5 * maxForwarded {
		s.add(0, nth(i))
	}
	if n := len(s.recent) + len(s.older); n > 2*maxForwarded {
		t.Errorf("%d are remembered, want at most %d", n, 2*maxForwarded)
	}
	if !s.has(0, nth(5*maxForwarded-1)) {
		t.Error("the newest is forgotten")
	}
}

// A child of ours that was left behind and a forward of the user's, in any order
// and more than once: whoever's endpoint is not all that was seen, has no expectation.
func TestOfSeveralTargetsTheOneThatBarsWins(t *testing.T) {
	const in, ext, other = "10.47.11.109:1", "198.51.100.1:1", "10.47.11.200:80"
	for name, tc := range map[string]struct {
		targets  []string // an hour's third apart
		expected bool
	}{
		"its own, then another":           {[]string{in, other}, false},
		"another, then its own":           {[]string{other, in}, false},
		"another between":                 {[]string{in, other, in}, false},
		"another, and its own for long":   {[]string{other, in, in}, false},
		"another one is long ago":         {[]string{other, in, in, in}, true},
		"two others":                      {[]string{other, "10.47.11.201:80"}, false},
		"two others, then its own":        {[]string{other, "10.47.11.201:80", in, in}, false},
		"two others are long ago":         {[]string{other, "10.47.11.201:80", in, in, in}, true},
		"its own alone for long":          {[]string{in, in, in, in}, true},
		"another once more after a pause": {[]string{other, in, in, in, other, in}, false},
	} {
		t.Run(name, func(t *testing.T) {
			for order, early := range map[string]bool{"permission first": true, "permission last": false} {
				d := newDesk(t, both)
				flow := func(now time.Duration) { d.snapshot(now, d.open(now, in, "203.0.113.5:9")) }
				if early {
					flow(0)
				}
				var now time.Duration
				for i, to := range tc.targets {
					now = time.Duration(i) * forwardMemory / 3
					d.dnat(now, "192.0.2.77:1", ext, to, 0)
				}
				if !early {
					flow(now)
				}
				d.m.SetForwards(now+2*testPolicy.Retry, nil) // at each reconcile
				d.carry()
				if v := d.view(in); (v.By == AllCarriers) != tc.expected || v.By&ByMap == 0 || d.by[v.Key] != v.By {
					t.Errorf("%s: it stands by %v, want it expected: %v", order, v.By, tc.expected)
				}
			}
		})
	}
}

// A forward takes the ports that it covers: what our permission led elsewhere before is
// led anew, but not what is a flow of the forward itself later, nor an answered one.
func TestForwardTakesUnansweredChildren(t *testing.T) {
	const in, ext, other = "10.47.11.109:1", "198.51.100.1:1", "10.47.11.200:80"
	for name, tc := range map[string]struct {
		change  func(*Policy)
		forward func(d *desk)
		want    []OpKind
	}{
		"of a rule, the map":         {mapped, func(d *desk) { d.m.SetForwards(1, func(Endpoint) bool { return true }) }, []OpKind{DropUnanswered}},
		"of a rule, both":            {both, func(d *desk) { d.m.SetForwards(1, func(Endpoint) bool { return true }) }, []OpKind{Revoke, DropUnanswered}},
		"of a rule, by expectations": {choose(ChooseExpectation), func(d *desk) { d.m.SetForwards(1, func(Endpoint) bool { return true }) }, []OpKind{Grant, Revoke, DropUnanswered}},
		"seen by a flow":             {mapped, func(d *desk) { d.dnat(1, "192.0.2.77:1", ext, other, 0) }, []OpKind{DropUnanswered}},
		"seen by a flow, both":       {both, func(d *desk) { d.dnat(1, "192.0.2.77:1", ext, other, 0) }, []OpKind{Revoke, DropUnanswered}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, tc.change)
			d.open(0, in, "203.0.113.5:9")
			lost, _ := d.dnat(0, "203.0.113.5:77", ext, in, 0)
			d.dnat(0, "203.0.113.5:78", ext, in, StatusSeenReply)
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
			if v := d.view(in); v.Placement != (Placement{ByMap, ReasonForwarded}) || v.Children != 1 {
				t.Errorf("it stands by %+v with %d children", v.Placement, v.Children)
			}
			_, kinds = d.dnat(2, "203.0.113.5:79", ext, in, 0)
			d.wantOps("the event of a child comes late", kinds, DropUnanswered)
			f, kinds := d.dnat(1+freshTime, "203.0.113.5:80", ext, in, 0)
			d.wantOps("a child of the map, or of the forward", kinds)
			d.m.SetForwards(2+freshTime, func(Endpoint) bool { return true })
			d.wantOps("the same forward", d.carry())
			late := *f
			late.ID, late.Status = 999, StatusDstNAT|StatusExpected
			late.Src.Port, late.MasterSrc, late.MasterDst = 81, Endpoint{Addr: f.ReplySrc.Addr}, Endpoint{f.Src.Addr, f.Dst.Port}
			d.wantOps("a child of the expectation that is gone", d.seen(3+freshTime, &late), DropUnanswered)
		})
	}
}

// A map that goes away must leave its children, and a forward that led where a
// mapping does counts again.
func TestPolicySwitchesMappedOnAndOff(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	on, off := testPolicy, testPolicy
	on.Mapped = true

	d := newDesk(t, mapped)
	out := d.open(0, in, "203.0.113.5:9")
	child, _ := d.dnat(1, "203.0.113.5:77", ext, in, StatusSeenReply)
	d.m.SetPolicy(2, off)
	d.wantOps("off", d.carry(), Grant, Revoke) // before it goes
	d.snapshot(3, out, child)
	d.want(in)
	if v := d.view(in); v.Children != 1 {
		t.Errorf("%d children are left, want 1", v.Children)
	}
	last, _ := d.dnat(4, "203.0.113.5:78", ext, in, StatusSeenReply) // admitted before it went
	d.want(in)
	d.gone(5, last)
	d.snapshot(2+testPolicy.Lifetime, out, child)
	d.dnat(2+testPolicy.Lifetime, "203.0.113.5:77", ext, in, 0) // nothing of ours could admit this one
	d.want()
	d.gone(3+testPolicy.Lifetime, child)
	if v := d.view(in); v.Children != 0 {
		t.Errorf("%d children after its end", v.Children)
	}

	again := 4 + testPolicy.Lifetime
	d.m.SetPolicy(again, on)
	d.m.Tick(again+2*testPolicy.Retry, 10)
	d.carry()
	d.want(in)
	d.m.SetPolicy(again+2*testPolicy.Retry, off)
	d.wantOps("off once more", d.carry(), Revoke)
	d.want()
}

func TestDNATedChildrenAllocateNothing(t *testing.T) {
	d := newDesk(t, func(p *Policy) { p.Mapped, p.Learned, p.Limits.Children = true, true, 1 })
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	d.open(0, in, "203.0.113.5:9")
	forward, _ := d.dnat(0, "192.0.2.77:1", ext, in, 0)
	child, _ := d.dnat(0, "203.0.113.5:77", ext, in, StatusSeenReply)
	crowded, _ := d.dnat(0, "203.0.113.5:78", ext, in, 0)
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
