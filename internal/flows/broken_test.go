package flows

import (
	"net/netip"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A flow that comes back with the source that was wrong is not ended again and again.
//
// Fails when it is, or when it is never ended again.
func TestFlowThatComesBackIsLeftAlone(t *testing.T) {
	flow := func(source string) *brokenFlow {
		ep := func(s string) cone.Endpoint { return cone.EndpointFrom(netip.MustParseAddrPort(s)) }
		return &brokenFlow{Flow: cone.Flow{Src: ep("10.47.11.109:5060"), ReplySrc: ep("203.0.113.5:5060"), ReplyDst: ep(source)}}
	}
	var b Search
	for _, step := range []struct {
		now     time.Duration
		source  string
		changed bool
		back    bool
	}{
		{0, "198.51.100.1:5060", false, false},
		{2 * time.Second, "198.51.100.1:5060", false, true},
		{2 * time.Second, "198.51.100.129:5060", false, false}, // a failover, and one back
		{59 * time.Second, "198.51.100.1:1024", true, true},
		{time.Minute, "198.51.100.1:5060", false, false},
		{time.Hour, "198.51.100.1:5060", false, true}, // nothing changed
		{time.Hour, "198.51.100.1:5060", true, false},
	} {
		if step.changed {
			b.changed()
		}
		f := flow(step.source)
		back := b.healed.cameBack(step.now, f)
		if back != step.back {
			t.Errorf("at %v, %s: it came back: %v, want %v", step.now, step.source, back, step.back)
		}
		if !back {
			b.healed.note(step.now, f)
		}
	}
}

// Looks find a flow of each part of a large table twice, and the whole walk counts each once.
//
// Fails when a flow is never checked, or never by two consecutive looks.
func TestLooksAtBrokenFlowsGoOn(t *testing.T) {
	const flows = 2*mostAskedFlows + 100
	broken := map[int]bool{0: true, mostAskedFlows + 1: true, flows - 1: true}
	var w walk
	before, ended, asked := map[int]bool{}, map[int]bool{}, map[int]int{}
	for look := 1; look == 1 || w.from != 0 || len(before) > 0; look++ {
		if look > 10 {
			t.Fatalf("the walk does not end: it is at %d", w.from)
		}
		w.begin()
		found := map[int]bool{}
		for i := range flows {
			if ended[i] {
				continue
			}
			at, ok := w.take(before[i])
			if !ok {
				continue
			}
			if !before[i] {
				w.last = at
			}
			asked[i]++
			switch {
			case broken[i] && before[i]:
				ended[i] = true
			case broken[i]:
				found[i] = true
			}
		}
		w.end()
		before = found
	}
	for i := range broken {
		if !ended[i] {
			t.Errorf("flow %d was found %d times, and never twice", i, asked[i])
		}
	}
	if len(asked) < flows-len(broken) { // those that ended move the others
		t.Errorf("%d flows of %d were asked about", len(asked), flows)
	}
}

// Fails when a flow with the address of another link counts as unanswered before it has sent
// packets that nobody answered, or when one whose address is gone does not.
func TestFlowsAreNotAnsweredIfTheKernelSaysSo(t *testing.T) {
	look := func(sent, answered uint64) cone.Flow {
		return cone.Flow{ID: 7, Status: cone.StatusSeenReply, HasCounters: true, OrigPackets: sent, ReplyPackets: answered}
	}
	for name, tc := range map[string]struct {
		looks       []cone.Flow
		there, gone bool // what the last look finds
		apart       time.Duration
	}{
		"never answered":     {[]cone.Flow{{ID: 7}}, true, true, 0},
		"without counters":   {[]cone.Flow{{ID: 7, Status: cone.StatusSeenReply}, {ID: 7, Status: cone.StatusSeenReply}}, false, true, 0},
		"one look":           {[]cone.Flow{look(100, 1)}, false, true, 0},
		"idle":               {[]cone.Flow{look(100, 1), look(100, 1)}, false, true, 0},
		"a packet":           {[]cone.Flow{look(100, 1), look(101, 1)}, false, true, 0},
		"packets":            {[]cone.Flow{look(100, 1), look(101, 1), look(103, 1)}, true, true, 0},
		"answered":           {[]cone.Flow{look(100, 1), look(200, 2)}, false, false, 0},
		"answered before":    {[]cone.Flow{look(100, 1), look(200, 2), look(203, 2)}, true, true, 0},
		"another flow":       {[]cone.Flow{look(100, 1), look(3, 1)}, false, true, 0},
		"silent for seconds": {[]cone.Flow{look(100, 1), look(300, 1), look(500, 1)}, false, true, 4 * time.Second},
	} {
		for gone, want := range map[bool]bool{false: tc.there, true: tc.gone} {
			if tc.apart == 0 {
				tc.apart = 10 * time.Second
			}
			var a answers
			var got bool
			for i := range tc.looks {
				got = a.unanswered(time.Duration(i)*tc.apart, &tc.looks[i], gone)
				a.next()
			}
			if got != want {
				t.Errorf("%s, address gone %v: unanswered %v", name, gone, got)
			}
		}
	}
}

func TestFlowsThatWaitToEndAreLookedAtSoon(t *testing.T) {
	for _, tt := range []struct {
		took   time.Duration
		toHeal bool
		empty  int
		want   time.Duration
	}{
		{0, false, 0, brokenAgain},
		{0, true, 0, brokenAgain},
		{100 * time.Millisecond, false, 0, 20 * time.Second},
		{100 * time.Millisecond, true, 0, 2 * time.Second},
		{time.Second, false, 0, 30 * time.Second},
		{time.Second, true, 0, 3 * time.Second},
		{10 * time.Millisecond, false, 1, 4 * time.Second},
		{10 * time.Millisecond, false, 5, 30 * time.Second},
		{10 * time.Millisecond, false, 1000, 30 * time.Second},
		{10 * time.Millisecond, true, 1000, time.Second},
	} {
		if got := untilNextLook(tt.took, tt.toHeal, tt.empty); got != tt.want {
			t.Errorf("%v after a look of %v (to heal: %t, %d before it found nothing), want %v", got, tt.took, tt.toHeal, tt.empty, tt.want)
		}
	}
}

// After looks that found nothing the next one is far away. Other source NAT brings it nearer, and a
// change of other rules does not.
func TestOtherSourceNATIsLookedAtSoon(t *testing.T) {
	rules := &userrules.Ruleset{}
	for name, tt := range map[string]struct {
		by   *userrules.Ruleset
		want time.Duration
	}{
		"other source NAT":    {nil, 2 * time.Second},
		"the same source NAT": {&userrules.Ruleset{}, 30 * time.Second},
		"the same rules":      {rules, 30 * time.Second},
	} {
		b := Search{next: 30 * time.Second, soonest: 2 * time.Second, empty: 5, by: tt.by}
		b.SawRules(rules)
		if b.next != tt.want || (b.empty == 0) != (tt.want == b.soonest) || b.by != rules || b.due != (tt.by != rules) {
			t.Errorf("%s: %+v, want the next look at %v", name, b, tt.want)
		}
	}
}
