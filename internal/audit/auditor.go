package audit

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/episodes"
	"github.com/conenatd/conenatd/internal/watch"
)

// ahead is how many events the audit log may be behind before it loses some.
const ahead = 1 << 15

// patience is how long a start, a reload and a stop wait for the file system of the audit log.
const patience = 5 * time.Second

// An Auditor writes the audit log, if there is one. It is a watcher with a file. Its methods may be
// called from any goroutine.
type Auditor struct {
	watchers *watch.Watchers
	noted    *episodes.Log
	standing func(stop <-chan struct{}) ([]cone.Permission, bool)

	wait   func() <-chan time.Time // patience, except in tests
	gone   atomic.Uint64           // records that the file does not have
	lock   sync.Mutex              // guards what follows
	opened *os.File                // by Open, for Use
	log    *Log                    // nil without an audit log
	end    *auditEnd               // of the goroutine
	done   chan struct{}           // closed when it has ended
}

// NewAuditor returns an Auditor without a file. standing returns the permissions that stand, or false
// if the daemon ends or stop is closed first.
func NewAuditor(w *watch.Watchers, noted *episodes.Log, standing func(stop <-chan struct{}) ([]cone.Permission, bool)) *Auditor {
	return &Auditor{watchers: w, noted: noted, standing: standing, wait: func() <-chan time.Time { return time.After(patience) }}
}

// An auditEnd ends an audit log.
type auditEnd struct {
	stop chan struct{} // closed to end it
	all  bool          // all mappings have ended by then
}

// Open opens a file for Use, unless path is empty. A path that leads to the file in use is opened
// again, since logrotate may have moved that.
func (a *Auditor) Open(path string) (err error) {
	a.lock.Lock()
	defer a.lock.Unlock()
	if path != "" {
		a.opened, err = Open(a.wait(), path)
	}
	return err
}

// Discard closes the file of Open.
func (a *Auditor) Discard() error {
	a.lock.Lock()
	defer a.lock.Unlock()
	if a.opened == nil {
		return nil
	}
	f := a.opened
	a.opened = nil
	return f.Close()
}

// Use writes to the file of Open from now on. Without one it ends the audit log.
func (a *Auditor) Use(peers bool) {
	a.lock.Lock()
	defer a.lock.Unlock()
	file := a.opened
	a.opened = nil
	wait := a.wait()
	if file != nil && a.log != nil {
		err := a.log.Replace(wait, file, peers)
		if !errors.Is(err, ErrSlow) {
			a.lost(0, err)
			return
		}
		over := make(chan time.Time)
		close(over)
		wait = over
	}
	a.finish(false, wait)
	if file != nil {
		a.start(file, peers, watch.New(ahead))
	}
}

// start begins an audit log with the events of w.
func (a *Auditor) start(file *os.File, peers bool, w *watch.Watcher) {
	a.log, a.end, a.done = New(file, peers), &auditEnd{stop: make(chan struct{})}, make(chan struct{})
	a.watchers.Auditor.Store(w)
	go a.run(a.log, w, a.end, a.done)
}

// Close ends the audit log. If all mappings have ended, it says so.
func (a *Auditor) Close(ended bool) {
	a.lock.Lock()
	defer a.lock.Unlock()
	a.finish(ended, a.wait())
}

// finish ends the audit log. One that still hangs when wait fires ends later, without its events.
func (a *Auditor) finish(ended bool, wait <-chan time.Time) {
	if a.log == nil {
		return
	}
	w := a.watchers.Auditor.Swap(nil)
	a.end.all = ended
	close(a.end.stop)
	select {
	case <-a.done:
	case <-wait:
		a.lost(w.Discard(), ErrSlow)
	}
	a.log = nil
}

// run writes events until it is told to end, and then those that wait already.
func (a *Auditor) run(log *Log, w *watch.Watcher, end *auditEnd, done chan struct{}) {
	defer close(done)
	a.sync(log, end.stop) // after a reload there may be mappings already
	w.Follow(context.Background(), end.stop, func(x watch.Event) bool {
		if x.Lost > 0 {
			log.Lost(x.At, x.Lost)
			a.lost(x.Lost, nil)
			a.sync(log, end.stop)
		} else {
			log.Observe(x.At, &x.Event)
		}
		if w.Behind() == 0 {
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
func (a *Auditor) lost(n uint64, err error) {
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

// Missing is how many records the file does not have, those included that it is not told of yet
// because it is behind.
func (a *Auditor) Missing() uint64 {
	n := a.gone.Load()
	if w := a.watchers.Auditor.Load(); w != nil {
		n += w.Lost()
	}
	return n
}

// sync shows log the standing permissions, unless the daemon or stop ends first.
func (a *Auditor) sync(log *Log, stop <-chan struct{}) {
	if all, ok := a.standing(stop); ok {
		log.Sync(time.Now(), all)
		a.lost(log.Flush(time.Now()))
	}
}
