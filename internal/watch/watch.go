// Package watch tells clients of the control socket and the audit log what happens. Whoever tells
// it never waits for them.
package watch

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

const (
	// MostClients is how many clients may watch at once: each costs the loop a copy of each
	// event.
	MostClients = 8
	// clientAhead is how many events a client may be behind before it loses some.
	clientAhead = 4096
)

// ErrTooMany says that a client has to wait for others to stop watching.
var ErrTooMany = errors.New("8 clients watch already: stop one of them first")

// An Event is what the loop tells watchers. Lost is how many events a slow one missed before it;
// then there is no event.
type Event struct {
	cone.Event
	At   time.Time
	Lost uint64
}

// A Watcher is a client that watches. The loop puts events into its channel without ever
// waiting; what does not fit is counted.
type Watcher struct {
	events chan Event
	lost   atomic.Uint64
}

// New returns a Watcher that loses no event until it is ahead events behind.
func New(ahead int) *Watcher { return &Watcher{events: make(chan Event, ahead)} }

// Behind is how many events wait to be followed, and Lost how many did not fit since the last one did.
func (w *Watcher) Behind() int  { return len(w.events) }
func (w *Watcher) Lost() uint64 { return w.lost.Load() }

// Watchers are the clients that watch. Publish belongs to the loop; the other methods may be
// called from any goroutine.
type Watchers struct {
	lock sync.Mutex
	all  atomic.Pointer[[]*Watcher] // never changed in place

	Auditor atomic.Pointer[Watcher] // of the audit log, nil without one
}

// Publish tells all watchers. It never blocks.
func (ws *Watchers) Publish(e cone.Event) {
	if !ws.Any() {
		return
	}
	x := Event{At: time.Now(), Event: e}
	if all := ws.all.Load(); all != nil {
		for _, w := range *all {
			w.put(x)
		}
	}
	if w := ws.Auditor.Load(); w != nil {
		w.put(x)
	}
}

func (w *Watcher) put(x Event) {
	if n := w.lost.Swap(0); n > 0 {
		select {
		case w.events <- Event{At: x.At, Lost: n}:
		default:
			w.lost.Add(n + 1)
			return
		}
	}
	select {
	case w.events <- x:
	default:
		w.lost.Add(1)
	}
}

// Any reports whether somebody watches, or there is an audit log.
func (ws *Watchers) Any() bool {
	all := ws.all.Load()
	return all != nil && len(*all) > 0 || ws.Auditor.Load() != nil
}

// Add adds a watcher.
func (ws *Watchers) Add() (*Watcher, error) {
	ws.lock.Lock()
	defer ws.lock.Unlock()
	var old []*Watcher
	if p := ws.all.Load(); p != nil {
		old = *p
	}
	if len(old) >= MostClients {
		return nil, ErrTooMany
	}
	w := New(clientAhead)
	next := append(slices.Clone(old), w)
	ws.all.Store(&next)
	return w, nil
}

// Remove removes a watcher.
func (ws *Watchers) Remove(w *Watcher) {
	ws.lock.Lock()
	defer ws.lock.Unlock()
	next := slices.DeleteFunc(slices.Clone(*ws.all.Load()), func(x *Watcher) bool { return x == w })
	ws.all.Store(&next)
}

// Follow passes the watcher's events to yield until yield returns false, ctx ends, or ended
// is closed; then it passes those that are there already.
func (w *Watcher) Follow(ctx context.Context, ended <-chan struct{}, yield func(Event) bool) {
	for {
		var x Event
		select {
		case x = <-w.events:
		default:
			if n := w.lost.Swap(0); n > 0 { // nothing else is there to tell it
				x = Event{At: time.Now(), Lost: n}
				break
			}
			select {
			case x = <-w.events:
			case <-ctx.Done():
				return
			case <-ended:
				if len(w.events) > 0 {
					continue
				}
				return
			}
		}
		if !yield(x) {
			return
		}
	}
}

// Discard empties the queue, and returns how many events that loses.
func (w *Watcher) Discard() (n uint64) {
	n = w.lost.Swap(0)
	for {
		select {
		case x := <-w.events:
			n += max(x.Lost, 1)
		default:
			return n
		}
	}
}
