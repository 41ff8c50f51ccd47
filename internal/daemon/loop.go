package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
)

const (
	// eventsAtOnce is how many events are taken before their decisions are
	// carried out.
	eventsAtOnce = 128
	// ticksAtOnce is how many permissions are looked after before the next
	// events are taken.
	ticksAtOnce = 32
	// behindAtOnce is how many once they are behind. A permission is refreshed
	// more often than events tell of it, and one that is late ends in the kernel.
	behindAtOnce = eventsAtOnce
	// turnEvery is how often the loop turns at least, and isStopped how long it stands
	// still only if somebody stops the process, with SIGSTOP or a freezer, or events come
	// faster than it takes them.
	turnEvery = time.Second
	isStopped = 3 * turnEvery
)

// now returns the time since the daemon was made. Like the kernel's timeouts it
// stands still while the machine is suspended, and ignores the wall clock.
func (d *Daemon) now() time.Duration { return time.Since(d.start) }

// wall returns t, a time as now tells it, by the wall clock as that is now: since
// the start it may have been set, or gone on alone while the machine was suspended. To
// the millisecond, for two clocks are read.
func (d *Daemon) wall(t time.Duration) time.Time {
	now := time.Now()
	return now.Add(t - now.Sub(d.start)).Round(time.Millisecond)
}

// do runs f in the loop and waits for it. It returns false if the loop ended
// before.
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

// ask is do for the reconcile, which alone may call it. The budget is charged with the CPU
// time of the loop for f, and for the decisions that come of it, if a look is under way.
func (d *Daemon) ask(f func()) bool {
	var took time.Duration
	ok := d.do(func() {
		took = threadTime(func() {
			f()
			d.apply(0)
		})
	})
	if ok {
		d.budget.inLoop += took
	}
	return ok
}

// Alive waits until the loop gets on, and reports whether it runs. It does not wait for
// what the loop was asked for before: one that has much to do is alive.
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
		// Events may have waited since the loop last found that there were no more.
		late := read - idle
		if late < isStopped {
			late = 0
		}
		for i := range events[:n] {
			events[i].Flow.Late = late
			d.event(read, &events[i])
		}
		if n > 0 && late >= d.cfg.Lifetime {
			d.wantReconcile() // it shows how old the flows are
		}
		if n < len(events) {
			idle = read
		}
		d.apply(read)
		atOnce := ticksAtOnce
		if d.behind {
			atOnce = behindAtOnce
		}
		d.behind = d.model.Tick(d.now(), atOnce)
		d.apply(0)
		if d.model.HasStrays() {
			select {
			case d.strays <- struct{}{}:
			default: // it is going to look
			}
		}
	}
}

func (d *Daemon) event(now time.Duration, e *ctwatch.Event) {
	switch e.Kind {
	case ctwatch.New:
		d.model.FlowSeen(now, &e.Flow)
	case ctwatch.Gone:
		if f := &e.Flow; cone.IsAnchor(f.Src, f.Dst) {
			d.doubtAnchor(f)
			return
		}
		d.model.FlowGone(now, &e.Flow)
	case ctwatch.Overrun:
		d.wantReconcile()
	}
}

// doubtAnchor looks after the permission whose anchor f is, or was. Of the anchors that
// the daemon deletes itself none is known any more.
func (d *Daemon) doubtAnchor(f *cone.Flow) {
	if d.backends.expect == nil {
		return
	}
	if k, ok := d.backends.expect.Anchored(f.Src, f.Dst, f.OrigZone); ok {
		if d.model.Doubt(k) {
			d.repaired[anAnchor]++
		}
	}
}

// wantReconcile lets the next reconcile come at once.
func (d *Daemon) wantReconcile() {
	select {
	case d.hurry <- struct{}{}:
	default: // it is asked for already
	}
}

// deadline returns when the model wants to be called next, and a turn later at most. One
// that has more to do waits just long enough for events to be taken first.
func (d *Daemon) deadline() time.Time {
	if d.behind {
		return time.Now().Add(50 * time.Microsecond)
	}
	latest := d.start.Add(d.now().Truncate(turnEvery) + turnEvery)
	if next, wanted := d.model.Next(); wanted && d.start.Add(next).Before(latest) {
		return d.start.Add(next)
	}
	return latest
}

// drainInbox does what is asked for now. Who asks for the next thing at once, as a
// reconcile or a list does, does not keep the loop from events.
func (d *Daemon) drainInbox() {
	for range len(d.inbox) {
		f := <-d.inbox
		f()
		d.apply(0)
		d.beat()
	}
}
