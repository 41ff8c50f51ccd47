package daemon

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
	// episodeGrowth is how many times as much it must be for another line.
	episodeGrowth = 10
	// episodeQuiet is how long nothing must come for an episode to be over, and more than
	// so many reconciles: what goes on may be seen at each of these alone.
	episodeQuiet      = 15 * time.Minute
	episodeReconciles = 3
)

// episodes logs what should not happen, and may go on for days: when it begins, whenever
// it is ten times as much, and when it is over. Its methods may be called from any
// goroutine.
type episodes struct {
	log   *slog.Logger
	now   func() time.Duration
	quiet time.Duration

	mu  sync.Mutex // guards all and what is in it
	all map[string]*episode
}

type episode struct {
	level slog.Level
	what  string
	args  []any // of the last that was noted

	count, told uint64 // told are those that a line of the log had
	said        time.Duration
	last        time.Duration // when something came
}

// newEpisodes is for a daemon with that time between two reconciles.
func newEpisodes(log *slog.Logger, now func() time.Duration, reconcile time.Duration) *episodes {
	return &episodes{log: log, now: now, quiet: max(episodeQuiet, episodeReconciles*reconcile), all: make(map[string]*episode)}
}

// note takes in n times what. Those with the same key are one episode; args are for the
// log.
func (e *episodes) note(level slog.Level, key, what string, n uint64, args ...any) {
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

// tell logs what was kept back for long enough, and what is over.
func (e *episodes) tell() {
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
func (e *episodes) say(x *episode) {
	if x.told > 0 && (x.count < episodeGrowth*x.told || e.now()-x.said < episodeEvery) {
		return
	}
	e.log.Log(context.Background(), x.level, x.what, append([]any{"count", x.count - x.told}, x.args...)...)
	x.told, x.said = x.count, e.now()
}
