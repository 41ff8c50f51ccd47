package daemon

import (
	"context"
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

// An auditor writes the audit log, if there is one. It is a watcher with a file.
type auditor struct {
	*shared
	gone   atomic.Uint64 // records that the file does not have
	lock   sync.Mutex    // guards what follows
	opened *os.File      // by open, for use
	log    *audit.Log    // nil without an audit log
	stop   chan struct{} // closed to end the goroutine
	done   chan struct{} // closed when it has ended
}

// open opens the file of a configuration, if it has one, for use. A path that leads to the
// file in use is opened again, since logrotate may have moved that.
func (a *auditor) open(cfg *config.Config) (err error) {
	a.lock.Lock()
	defer a.lock.Unlock()
	if cfg.AuditLog != "" {
		a.opened, err = audit.Open(cfg.AuditLog)
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
	switch {
	case file == nil:
		a.finish(false)
	case a.log != nil:
		if err := a.log.Replace(file, peers); err != nil {
			a.lost(0, err)
		}
	default:
		a.start(file, peers, &watcher{events: make(chan watched, auditAhead)})
	}
}

// start begins an audit log with the events of w.
func (a *auditor) start(file *os.File, peers bool, w *watcher) {
	a.log = audit.New(file, peers)
	a.stop, a.done = make(chan struct{}), make(chan struct{})
	a.watchers.auditor.Store(w)
	go a.run(a.log, w, a.stop, a.done)
}

// close ends the audit log. If all mappings have ended, it says so.
func (a *auditor) close(ended bool) {
	a.lock.Lock()
	defer a.lock.Unlock()
	a.finish(ended)
}

func (a *auditor) finish(ended bool) {
	if a.log == nil {
		return
	}
	a.watchers.auditor.Store(nil)
	close(a.stop)
	<-a.done
	now := time.Now()
	if ended {
		a.log.End(now)
	}
	a.lost(a.log.Close(now))
	a.log = nil
}

// run writes events until stop is closed, and then those that are there already.
func (a *auditor) run(log *audit.Log, w *watcher, stop, done chan struct{}) {
	defer close(done)
	a.sync(log, stop) // after a reload there may be mappings already
	w.follow(context.Background(), stop, func(x watched) bool {
		if x.lost > 0 {
			log.Lost(x.at, x.lost)
			a.lost(x.lost, nil)
			a.sync(log, stop)
		} else {
			log.Observe(x.at, &x.event)
		}
		if len(w.events) == 0 {
			a.lost(log.Flush(time.Now()))
		}
		return true
	})
}

// lost notes n records or events that the file does not have.
func (a *auditor) lost(n uint64, err error) {
	a.gone.Add(n)
	switch {
	case err != nil:
		a.noted.Note(slog.LevelWarn, "audit", "records of the audit log are lost", max(n, 1), "err", err)
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
