package engine

import (
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// willing is a carrier that does everything at once.
type willing struct{ Map }

func (willing) Grant([]cone.Permission, func(int, cone.Reason, error)) {}
func (willing) Revoke([]cone.Permission) error                         { return nil }
func (willing) Renew([]cone.Permission, func(int))                     {}

// Fails when a flow that comes, is renewed and goes costs the engine an allocation.
func TestFlowAllocatesNothing(t *testing.T) {
	now := time.Duration(0)
	e := New(cone.New(policies("map")[0]), Kernel{Map: willing{}}, Config{
		Now: func() time.Duration { return now }, Failed: func(Request, int, error, ...any) {}, Took: func(time.Duration) {}, Between: func() {},
	})
	e.SetServed(fakePorts{}, fakePorts{})
	e.Model.SetTopology(0, topology)
	e.Model.SetForwards(0, nil, true)
	f := &cone.Flow{
		Status: cone.StatusSrcNAT | cone.StatusConfirmed, Began: true, Src: endpoint("10.47.11.109:5060"),
		Dst: endpoint("203.0.113.5:5060"), ReplySrc: endpoint("203.0.113.5:5060"), ReplyDst: endpoint("198.51.100.1:5060"),
	}
	cycle := func() {
		f.ID++
		e.Model.FlowSeen(now, f)
		e.Apply(now)
		if now += lifetime * 3 / 4; e.Model.Stats().Standing != 1 {
			t.Fatal("it does not stand")
		}
		for e.Model.Tick(now, 8) {
		}
		e.Apply(0)
		e.FlowGone(now, f)
		now += 2 * lifetime
		for range 2 {
			for e.Model.Tick(now, 8) {
			}
			e.Apply(0)
		}
	}
	for range 10 {
		cycle()
	}
	if n := testing.AllocsPerRun(100, cycle); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
