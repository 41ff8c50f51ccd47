package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/conenatd/conenatd/internal/budget"
	"github.com/conenatd/conenatd/internal/ctwatch"
)

const (
	// eventsAtOnce is how many events are read before their decisions are
	// carried out.
	eventsAtOnce = 128
	// ticksAtOnce is how many permissions Tick handles before the next events
	// are read.
	ticksAtOnce = 32
	// behindAtOnce is the same while Tick is behind. A permission needs more
	// renewals than it has events, and if renewed late it ends in the kernel.
	behindAtOnce = eventsAtOnce
	// turnEvery is the longest time of one turn of the loop. If the loop does not empty the
	// event socket for isStopped, somebody stopped the process (SIGSTOP, freezer), or events
	// come faster than the loop reads them.
	turnEvery = time.Second
	isStopped = 3 * turnEvery
)

// now returns the time since the daemon was made. Like the kernel's timeouts it
// stands still while the machine is suspended, and ignores the wall clock.
func (s *shared) now() time.Duration { return time.Since(s.start) }

// wall converts t, a time of now, to the present wall clock: since the start that may have
// been set, or have gone on while the machine was suspended. The result is rounded to the
// millisecond, since two clocks are read.
func (s *shared) wall(t time.Duration) time.Time {
	now := time.Now()
	return now.Add(t - now.Sub(s.start)).Round(time.Millisecond)
}

// do runs f in the loop and waits for it. It returns false if the loop ended first. f must
// not keep the *loop.
func (s *shared) do(f func(*loop)) bool { return s.doUnless(nil, f) }

// doUnless is do, but returns false, too, once stop is closed. The loop may then run f later.
func (s *shared) doUnless(stop <-chan struct{}, f func(*loop)) bool {
	done := make(chan struct{})
	select {
	case s.inbox <- func(l *loop) { f(l); close(done) }:
	case <-s.ended:
		return false
	case <-stop:
		return false
	}
	s.events.Wake()
	return s.await(done, stop)
}

// job runs f in the reconcile when that is idle, and waits for it.
func (s *shared) job(f func(*reconciler) error) error {
	done := make(chan error, 1)
	select {
	case s.jobs <- func(r *reconciler) { done <- f(r) }:
		return <-done
	case <-s.ended:
		return errEnded
	}
}

// ask is do for the reconcile. The CPU time of the loop for f and
// the resulting decisions is charged to the budget if a look is under way.
func (r *reconciler) ask(f func(*loop)) bool {
	var took time.Duration
	ok := r.do(func(l *loop) {
		took = budget.ThreadTime(func() {
			f(l)
			l.engine.Apply(0)
		})
	})
	if ok {
		r.budget.InLoop += took
	}
	return ok
}

// catchUp waits until the loop has handled the events that the kernel has queued by now. It
// returns false if the loop ended first.
func (s *shared) catchUp() bool {
	done := make(chan struct{})
	return s.do(func(l *loop) { l.catchingUp = append(l.catchingUp, done) }) && s.await(done, nil)
}

// await waits for done. It returns false if the loop ended first, or once stop is closed.
func (s *shared) await(done, stop <-chan struct{}) bool {
	select {
	case <-done:
		return true
	case <-s.ended:
	case <-stop:
	}
	return false
}

// caughtUp answers catchUp: the event socket was empty.
func (l *loop) caughtUp() {
	for _, done := range l.catchingUp {
		close(done)
	}
	l.catchingUp = nil
}

// Alive waits for the loop's next beat, and reports whether the loop runs. It does not wait
// for requests that were queued before it: a busy loop is alive.
func (s *shared) Alive() bool {
	alive := make(chan struct{})
	select {
	case s.pings <- alive:
	case <-s.ended:
		return false
	}
	s.events.Wake()
	return s.await(alive, nil)
}

// beat answers Alive. The loop calls it between pieces of work.
func (s *shared) beat() {
	select {
	case alive := <-s.pings:
		close(alive)
	default:
	}
}

// run is the one loop. It returns when ctx ends.
func (l *loop) run(ctx context.Context) error {
	defer close(l.ended)
	defer context.AfterFunc(ctx, l.events.Wake)()
	events := make([]ctwatch.Event, eventsAtOnce)
	var deadline time.Time
	idle := l.now()
	for {
		l.beat()
		l.drainInbox()
		if ctx.Err() != nil {
			return nil
		}
		if next := l.deadline(); next != deadline {
			deadline = next
			if err := l.events.SetReadDeadline(deadline); err != nil {
				return fmt.Errorf("set deadline of event socket: %w", err)
			}
		}
		n, err := l.events.Read(events)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("read conntrack events: %w", err)
		}
		read := l.now()
		late := lateness(read - idle)
		for i := range events[:n] {
			events[i].Flow.Late = late
			l.event(read, &events[i])
		}
		if n > 0 && late >= l.cfg.Lifetime {
			l.wantReconcile() // a dump shows how old the flows are
		}
		if n < len(events) {
			idle = l.events.Emptied().Sub(l.start)
			l.caughtUp()
		}
		l.engine.Apply(read)
		atOnce := ticksAtOnce
		if l.behind {
			atOnce = behindAtOnce
		}
		l.behind = l.engine.Model.Tick(l.now(), atOnce)
		l.engine.Apply(0)
		if l.engine.Model.HasStrays() {
			select {
			case l.strays <- struct{}{}:
			default: // a look is already asked for
			}
		}
	}
}

// lateness returns how late something may be known that happened within the last age. Less than
// isStopped does not count.
func lateness(age time.Duration) time.Duration {
	if age < isStopped {
		return 0
	}
	return age
}

func (l *loop) event(now time.Duration, e *ctwatch.Event) {
	switch e.Kind {
	case ctwatch.New:
		l.engine.Model.FlowSeen(now, &e.Flow)
		if e.Flow.Began && e.Flow.IsChild() && l.mayStrand != nil && l.mayStrand(e.Flow.Dst.Addr) {
			select {
			case l.born <- e.Flow:
			default: // so many that all are looked at
			}
		}
	case ctwatch.Gone:
		l.engine.FlowGone(now, &e.Flow)
	case ctwatch.Overrun:
		l.wantReconcile()
	}
}

// wantReconcile asks for a reconcile as soon as rest allows.
func (s *shared) wantReconcile() {
	select {
	case s.hurry <- struct{}{}:
	default: // already asked for
	}
}

// deadline returns when the model wants to be called next, at most one turn from now. While
// Tick is behind, the deadline leaves just enough time to read events first.
func (l *loop) deadline() time.Time {
	if l.behind {
		return time.Now().Add(50 * time.Microsecond)
	}
	latest := l.start.Add(l.now().Truncate(turnEvery) + turnEvery)
	if next, wanted := l.engine.Model.Next(); wanted && l.start.Add(next).Before(latest) {
		return l.start.Add(next)
	}
	return latest
}

// drainInbox runs only what is queued now. A caller that immediately asks again, as a
// reconcile or a list does, cannot keep the loop from events.
func (l *loop) drainInbox() {
	for range len(l.inbox) {
		f := <-l.inbox
		f(l)
		l.engine.Apply(0)
		l.beat()
	}
}
