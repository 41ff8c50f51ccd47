package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conenatd/conenatd/internal/audit"
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
)

// auditAhead is how many events the audit log may be behind before it loses some.
const auditAhead = 1 << 15

// auditTime is how long a start, a reload and a stop wait for the file system of the audit log.
const auditTime = 5 * time.Second

// An auditor writes the audit log, if there is one. It is a watcher with a file.
type auditor struct {
	*shared
	wait   func() <-chan time.Time // auditTime
	gone   atomic.Uint64           // records that the file does not have
	lock   sync.Mutex              // guards what follows
	opened *os.File                // by open, for use
	log    *audit.Log              // nil without an audit log
	end    *auditEnd               // of the goroutine
	done   chan struct{}           // closed when it has ended
}

// An auditEnd ends an audit log.
type auditEnd struct {
	stop chan struct{} // closed to end it
	all  bool          // all mappings have ended by then
}

// open opens the file of a configuration, if it has one, for use. A path that leads to the
// file in use is opened again, since logrotate may have moved that.
func (a *auditor) open(cfg *config.Config) (err error) {
	a.lock.Lock()
	defer a.lock.Unlock()
	if cfg.AuditLog != "" {
		a.opened, err = audit.Open(a.wait(), cfg.AuditLog)
	}
	return err
}

// discard closes the file of open.
func (a *auditor) discard() error {
	a.lock.Lock()
	defer a.lock.Unlock()
	if a.opened == nil {
		return nil
	}
	f := a.opened
	a.opened = nil
	return f.Close()
}

// use writes to the file of open from now on. Without one it ends the audit log.
func (a *auditor) use(peers bool) {
	a.lock.Lock()
	defer a.lock.Unlock()
	file := a.opened
	a.opened = nil
	wait := a.wait()
	if file != nil && a.log != nil {
		err := a.log.Replace(wait, file, peers)
		if !errors.Is(err, audit.ErrSlow) {
			a.lost(0, err)
			return
		}
		over := make(chan time.Time)
		close(over)
		wait = over
	}
	a.finish(false, wait)
	if file != nil {
		a.start(file, peers, &watcher{events: make(chan watched, auditAhead)})
	}
}

// start begins an audit log with the events of w.
func (a *auditor) start(file *os.File, peers bool, w *watcher) {
	a.log, a.end, a.done = audit.New(file, peers), &auditEnd{stop: make(chan struct{})}, make(chan struct{})
	a.watchers.auditor.Store(w)
	go a.run(a.log, w, a.end, a.done)
}

// close ends the audit log. If all mappings have ended, it says so.
func (a *auditor) close(ended bool) {
	a.lock.Lock()
	defer a.lock.Unlock()
	a.finish(ended, a.wait())
}

// finish ends the audit log. One that still hangs when wait fires ends later, without its events.
func (a *auditor) finish(ended bool, wait <-chan time.Time) {
	if a.log == nil {
		return
	}
	w := a.watchers.auditor.Swap(nil)
	a.end.all = ended
	close(a.end.stop)
	select {
	case <-a.done:
	case <-wait:
		a.lost(w.discard(), audit.ErrSlow)
	}
	a.log = nil
}

// run writes events until the end, and then those that are there already.
func (a *auditor) run(log *audit.Log, w *watcher, end *auditEnd, done chan struct{}) {
	defer close(done)
	a.sync(log, end.stop) // after a reload there may be mappings already
	w.follow(context.Background(), end.stop, func(x watched) bool {
		if x.lost > 0 {
			log.Lost(x.at, x.lost)
			a.lost(x.lost, nil)
			a.sync(log, end.stop)
		} else {
			log.Observe(x.at, &x.event)
		}
		if len(w.events) == 0 {
			a.lost(log.Flush(time.Now()))
		}
		return true
	})
	if end.all {
		log.End(time.Now())
	}
	a.lost(log.Close(time.Now()))
}

// lost notes n records or events that the file does not have.
func (a *auditor) lost(n uint64, err error) {
	if err != nil {
		n = max(n, 1)
	}
	a.gone.Add(n)
	switch {
	case err != nil:
		a.noted.Note(slog.LevelWarn, "audit", "records of the audit log are lost", n, "err", err)
	case n > 0:
		a.noted.Note(slog.LevelWarn, "audit", "records of the audit log are lost", n)
	}
}

// missing is how many records the file does not have, those included that it is not told of yet
// because it is behind.
func (a *auditor) missing() uint64 {
	n := a.gone.Load()
	if w := a.watchers.auditor.Load(); w != nil {
		n += w.lost.Load()
	}
	return n
}

// sync asks the loop for the standing permissions, unless the loop or stop ends first.
func (a *auditor) sync(log *audit.Log, stop <-chan struct{}) {
	const atOnce = 256
	var all []cone.Permission
	for at := 0; at >= 0; {
		var some []cone.Permission
		next := 0
		ok := a.doUnless(stop, func(l *loop) {
			next = l.engine.Model.Walk(at, atOnce, func(v cone.View) {
				if v.State == cone.StateStanding {
					some = append(some, v.Permission)
				}
			})
		})
		if !ok {
			return
		}
		all, at = append(all, some...), next
	}
	log.Sync(time.Now(), all)
	a.lost(log.Flush(time.Now()))
}
