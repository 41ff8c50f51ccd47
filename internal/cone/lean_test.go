package cone

import (
	"slices"
	"testing"
	"time"
)

// leanDesk is a desk whose kernel learns and reports no flow from which it learned. Its model
// has seen one flow, which lives.
func leanDesk(t *testing.T) (*desk, *Flow) {
	t.Helper()
	d := newDesk(t, learned)
	d.m.SetTimeouts(Timeouts{UDP: 10 * time.Second, Stream: 10 * time.Second})
	f := d.open(0, "10.47.11.109:5060", "203.0.113.5:5060")
	d.m.SetLean(true)
	return d, f
}

// tick lets the model work until now.
func (d *desk) tick(now time.Duration) (kinds []OpKind) {
	for {
		at, wanted := d.m.Next()
		if !wanted || at > now {
			return kinds
		}
		d.m.Tick(at, 1000)
		kinds = append(kinds, d.carry()...)
	}
}

// A permission that is about to end waits for a snapshot while all flows are reported. A flow
// that it shows extends the permission.
//
// Fails when the permission ends without such a snapshot, or after one that began while flows
// were hidden: the dump may have been past a flow that began meanwhile.
func TestUnreportedFlowKeepsAPermission(t *testing.T) {
	d, f := leanDesk(t)
	second := d.translated("10.47.11.109:5060", "203.0.113.5:5070")
	second.Left = 9 * time.Second
	d.gone(lifetime-time.Second, f)
	d.tick(2 * lifetime)
	d.snapshot(2 * lifetime)
	if ops := d.tick(2*lifetime + lifetime/4); slices.Contains(ops, Revoke) {
		t.Errorf("ops %v while flows are hidden", ops)
	}
	d.m.SetLean(false)
	d.snapshot(2*lifetime+lifetime/4, second)
	if ops := d.tick(3*lifetime + lifetime/4 - 2*time.Second); slices.Contains(ops, Revoke) {
		t.Errorf("ops %v within a lifetime of the second flow", ops)
	}
	d.want("10.47.11.109:5060")
}

// Fails when a permission outlives the snapshot that shows no flow of it.
func TestPermissionEndsWithASnapshotWithoutItsFlow(t *testing.T) {
	d, f := leanDesk(t)
	d.gone(time.Second, f)
	d.tick(lifetime + time.Second)
	d.want("10.47.11.109:5060")
	d.m.SetLean(false)
	d.snapshot(lifetime + 2*time.Second)
	d.want()
}

// The model knows all flows again after a snapshot that began when the kernel reported all.
//
// Fails when a snapshot that began earlier is enough.
func TestSnapshotShowsWhatWasNotReported(t *testing.T) {
	d, _ := leanDesk(t)
	known := func(now, want time.Duration) {
		t.Helper()
		if got := d.m.Known(now); got != want {
			t.Errorf("at %v all flows until %v are known, want %v", now, got, want)
		}
	}
	d.snapshot(5)
	known(7, 5)
	d.m.BeginSnapshot(10)
	d.m.SetLean(false)
	d.m.EndSnapshot(11)
	known(12, 10)
	d.snapshot(20)
	known(21, 21)
	d.m.BeginSnapshot(30)
	d.m.SetLean(true)
	d.m.SetLean(false)
	d.m.EndSnapshot(31)
	known(32, 30)
}

// A flow that no snapshot showed gives its permission after its end, for the rest of the
// lifetime, as soon as it is known that its source was not faked.
//
// Fails when the end of an unknown flow is ignored, when it gives the permission at once, and
// when the wait counts as life.
func TestFlowBetweenTwoSnapshotsGivesItsPermission(t *testing.T) {
	d, f := leanDesk(t)
	second := d.translated("10.47.11.109:5062", "203.0.113.5:5060")
	d.gone(20*time.Second, second) // its last packet was 10 s before
	d.want("10.47.11.109:5060")
	for _, f := range d.m.TakeEnded() {
		d.m.SeeEnded(30*time.Second, &f)
	}
	d.carry()
	d.want("10.47.11.109:5060", "10.47.11.109:5062")
	if v := d.view("10.47.11.109:5062"); v.Flows != 0 || v.Expires != lifetime+10*time.Second {
		t.Errorf("%+v, want no flow and the end at %v", v, lifetime+10*time.Second)
	}
	d.gone(21*time.Second, f)
	if v := d.view("10.47.11.109:5060"); v.Flows != 0 {
		t.Errorf("%+v", v)
	}
}

// A child of a permission that the model does not know yet lives, counts once as passed, and
// belongs to its permission after the next snapshot.
//
// Fails when such a child is dropped, and when it counts again in the snapshot.
func TestChildOfAnUnreportedFlowLivesAndCountsOnce(t *testing.T) {
	d, f := leanDesk(t)
	second := d.translated("10.47.11.110:5062", "203.0.113.5:5060")
	child, ops := d.admit(1, "203.0.113.5:7000", "198.51.100.1:5062", "10.47.11.110:5062", 0)
	d.wantOps("child", ops)
	// The kernel passed the port of a host that the model knows to another host.
	other, ops := d.admit(1, "203.0.113.5:7000", "198.51.100.1:5060", "10.47.11.110:5060", 0)
	d.wantOps("child of another host", ops)
	if ops := d.snapshot(2, f, second, child, other); slices.Contains(ops, DropUnanswered) {
		t.Errorf("ops %v, but the dump may have missed the flow of a permission", ops)
	}
	if v := d.view("10.47.11.110:5062"); v.Children != 1 {
		t.Errorf("%+v", v)
	}
	if n := d.m.Passed().Mapped; n != 2 {
		t.Errorf("%d children passed, want 2", n)
	}
	if ops := d.snapshot(3, f, second, child, other); !slices.Contains(ops, DropUnanswered) {
		t.Errorf("ops %v: the second snapshot shows that no permission admitted the child", ops)
	}
}
