package daemon

import (
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

// failuresEvery is the time between two lines of the log about failures of one kind.
const failuresEvery = time.Minute

// failures logs what the kernel refused to do, at most one line a minute for each kind
// of request, and counts it. Its methods may be called from any goroutine.
type failures struct {
	log *slog.Logger
	now func() time.Duration

	mu    sync.Mutex // guards kinds and what is in it
	kinds map[string]*failureKind
}

// A failureKind counts the failures of one kind.
type failureKind struct {
	total, unsaid uint64
	said          time.Duration // when it was logged last
	last          []any         // for the log
}

func newFailures(log *slog.Logger, now func() time.Duration) *failures {
	return &failures{log: log, now: now, kinds: make(map[string]*failureKind)}
}

// note counts n requests that failed with err, if that is not nil; what says which
// ones in a few words, always the same, and args name this one for the log.
func (f *failures) note(what string, n int, err error, args ...any) {
	if err == nil || n == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	k := f.kinds[what]
	first := k == nil
	if first {
		k = &failureKind{}
		f.kinds[what] = k
	}
	k.total += uint64(n)
	k.unsaid += uint64(n)
	k.last = append(args, "err", err)
	if first || f.now()-k.said >= failuresEvery {
		f.say(what, k)
	}
}

// tell logs what was kept back for long enough.
func (f *failures) tell() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, what := range slices.Sorted(maps.Keys(f.kinds)) {
		if k := f.kinds[what]; k.unsaid > 0 && f.now()-k.said >= failuresEvery {
			f.say(what, k)
		}
	}
}

func (f *failures) say(what string, k *failureKind) {
	f.log.Warn(what, append([]any{"count", k.unsaid}, k.last...)...)
	k.unsaid, k.said = 0, f.now()
}

// totals returns the counts since the start, by kind.
func (f *failures) totals() map[string]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make(map[string]uint64, len(f.kinds))
	for what, k := range f.kinds {
		all[what] = k.total
	}
	return all
}
