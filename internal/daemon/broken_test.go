package daemon

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
func TestFlowThatComesBackIsLeftAloneForAWhile(t *testing.T) {
	flow := func(source string) *brokenFlow {
		ep := func(s string) cone.Endpoint { return cone.EndpointFrom(netip.MustParseAddrPort(s)) }
		return &brokenFlow{Flow: cone.Flow{Src: ep("10.47.11.109:5060"), ReplySrc: ep("203.0.113.5:5060"), ReplyDst: ep(source)}}
	}
	var b brokenFlows
	for _, step := range []struct {
		now    time.Duration
		source string
		ended  bool
	}{
		{0, "198.51.100.1:5060", false},
		{2 * time.Second, "198.51.100.1:5060", true},
		{2 * time.Second, "198.51.100.129:5060", false}, // a failover, and one back
		{59 * time.Second, "198.51.100.1:1024", true},
		{time.Minute, "198.51.100.1:5060", false},
		{61 * time.Second, "198.51.100.1:5060", true},
	} {
		if got := b.sawEnd(step.now, flow(step.source)); got != step.ended {
			t.Errorf("at %v, %s: it ended before: %v, want %v", step.now, step.source, got, step.ended)
		}
	}
}

// Fails when flows that must be found twice are not asked about twice, or the others never.
func TestLooksAtBrokenFlowsGoOn(t *testing.T) {
	b := brokenFlows{asked: 2*mostAskedFlows + 1}
	for i, want := range []int{mostAskedFlows, mostAskedFlows, 2 * mostAskedFlows, 0, mostAskedFlows} {
		b.before = nil
		if i == 1 {
			b.before = map[uint32]*userrules.Ruleset{7: nil}
		}
		if b.goOn(); b.from != want {
			t.Errorf("after look %d it goes on at %d, want %d", i, b.from, want)
		}
	}
}
