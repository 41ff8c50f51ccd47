package cone

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// Each grant, revocation and child is told once, with its reason, and a refusal once however
// often it is tried again.
//
// It fails if an event is missing or told twice, or if a renewal or a retry is one.
func TestObserverIsToldEachEventOnce(t *testing.T) {
	d := newDesk(t, nil)
	var got []string
	d.m.Observe(func(e Event) {
		got = append(got, fmt.Sprintf("%v %v %v %v %v", e.Kind, e.Ext.Port, e.Peer, e.From.Port, e.Reason))
	})
	want := func(what string, events ...string) {
		t.Helper()
		if !slices.Equal(got, events) {
			t.Errorf("%s: %q, want %q", what, got, events)
		}
		got = nil
	}
	f := d.open(0, "10.47.11.109:5060", "203.0.113.5:5060")
	want("granted", "granted 5060 203.0.113.5 0 ")
	d.seen(time.Second, f)
	d.m.Granted(d.view("10.47.11.109:5060").Permission) // as after a move to another carrier
	want("seen again")
	d.child(time.Second, f, 7000)
	want("child", "child 5060 203.0.113.5 7000 ")
	d.m.Revoke(time.Second, func(Permission) bool { return true })
	d.carry()
	want("revoked", "revoked 5060 203.0.113.5 0 revoked")

	d.m.SetForwards(0, forwardsPort(5061, Endpoint{}), true)
	d.open(2*time.Second, "10.47.11.109:5061", "203.0.113.5:5060")
	want("refused", "refused 5061 203.0.113.5 0 forwarded")
	for now := 2 * time.Second; now < 2*time.Minute; now += time.Second {
		d.m.Tick(now, 100)
		d.carry()
	}
	if slices.ContainsFunc(got, func(e string) bool { return e == "refused 5061 203.0.113.5 0 forwarded" }) {
		t.Errorf("told again: %q", got)
	}
	got = nil
	g := d.open(2*time.Minute, "10.47.11.109:5062", "203.0.113.5:5060")
	d.child(2*time.Minute, g, 7001)
	got = nil
	d.m.RevokeAll()
	d.carry()
	if !slices.Contains(got, "revoked 5062 203.0.113.5 0 stopped") {
		t.Errorf("stopped: %q", got)
	}
}

// It fails if the end of a child is not told.
func TestObserverIsToldTheEndOfAChild(t *testing.T) {
	d := newDesk(t, nil)
	f := d.open(0, "10.47.11.109:5060", "203.0.113.5:5060")
	var got []string
	d.m.Observe(func(e Event) { got = append(got, fmt.Sprintf("%v %v", e.Kind, e.From)) })
	child, _ := d.admit(0, "203.0.113.5:7000", f.ReplyDst.String(), f.Src.String(), 0)
	d.gone(time.Second, child)
	if want := []string{"child 203.0.113.5:7000", "child_gone 203.0.113.5:7000"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
