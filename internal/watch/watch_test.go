package watch

import (
	"context"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
)

// A client that does not read loses events, and is told how many; the loop never waits.
//
// Fails when Publish blocks, when an event is neither delivered nor counted, and when the
// count comes only with the next event.
func TestSlowWatcherIsToldHowMuchItLost(t *testing.T) {
	var ws Watchers
	ws.Publish(cone.Event{}) // nobody watches
	w, err := ws.Add()
	if err != nil {
		t.Fatal(err)
	}
	const published = 3 * clientAhead
	for range published {
		ws.Publish(cone.Event{})
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	told, lost := uint64(0), uint64(0)
	w.Follow(ctx, nil, func(x Event) bool {
		if x.Lost == 0 {
			told++
		}
		lost += x.Lost
		switch told + lost {
		case published / 3: // it reads again: new events fit
			ws.Publish(cone.Event{})
		case published + 1:
			stop()
		}
		return true
	})
	if told+lost != published+1 || told < clientAhead || lost == 0 {
		t.Errorf("told %d, lost %d of %d", told, lost, published+1)
	}
}

// Fails when a watcher that is gone still takes a place or gets events.
func TestWatchersComeAndGo(t *testing.T) {
	var ws Watchers
	var all []*Watcher
	for range MostClients {
		w, err := ws.Add()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, w)
	}
	if _, err := ws.Add(); err == nil {
		t.Error("one too many")
	}
	ws.Remove(all[0])
	ws.Publish(cone.Event{})
	if len(all[0].events) != 0 || len(all[1].events) != 1 {
		t.Errorf("%d events for one that is gone, %d for another", len(all[0].events), len(all[1].events))
	}
	if _, err := ws.Add(); err != nil {
		t.Error(err)
	}
	ended := make(chan struct{})
	close(ended)
	n := 0
	all[1].Follow(t.Context(), ended, func(Event) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d events before the end, want the one that was there", n)
	}
}
