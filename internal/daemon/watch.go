package daemon

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/control"
)

const (
	// mostWatchers is how many clients may watch at once: each costs the loop a copy of each
	// event.
	mostWatchers = 8
	// watchAhead is how many events a client may be behind before it loses some.
	watchAhead = 4096
)

// errTooManyWatchers says that a client has to wait for others to stop watching.
var errTooManyWatchers = errors.New("8 clients watch already: stop one of them first")

// A watched event is what the loop tells watchers. lost is how many events a slow one missed
// before it; then there is no event.
type watched struct {
	at    time.Time
	event cone.Event
	lost  uint64
}

// A watcher is a client that watches. The loop puts events into its channel without ever
// waiting; what does not fit is counted.
type watcher struct {
	events chan watched
	lost   atomic.Uint64
}

// watchers are the clients that watch. publish belongs to the loop; the other methods may be
// called from any goroutine.
type watchers struct {
	lock sync.Mutex
	all  atomic.Pointer[[]*watcher] // never changed in place

	auditor atomic.Pointer[watcher] // of the audit log, nil without one
}

// publish tells all watchers. It never blocks.
func (ws *watchers) publish(e cone.Event) {
	if !ws.any() {
		return
	}
	x := watched{at: time.Now(), event: e}
	if all := ws.all.Load(); all != nil {
		for _, w := range *all {
			w.put(x)
		}
	}
	if w := ws.auditor.Load(); w != nil {
		w.put(x)
	}
}

func (w *watcher) put(x watched) {
	if n := w.lost.Swap(0); n > 0 {
		select {
		case w.events <- watched{at: x.at, lost: n}:
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

// any reports whether somebody watches, or there is an audit log.
func (ws *watchers) any() bool {
	all := ws.all.Load()
	return all != nil && len(*all) > 0 || ws.auditor.Load() != nil
}

// add adds a watcher.
func (ws *watchers) add() (*watcher, error) {
	ws.lock.Lock()
	defer ws.lock.Unlock()
	var old []*watcher
	if p := ws.all.Load(); p != nil {
		old = *p
	}
	if len(old) >= mostWatchers {
		return nil, errTooManyWatchers
	}
	w := &watcher{events: make(chan watched, watchAhead)}
	next := append(slices.Clone(old), w)
	ws.all.Store(&next)
	return w, nil
}

// remove removes a watcher.
func (ws *watchers) remove(w *watcher) {
	ws.lock.Lock()
	defer ws.lock.Unlock()
	next := slices.DeleteFunc(slices.Clone(*ws.all.Load()), func(x *watcher) bool { return x == w })
	ws.all.Store(&next)
}

// follow passes the watcher's events to yield until yield returns false, ctx ends, or ended
// is closed; then it passes those that are there already.
func (w *watcher) follow(ctx context.Context, ended <-chan struct{}, yield func(watched) bool) {
	for {
		var x watched
		select {
		case x = <-w.events:
		default:
			if n := w.lost.Swap(0); n > 0 { // nothing else is there to tell it
				x = watched{at: time.Now(), lost: n}
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

// discard empties the queue, and returns how many events that loses.
func (w *watcher) discard() (n uint64) {
	n = w.lost.Swap(0)
	for {
		select {
		case x := <-w.events:
			n += max(x.lost, 1)
		default:
			return n
		}
	}
}

// observe tells watchers, and the log at its level debug. The loop calls it.
func (s *shared) observe(e cone.Event) {
	s.watchers.publish(e)
	if !s.log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	args := []any{"int", e.Int.Netip(), "ext", e.Ext.Netip(), "peer", e.Peers()}
	if e.Kind == cone.EventChild || e.Kind == cone.EventChildGone {
		args = append(args, "from", e.From.Netip())
	}
	s.log.Debug(e.Kind.String(), append(args, "by", e.By.String(), "reason", e.Reason.String())...)
}

// Watch tells what happens from now on (control.Source).
func (s source) Watch(ctx context.Context, yield func(control.Event) bool) error {
	w, err := s.watchers.add()
	if err != nil {
		return err
	}
	defer s.watchers.remove(w)
	if !yield(control.Event{Time: time.Now().Round(time.Millisecond), Event: control.EventBegin}) {
		return nil
	}
	w.follow(ctx, s.ended, func(x watched) bool { return yield(x.control()) })
	return nil
}

// control is the event as the control socket shows it.
func (x watched) control() control.Event {
	at := x.at.Round(time.Millisecond)
	if x.lost > 0 {
		return control.Event{Time: at, Event: control.EventLost, Lost: x.lost}
	}
	e := &x.event
	c := control.Event{
		Time: at, Event: e.Kind.String(), Int: e.Int.Netip(), Ext: e.Ext.Netip(), Peer: e.Peer.Netip(), Peers: peers(e.Key), Zone: e.Zone,
		Backend: e.By.String(), Reason: e.Reason.String(),
	}
	if e.Kind == cone.EventChild || e.Kind == cone.EventChildGone {
		c.From = e.From.Netip()
	}
	return c
}
