package episodes

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	// episodeEvery is the least time between two lines of the log about one episode.
	episodeEvery = time.Minute
	// episodeGrowth is the factor by which the count must grow for another line.
	episodeGrowth = 10
	// An episode is over after episodeQuiet without a note, and after episodeReconciles
	// reconciles without one: some conditions are seen only by a reconcile.
	episodeQuiet      = 15 * time.Minute
	episodeReconciles = 3
)

// A Log logs abnormal conditions, which may go on for days: when one begins, whenever
// its count has grown tenfold, and when it is over. Its methods may be called from any
// goroutine.
type Log struct {
	log   *slog.Logger
	now   func() time.Duration
	quiet time.Duration

	mu  sync.Mutex // guards all and what is in it
	all map[string]*episode
}

type episode struct {
	level slog.Level
	what  string
	args  []any // of the last note

	count, told uint64 // told is the count that the log has reported
	said        time.Duration
	last        time.Duration // time of the last note
}

// New is for a daemon with this time between two reconciles.
func New(log *slog.Logger, now func() time.Duration, reconcile time.Duration) *Log {
	return &Log{log: log, now: now, quiet: max(episodeQuiet, episodeReconciles*reconcile), all: make(map[string]*episode)}
}

// Note counts n occurrences of what. Notes with the same key are one episode; args are for
// the log.
func (e *Log) Note(level slog.Level, key, what string, n uint64, args ...any) {
	if n == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	x := e.all[key]
	if x == nil {
		x = &episode{}
		e.all[key] = x
	}
	x.level, x.what, x.args = max(x.level, level), what, args
	x.count += n
	x.last = e.now()
	e.say(x)
}

// Tell logs growth that was kept back for long enough, and episodes that are over.
func (e *Log) Tell() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(e.all)) {
		x := e.all[key]
		if e.now()-x.last > e.quiet {
			e.log.Info("no longer: "+x.what, append([]any{"count", x.count}, x.args...)...)
			delete(e.all, key)
			continue
		}
		e.say(x)
	}
}

// say logs x if it is time.
func (e *Log) say(x *episode) {
	if x.told > 0 && (x.count < episodeGrowth*x.told || e.now()-x.said < episodeEvery) {
		return
	}
	e.log.Log(context.Background(), x.level, x.what, append([]any{"count", x.count - x.told}, x.args...)...)
	x.told, x.said = x.count, e.now()
}
