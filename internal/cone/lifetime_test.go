package cone

import (
	"testing"
	"time"
)

// A daemon that was stopped for longer than a lifetime reads late what happened meanwhile.
// Nothing of that revives a permission that has run out.
func TestWhatIsToldTooLateExtendsNothing(t *testing.T) {
	const in = "10.47.11.109:1"
	for name, late := range map[string]func(d *desk, now time.Duration, f *Flow){
		"the end of the flow": func(d *desk, now time.Duration, f *Flow) {
			f.OrigPackets, f.HasCounters = 9, true
			d.gone(now, f)
		},
		"the permission was lost": func(d *desk, now time.Duration, f *Flow) {
			d.m.Missing(now, d.view(in).Permission, ByExpectation)
			d.carry()
			d.gone(now, f)
		},
		"it is to be renewed": func(d *desk, now time.Duration, f *Flow) {
			d.m.Tick(now, 10)
			d.carry()
			d.gone(now, f)
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, nil)
			f := d.open(0, in, "203.0.113.5:9")
			d.ops = nil
			now := 2 * lifetime
			late(d, now, f)
			for d.m.Tick(now, 10) {
			}
			d.carry()
			d.m.Tick(now+lifetime/8, 10)
			d.carry()
			d.want()
			for _, o := range d.ops {
				if o.Kind == Grant || o.Kind == Renew {
					t.Errorf("%v", o.Kind)
				}
			}
		})
	}
}

// A dump may show a flow before its late event is read. The event does not count its packets, so
// the next dump must not take those that the first one counted for new.
//
// Fails when an event takes the place of what a dump counted.
func TestLateEventOfAKnownFlowExtendsNothing(t *testing.T) {
	d := newDesk(t, nil)
	d.m.SetTimeouts(Timeouts{UDP: 4 * lifetime, Stream: 4 * lifetime})
	now := 2 * lifetime
	f := d.counted("10.47.11.109:1", "203.0.113.5:9", 2*lifetime)
	d.snapshot(now, f)
	d.want()
	event := *f
	event.Began, event.Late, event.HasCounters, event.OrigPackets = true, now, false, 0
	d.seen(now+1, &event)
	d.snapshot(now+2, f)
	d.want()
	f.OrigPackets++
	d.snapshot(now+3, f)
	d.want("10.47.11.109:1")
}

// What the kernel lost while it was overdue is not granted again, but is renewed at once when
// its host sends before it ends: the renewal shows that it is gone.
//
// Fails when Missing does not note the loss, or refresh leaves the renewal to the next half lifetime.
func TestOverduePermissionThatWasLostIsRefreshedWhenItsHostSends(t *testing.T) {
	const in = "10.47.11.109:1"
	d := newDesk(t, nil)
	d.open(0, in, "203.0.113.5:9")
	for d.m.Tick(lifetime-1, 10) {
	}
	d.wantOps("half a lifetime later", d.carry(), Renew)
	if d.m.Missing(lifetime, d.view(in).Permission, ByExpectation) {
		t.Error("what is overdue was granted again")
	}
	d.wantOps("its host sends", d.seen(lifetime, d.translated(in, "203.0.113.5:10")), Renew)
	d.want(in)
}

// What is left of a flow's timeout tells when its last packet passed, however late the
// daemon looks. A late report was true at an earlier time.
//
// Each case fails when heard ignores what its name says.
func TestPermissionEndsALifetimeAfterTheLastPacket(t *testing.T) {
	const in, minute = "10.47.11.109:1", time.Minute
	timeouts := Timeouts{UDP: minute / 2, Stream: 2 * minute}
	for name, tc := range map[string]struct {
		now    time.Duration
		change func(f *Flow)
		gone   bool
		want   time.Duration // when the flow had its last packet
	}{
		"just now":                 {minute, func(f *Flow) { f.Left = 30 * time.Second }, false, minute},
		"a while ago":              {minute, func(f *Flow) { f.Left = 10 * time.Second }, false, minute - 19*time.Second},
		"a stream":                 {minute, func(f *Flow) { f.Left, f.Status = 100*time.Second, f.Status|StatusAssured }, false, minute - 19*time.Second},
		"in a flowtable":           {minute, func(f *Flow) { f.Left, f.Status = time.Second, f.Status|StatusOffload }, false, minute},
		"with a longer timeout":    {minute, func(f *Flow) { f.Left = time.Hour }, false, minute},
		"over":                     {minute, func(f *Flow) {}, true, minute - 30*time.Second},
		"over, a stream":           {3 * minute, func(f *Flow) { f.Status |= StatusAssured }, true, minute},
		"ended before its time":    {minute, func(f *Flow) { f.Left = 29 * time.Second }, true, minute},
		"told late":                {minute, func(f *Flow) { f.Left, f.Late = 29*time.Second, 20*time.Second }, false, minute - 20*time.Second},
		"its end told late":        {minute, func(f *Flow) { f.Late = 10 * time.Second }, true, minute - 40*time.Second},
		"before it was seen first": {minute, func(f *Flow) { f.Late = minute }, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, func(p *Policy) { p.Lifetime = 10 * minute })
			f := d.open(0, in, "203.0.113.5:9")
			d.m.SetTimeouts(timeouts)
			if tc.change(f); tc.gone {
				d.m.FlowGone(tc.now, f)
			} else {
				d.seen(tc.now, f)
			}
			if got := d.view(in).Expires; got != tc.want+10*minute {
				t.Errorf("it ends at %v, want %v", got, tc.want+10*minute)
			}
		})
	}
}

// A flow that is reported so late that its permission would be over gets none, until it
// shows that it goes on.
func TestFlowToldTooLateHasNoPermission(t *testing.T) {
	const in, other, from = "10.47.11.109:1", "10.47.11.110:2", "203.0.113.5:9"
	d := newDesk(t, nil)
	d.m.SetTimeouts(Timeouts{UDP: 4 * lifetime, Stream: 4 * lifetime})
	f := d.counted(in, from, 4*lifetime)
	f.Late = 2 * lifetime
	d.wantOps("told late", d.seen(3*lifetime, f))
	f.Late = 0
	f.Left = 2*lifetime - time.Second
	d.wantOps("it was silent since", d.snapshot(3*lifetime, f))
	young := d.counted(other, from, 2*lifetime-time.Second)
	young.Late = 2 * lifetime
	d.wantOps("another one, told late", d.seen(3*lifetime, young))
	young.Late, young.Left = 0, 4*lifetime-2*time.Second
	d.wantOps("it is young", d.snapshot(3*lifetime+1, f, young), Grant)
	f.Left = 4*lifetime - 2*time.Second
	d.wantOps("shown again", d.snapshot(3*lifetime+2, f)) // no more packets: somebody else's
	f.OrigPackets++
	d.wantOps("sent again", d.snapshot(3*lifetime+3, f), Grant)
	d.want(in, other)
}

// A flow may have its own timeout (cttimeout), far shorter than others: few seconds left do
// not mean that it is idle.
//
// Fails when heard uses what is left of a flow that begins, and when addFlow does not know
// that counters moved since the last snapshot.
func TestFlowWithAShorterTimeoutHoldsItsPermission(t *testing.T) {
	const in = "10.47.11.109:1"
	d := newDesk(t, nil)
	d.m.SetTimeouts(Timeouts{UDP: 10 * lifetime, Stream: 10 * lifetime})
	f := d.counted(in, "203.0.113.5:9", 10*time.Second)
	f.Began = true
	d.wantOps("it begins", d.seen(lifetime, f), Grant)
	f.Began = false
	now := lifetime
	for range 8 {
		now += lifetime / 2
		f.OrigPackets++
		d.snapshot(now, f)
		for d.m.Tick(now, 10) {
		}
		d.carry()
		d.want(in)
	}
	// Not sent since the last snapshot.
	for range 4 {
		now += lifetime / 2
		d.snapshot(now, f)
		for d.m.Tick(now, 10) {
		}
		d.carry()
	}
	d.want()
}

// When the first snapshot shows the flows of two hosts on one outside port, both may have
// been silent for a lifetime. The one that sends next gets the permission.
//
// Fails when claimOut lets a known flow wait behind an idle owner.
func TestWhoSendsFirstAfterALifetimeHasThePermission(t *testing.T) {
	d := newDesk(t, nil)
	d.m.SetTimeouts(Timeouts{UDP: 4 * lifetime, Stream: 4 * lifetime})
	first := d.counted("10.47.11.109:1", "203.0.113.5:9", lifetime)
	second := d.counted("10.47.11.110:1", "203.0.113.5:10", lifetime)
	d.wantOps("both are old", d.snapshot(lifetime, first, second))
	second.OrigPackets++
	second.Left = 4*lifetime - time.Second
	d.wantOps("one sends", d.snapshot(lifetime+1, first, second), Grant)
	d.want("10.47.11.110:1")
}

// The first dump after a start cannot tell which side sent last, so a peer that alone goes on
// sending gets one lifetime more. Later dumps can.
//
// Fails when such a peer extends the permission beyond a lifetime after the start.
func TestPeerThatSendsAcrossAStartExtendsOnce(t *testing.T) {
	const in = "10.47.11.109:1"
	d := newDesk(t, nil)
	f := d.counted(in, "203.0.113.5:9", 0)
	f.Status |= StatusSeenReply | StatusAssured
	d.m.SetTimeouts(Timeouts{UDP: lifetime / 2, Stream: 2 * lifetime})
	d.m.Adopt(0, Permission{Key: Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr}, Int: f.Src}, ByExpectation, lifetime/2)
	d.up[Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr}] = f.Src
	d.by[Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr}] = ByExpectation
	for now := time.Duration(0); now < 2*lifetime; now += lifetime / 8 {
		f.Left = 2 * lifetime // the peer has just sent
		f.ReplyPackets++
		d.snapshot(now, f)
		for d.m.Tick(now, 10) {
		}
		d.carry()
		switch {
		case now < lifetime:
			d.want(in)
		case now > lifetime+lifetime/8: // a look later
			d.want()
		}
	}
}

// Somebody sets the counters of flows to zero, as "conntrack -L -z" does, while the peer alone goes
// on sending.
//
// Fails when counters that went down are taken for packets from inside, and when packets after that
// do not count.
func TestCountersThatAreZeroedExtendNothing(t *testing.T) {
	const in = "10.47.11.109:1"
	for _, sends := range []bool{false, true} {
		d := newDesk(t, nil)
		f := d.counted(in, "203.0.113.5:9", 2*lifetime)
		f.Status |= StatusSeenReply | StatusAssured
		d.m.SetTimeouts(Timeouts{UDP: lifetime / 2, Stream: 2 * lifetime})
		f.OrigPackets = 1000
		for now := time.Duration(0); now < 2*lifetime; now += lifetime / 8 {
			f.Left = 2 * lifetime // somebody has just sent
			f.ReplyPackets++
			if now == lifetime/2 {
				f.OrigPackets, f.ReplyPackets = 0, 1
			}
			if sends {
				f.OrigPackets++
			}
			d.snapshot(now, f)
			for d.m.Tick(now, 10) {
			}
			d.carry()
			switch {
			case sends, now < lifetime:
				d.want(in)
			case now > lifetime+lifetime/8: // a look later
				d.want()
			}
		}
	}
}
