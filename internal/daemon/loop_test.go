package daemon

import (
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// Fails when the watchdog's question waits behind everything that the loop was asked for.
func TestTheLoopIsAliveWhileItIsBusy(t *testing.T) {
	d := &Daemon{
		inbox: make(chan func(), 2), pings: make(chan chan struct{}, 1),
		model: cone.New(cone.Policy{Lifetime: time.Minute, Retry: time.Minute}),
	}
	answered := make(chan struct{})
	d.inbox <- func() { d.pings <- answered }
	d.inbox <- func() {
		select {
		case <-answered:
		default:
			t.Error("no answer before the next piece of work")
		}
	}
	d.drainInbox()
}

func TestEventsAreFastWhereMostOfThemWouldWakeTheLoop(t *testing.T) {
	var p pace
	now := time.Second
	come := func(perSecond, n int) (fast bool) {
		for range n {
			now += time.Second / time.Duration(perSecond)
			fast = p.fast(now, 1)
		}
		return fast
	}
	for _, x := range []struct {
		perSecond, n int
		fast         bool
	}{
		{1, 3, false},
		{100_000, 20, false}, // a burst
		{1000, 100, false},
		{20_000, 1000, true},
		{fastEvents / 2, 100, false},
		{fastEvents * 2, 1000, true},
		{1, 1, false},
	} {
		if got := come(x.perSecond, x.n); got != x.fast {
			t.Errorf("%d events, %d a second: fast is %v", x.n, x.perSecond, got)
		}
	}
}
