package episodes

import (
	"errors"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Request is the identifier (docs/control.md) of something that the daemon asks of the
// kernel.
type Request string

// words is r as the log shows it.
func (r Request) words() string { return strings.ReplaceAll(string(r), "_", " ") }

// Failures logs what the kernel refused to do, one episode for each kind of request and
// errno, and counts it. Its methods may be called from any goroutine.
type Failures struct {
	*Log

	mu    sync.Mutex        // guards count
	count map[string]uint64 // by Request
}

// NewFailures is for a daemon with this time between two reconciles.
func NewFailures(log *slog.Logger, now func() time.Duration, reconcile time.Duration) *Failures {
	return &Failures{Log: New(log, now, reconcile), count: make(map[string]uint64)}
}

// Note counts n requests that failed with err, if that is not nil; args describe the request
// in the log.
func (f *Failures) Note(r Request, n int, err error, args ...any) {
	if err == nil || n == 0 {
		return
	}
	f.mu.Lock()
	f.count[string(r)] += uint64(n)
	f.mu.Unlock()
	key := r.words()
	if errno := unix.Errno(0); errors.As(err, &errno) { // a new cause is a new episode
		key += ": " + errno.Error()
	}
	f.Log.Note(slog.LevelWarn, key, r.words(), uint64(n), append(args, "err", err)...)
}

// Totals returns the counts since the start, by kind.
func (f *Failures) Totals() map[string]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.count)
}
