package cone

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// in returns inside endpoint i, which has an outside port of its own.
func in(i int) string { return fmt.Sprintf("10.47.11.109:%d", i) }

const roomPeer = "203.0.113.5:9"

// carriers checks what carries the permissions of inside endpoints 1 to len(want).
func (d *desk) carriers(what string, want ...Carriers) {
	d.t.Helper()
	var got []Carriers
	for i := range want {
		k := Key{Ext: Endpoint{ep("198.51.100.1:1").Addr, uint16(i + 1)}, Peer: ep(roomPeer).Addr}
		got = append(got, d.by[k])
	}
	if !slices.Equal(got, want) {
		d.t.Errorf("%s: carried by %v, want %v", what, got, want)
	}
	expected := 0
	for _, by := range d.by {
		expected += int(by & ByExpectation)
	}
	if n := d.m.Stats().Expected; n != expected {
		d.t.Errorf("%s: Stats.Expected is %d, want %d", what, n, expected)
	}
}

func (d *desk) room(now time.Duration, fresh, live int) {
	d.m.SetRoom(now, Room{New: fresh, Live: live, Lack: ReasonNoRoom})
	d.carry()
}

// Fails when place does not ask for room, and when a refusal is for good.
func TestExpectationsBeyondTheRoomAreTriedAgain(t *testing.T) {
	d := newDesk(t, nil)
	d.room(0, 2, 2)
	var flows []*Flow
	for i := range 4 {
		flows = append(flows, d.open(0, in(i+1), roomPeer))
	}
	d.carriers("with room for two", ByExpectation, ByExpectation, 0, 0)
	if v := d.view(in(3)); v.State != StateRefused || v.Reason != ReasonNoRoom {
		t.Errorf("the third is %v for %q", v.State, v.Reason)
	}
	d.m.Tick(testPolicy.Retry, 10)
	d.carry()
	d.carriers("tried again in vain", ByExpectation, ByExpectation, 0, 0)
	d.room(testPolicy.Retry, 3, 3)
	for range 4 { // one of the two that wait is tried first
		d.m.Tick(3*testPolicy.Retry, 10)
		d.carry()
	}
	if n := d.m.Stats().Expected; n != 3 {
		t.Errorf("with room for three %d stand", n)
	}
	d.room(3*testPolicy.Retry, 9, 9)
	d.m.Tick(6*testPolicy.Retry, 10)
	d.carry()
	d.carriers("with room for all", ByExpectation, ByExpectation, ByExpectation, ByExpectation)
	for _, f := range flows {
		d.gone(6*testPolicy.Retry, f)
	}
	d.room(6*testPolicy.Retry, 0, 0)
	d.carriers("without flows and room", 0, 0, 0, 0)
}

// Fails when makeRoom takes those with a live flow, or the youngest.
func TestIdleExpectationsMakeWay(t *testing.T) {
	for name, tt := range map[string]struct {
		choice func(*Policy)
		left   Carriers // to the one that made way
	}{
		"expectations alone": {nil, 0},
		"the map goes on":    {both, ByMap},
	} {
		t.Run(name, func(t *testing.T) {
			all := ByExpectation
			d := newDesk(t, tt.choice)
			if d.m.policy.Subnets[0].Choice == ChooseBoth {
				all = AllCarriers
			}
			d.room(0, 3, 3)
			live := d.open(0, in(1), roomPeer)
			older, old := d.open(0, in(2), roomPeer), d.open(0, in(3), roomPeer)
			d.gone(1, older)
			d.gone(2, old)
			d.carriers("at first", all, all, all)
			d.open(3, in(4), roomPeer)
			d.carriers("a fourth wants room", all, tt.left, all, all)
			d.open(4, in(5), roomPeer)
			d.carriers("a fifth", all, tt.left, tt.left, all, all)
			d.open(5, in(6), roomPeer)
			d.carriers("a sixth finds none that is idle", all, tt.left, tt.left, all, all, tt.left)
			d.gone(6, live)
		})
	}
}

// A full table takes the expectations of idle permissions first, then the others, the oldest
// first.
//
// Fails when SetRoom does not end any, and when Live is taken for New.
func TestLessRoomEndsExpectations(t *testing.T) {
	for name, tt := range map[string]struct {
		choice    func(*Policy)
		all, left Carriers
		state     State
	}{
		"expectations alone": {nil, ByExpectation, 0, StateRefused},
		"the map goes on":    {both, AllCarriers, ByMap, StateStanding},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, tt.choice)
			d.room(0, 9, 9)
			d.open(0, in(1), roomPeer)
			d.open(0, in(2), roomPeer)
			d.gone(1, d.open(0, in(3), roomPeer))
			d.gone(1, d.open(0, in(4), roomPeer))
			d.room(2, 3, 4)
			d.carriers("room for three", tt.all, tt.all, tt.left, tt.all)
			d.room(2, 0, 2)
			d.carriers("room for live ones alone", tt.all, tt.all, tt.left, tt.left)
			d.room(2, 0, 1)
			d.carriers("room for one live", tt.left, tt.all, tt.left, tt.left)
			if v := d.view(in(1)); v.State != tt.state || tt.left == 0 && v.Reason != ReasonNoRoom || tt.left != 0 && v.Why != ReasonNoRoom {
				t.Errorf("the first is %v, %q, %q", v.State, v.Reason, v.Why)
			}
			d.room(3, 9, 9)
			d.m.Retry(3, d.view(in(1)).Permission)
			d.m.Tick(2*testPolicy.Retry, 10)
			d.carry()
			d.carriers("room again", tt.all, tt.all)
		})
	}
}

// Only the first snapshot shows which permissions of an earlier daemon have a live flow.
//
// Fails when SetRoom does not wait for it.
func TestNoRoomEndsNothingBeforeTheFirstSnapshot(t *testing.T) {
	d := &desk{t: t, m: New(testPolicy), up: map[Key]Endpoint{}, by: map[Key]Carriers{}}
	d.m.SetTopology(0, testTopology)
	d.room(0, 1, 1)
	var left []Permission
	for i := range 2 {
		p := Permission{Key: Key{Ext: Endpoint{ep("198.51.100.1:1").Addr, uint16(i + 1)}, Peer: ep(roomPeer).Addr}, Int: ep(in(i + 1))}
		left = append(left, p)
		d.m.Adopt(0, p, ByExpectation, lifetime)
		d.up[p.Key], d.by[p.Key] = p.Int, ByExpectation
	}
	d.room(0, 1, 1)
	d.carriers("before", ByExpectation, ByExpectation)
	f := &Flow{ID: 1, Status: StatusSrcNAT, Src: left[0].Int, Dst: ep(roomPeer), ReplySrc: ep(roomPeer), ReplyDst: left[0].Ext}
	d.snapshot(1, f)
	d.room(1, 1, 1)
	d.carriers("after", ByExpectation, 0)
}

// The outside port has all the expectations that it may have.
//
// Fails when peers without a live flow keep a new peer from an expectation, when the newest
// of them ends, and when one with a live flow ends.
func TestIdlePeersOfAPortMakeRoom(t *testing.T) {
	const in = "10.47.11.109:5060"
	d := newDesk(t, nil)
	first, second := d.open(0, in, "203.0.113.1:5060"), d.open(time.Second, in, "203.0.113.2:5060")
	d.open(0, in, "203.0.113.3:5060")
	full := func(now time.Duration, peer string) {
		f := d.translated(in, peer)
		d.m.FlowSeen(now, f)
		p := d.m.Ops()[0].Permission
		d.m.Failed(now, p, ByExpectation, ReasonPeersOnPort)
		d.carry()
	}
	stands := func(want ...string) {
		t.Helper()
		var got []string
		for k := range d.up {
			got = append(got, k.Peer.Netip().String())
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("permissions stand for %q, want %q", got, want)
		}
	}
	full(2*time.Second, "203.0.113.4:5060")
	stands("203.0.113.1", "203.0.113.2", "203.0.113.3")
	d.gone(2*time.Second, first)
	d.gone(3*time.Second, second)
	full(4*time.Second, "203.0.113.5:5060")
	stands("203.0.113.2", "203.0.113.3", "203.0.113.5")
}
