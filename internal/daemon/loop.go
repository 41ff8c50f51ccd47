package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

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
	// refreshes than it has events, and if refreshed late it ends in the kernel.
	behindAtOnce = eventsAtOnce
	// turnEvery is the longest time of one turn of the loop. If the loop does not empty the
	// event socket for isStopped, somebody stopped the process (SIGSTOP, freezer), or events
	// come faster than the loop reads them.
	turnEvery = time.Second
	isStopped = 3 * turnEvery
)

// now returns the time since the daemon was made. Like the kernel's timeouts it
// stands still while the machine is suspended, and ignores the wall clock.
func (d *Daemon) now() time.Duration { return time.Since(d.start) }

// wall converts t, a time of now, to the present wall clock: since the start that may have
// been set, or have gone on while the machine was suspended. The result is rounded to the
// millisecond, since two clocks are read.
func (d *Daemon) wall(t time.Duration) time.Time {
	now := time.Now()
	return now.Add(t - now.Sub(d.start)).Round(time.Millisecond)
}

// do runs f in the loop and waits for it. It returns false if the loop ended
// first.
func (d *Daemon) do(f func()) bool {
	done := make(chan struct{})
	select {
	case d.inbox <- func() { f(); close(done) }:
	case <-d.ended:
		return false
	}
	d.events.Wake()
	select {
	case <-done:
		return true
	case <-d.ended:
		return false
	}
}

// ask is do for the reconcile; nobody else may call it. The CPU time of the loop for f and
// the resulting decisions is charged to the budget if a look is under way.
func (d *Daemon) ask(f func()) bool {
	var took time.Duration
	ok := d.do(func() {
		took = threadTime(func() {
			f()
			d.engine.Apply(0)
		})
	})
	if ok {
		d.budget.inLoop += took
	}
	return ok
}

// Alive waits for the loop's next beat, and reports whether the loop runs. It does not wait
// for requests that were queued before it: a busy loop is alive.
func (d *Daemon) Alive() bool {
	alive := make(chan struct{})
	select {
	case d.pings <- alive:
	case <-d.ended:
		return false
	}
	d.events.Wake()
	select {
	case <-alive:
		return true
	case <-d.ended:
		return false
	}
}

// beat answers Alive. The loop calls it between pieces of work.
func (d *Daemon) beat() {
	select {
	case alive := <-d.pings:
		close(alive)
	default:
	}
}

// loop is the one loop. It returns when ctx ends.
func (d *Daemon) loop(ctx context.Context) error {
	defer close(d.ended)
	defer context.AfterFunc(ctx, d.events.Wake)()
	events := make([]ctwatch.Event, eventsAtOnce)
	var deadline time.Time
	idle := d.now()
	for {
		d.beat()
		d.drainInbox()
		if ctx.Err() != nil {
			return nil
		}
		if next := d.deadline(); next != deadline {
			deadline = next
			if err := d.events.SetReadDeadline(deadline); err != nil {
				return fmt.Errorf("set deadline of event socket: %w", err)
			}
		}
		n, err := d.events.Read(events)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("read conntrack events: %w", err)
		}
		read := d.now()
		// Events may have waited since the loop last emptied the socket.
		late := read - idle
		if late < isStopped {
			late = 0
		}
		for i := range events[:n] {
			events[i].Flow.Late = late
			d.event(read, &events[i])
		}
		if n > 0 && late >= d.cfg.Lifetime {
			d.wantReconcile() // a dump shows how old the flows are
		}
		if n < len(events) {
			idle = read
		}
		d.engine.Apply(read)
		atOnce := ticksAtOnce
		if d.behind {
			atOnce = behindAtOnce
		}
		d.behind = d.engine.Model.Tick(d.now(), atOnce)
		d.engine.Apply(0)
		if d.engine.Model.HasStrays() {
			select {
			case d.strays <- struct{}{}:
			default: // a look is already asked for
			}
		}
	}
}

func (d *Daemon) event(now time.Duration, e *ctwatch.Event) {
	switch e.Kind {
	case ctwatch.New:
		d.engine.Model.FlowSeen(now, &e.Flow)
	case ctwatch.Gone:
		d.engine.FlowGone(now, &e.Flow)
	case ctwatch.Overrun:
		d.wantReconcile()
	}
}

// wantReconcile asks for a reconcile as soon as rest allows.
func (d *Daemon) wantReconcile() {
	select {
	case d.hurry <- struct{}{}:
	default: // already asked for
	}
}

// deadline returns when the model wants to be called next, at most one turn from now. While
// Tick is behind, the deadline leaves just enough time to read events first.
func (d *Daemon) deadline() time.Time {
	if d.behind {
		return time.Now().Add(50 * time.Microsecond)
	}
	latest := d.start.Add(d.now().Truncate(turnEvery) + turnEvery)
	if next, wanted := d.engine.Model.Next(); wanted && d.start.Add(next).Before(latest) {
		return d.start.Add(next)
	}
	return latest
}

// drainInbox runs only what is queued now. A caller that immediately asks again, as a
// reconcile or a list does, cannot keep the loop from events.
func (d *Daemon) drainInbox() {
	for range len(d.inbox) {
		f := <-d.inbox
		f()
		d.engine.Apply(0)
		d.beat()
	}
}
