package daemon

import (
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// Fails when the watchdog's question waits behind everything that the loop was asked for.
func TestTheLoopIsAliveWhileItIsBusy(t *testing.T) {
	l := &loop{shared: &shared{inbox: make(chan func(*loop), 2), pings: make(chan chan struct{}, 1)}}
	l.newEngine(cone.New(cone.Policy{Lifetime: time.Minute, Retry: time.Minute}), nil)
	answered := make(chan struct{})
	l.inbox <- func(*loop) { l.pings <- answered }
	l.inbox <- func(*loop) {
		select {
		case <-answered:
		default:
			t.Error("no answer before the next piece of work")
		}
	}
	l.drainInbox()
}
