package cone

import (
	"testing"
	"time"
)

// A forward that is back gets what its child had, also if the child's host answered. A child
// that began before it was away keeps its flow, and so does one of a new forward.
//
// Fails when the children that began meanwhile are not remembered, or others are.
func TestForwardThatIsBackEndsTheChildrenOfThatTime(t *testing.T) {
	const in, ext = "10.47.11.109:5060", "198.51.100.1:5060"
	rule := forwardsPort(5060, ep("10.47.11.110:5060"))
	for name, tc := range map[string]struct {
		away, born time.Duration // how long the forward was away, and when the child began; 0: before that
		takes      func(Permission) Forwarding
		want       []OpKind
	}{
		"a moment":                         {2 * time.Second, time.Second, nil, []OpKind{DropChild}},
		"an older child":                   {2 * time.Second, 0, nil, nil},
		"a child long after it went":       {3 * forwardAway, 2 * forwardAway, nil, nil},
		"a child soon, the forward late":   {3 * forwardAway, time.Second, nil, []OpKind{DropChild}},
		"no reading saw it":                {0, time.Second, rule, []OpKind{DropChild}},
		"it may lead this child elsewhere": {0, time.Second, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, mapped)
			d.open(0, in, "203.0.113.5:9")
			if tc.born == 0 {
				d.admit(0, "203.0.113.5:77", ext, in, StatusSeenReply)
			}
			now := time.Duration(1)
			d.m.SetForwards(now, rule, true)
			if tc.away > 0 {
				d.m.SetForwards(now, nil, true)
			}
			d.carry()
			if tc.born > 0 {
				d.admit(now+tc.born, "203.0.113.5:77", ext, in, StatusSeenReply)
			}
			now += tc.born + tc.away
			if tc.away > 0 {
				d.m.SetForwards(now, rule, true)
			}
			d.m.EndInterim(now, tc.takes)
			d.wantOps("the forward is back", d.carry(), tc.want...)
			d.m.EndInterim(now, tc.takes)
			d.wantOps("another reading", d.carry())
		})
	}
}

// The host of a child that ended still answers it: that flow would take the forward's packets.
//
// Fails when the answer stays or need not be reported, and when a later flow, or one to another
// port of the peer, ends.
func TestAnswerToAnEndedChildEnds(t *testing.T) {
	const in, ext = "10.47.11.109:5060", "198.51.100.1:5060"
	rule := forwardsPort(5060, ep("10.47.11.110:5060"))
	d := newDesk(t, mapped)
	d.open(0, in, "203.0.113.5:9")
	d.m.SetForwards(1, rule, true)
	d.m.SetForwards(2, nil, true)
	d.admit(3, "203.0.113.5:77", ext, in, StatusSeenReply)
	d.carry()
	d.m.SetForwards(4, rule, true)
	d.m.EndInterim(4, nil)
	d.wantOps("the forward is back", d.carry(), DropChild)
	d.ops = nil
	d.open(5, in, "203.0.113.5:78")
	if f := d.open(6, in, "203.0.113.5:77"); len(d.ops) != 1 || d.ops[0].Kind != DropChild || d.ops[0].ID != f.ID {
		t.Errorf("the answer: %v", d.ops)
	}
	if !d.m.AwaitsAnswers(3+eventsLate) || d.m.AwaitsAnswers(4+eventsLate) {
		t.Error("the kernel must report answers for as long as they end")
	}
	d.ops = nil
	d.open(4+eventsLate, in, "203.0.113.5:77")
	for _, o := range d.ops {
		if o.Kind == DropChild {
			t.Errorf("a later flow ends: %v", o)
		}
	}
}
