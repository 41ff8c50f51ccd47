package daemon

import (
	"errors"
	"log/slog"
	"maps"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// failures logs what the kernel refused to do, one episode for each kind of request and
// errno, and counts it. Its methods may be called from any goroutine.
type failures struct {
	*episodes

	mu    sync.Mutex // guards count
	count map[string]uint64
}

func newFailures(log *slog.Logger, now func() time.Duration, reconcile time.Duration) *failures {
	return &failures{episodes: newEpisodes(log, now, reconcile), count: make(map[string]uint64)}
}

// note counts n requests that failed with err, if that is not nil; what says which
// ones in a few words, always the same, and args name this one for the log.
func (f *failures) note(what string, n int, err error, args ...any) {
	if err == nil || n == 0 {
		return
	}
	f.mu.Lock()
	f.count[what] += uint64(n)
	f.mu.Unlock()
	key := what
	if errno := unix.Errno(0); errors.As(err, &errno) { // a new cause is news
		key += ": " + errno.Error()
	}
	f.episodes.note(slog.LevelWarn, key, what, uint64(n), append(args, "err", err)...)
}

// totals returns the counts since the start, by kind.
func (f *failures) totals() map[string]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.count)
}
