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
	}
	d.newEngine(cone.New(cone.Policy{Lifetime: time.Minute, Retry: time.Minute}))
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
