package daemon

import (
	"context"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
)

// A client that does not read loses events, and is told how many; the loop never waits.
//
// Fails when publish blocks, when an event is neither delivered nor counted, and when the
// count comes only with the next event.
func TestSlowWatcherIsToldHowMuchItLost(t *testing.T) {
	var ws watchers
	ws.publish(cone.Event{}) // nobody watches
	w, err := ws.add()
	if err != nil {
		t.Fatal(err)
	}
	const published = 3 * watchAhead
	for range published {
		ws.publish(cone.Event{})
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	told, lost := uint64(0), uint64(0)
	w.follow(ctx, nil, func(x watched) bool {
		if x.lost == 0 {
			told++
		}
		lost += x.lost
		switch told + lost {
		case published / 3: // it reads again: new events fit
			ws.publish(cone.Event{})
		case published + 1:
			stop()
		}
		return true
	})
	if told+lost != published+1 || told < watchAhead || lost == 0 {
		t.Errorf("told %d, lost %d of %d", told, lost, published+1)
	}
}

// Fails when a watcher that is gone still takes a place or gets events.
func TestWatchersComeAndGo(t *testing.T) {
	var ws watchers
	var all []*watcher
	for range mostWatchers {
		w, err := ws.add()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, w)
	}
	if _, err := ws.add(); err == nil {
		t.Error("one too many")
	}
	ws.remove(all[0])
	ws.publish(cone.Event{})
	if len(all[0].events) != 0 || len(all[1].events) != 1 {
		t.Errorf("%d events for one that is gone, %d for another", len(all[0].events), len(all[1].events))
	}
	if _, err := ws.add(); err != nil {
		t.Error(err)
	}
	ended := make(chan struct{})
	close(ended)
	n := 0
	all[1].follow(t.Context(), ended, func(watched) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d events before the end, want the one that was there", n)
	}
}
