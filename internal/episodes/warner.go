package episodes

import (
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/control"
)

// A Warner logs a warning when it arises and when it is over.
type Warner struct {
	log   *slog.Logger
	holds map[string]string        // by key, the text
	said  map[string]time.Duration // by key, when it was logged last
}

// NewWarner returns a Warner of which no warning holds.
func NewWarner(log *slog.Logger) *Warner {
	return &Warner{log, make(map[string]string), make(map[string]time.Duration)}
}

// Tell takes in which warnings hold now. One that comes and goes is logged at most once in
// episodeEvery.
func (w *Warner) Tell(now time.Duration, all []control.Finding) {
	over := maps.Clone(w.holds)
	for _, x := range all {
		key := x.ID + " " + x.About
		delete(over, key)
		said, known := w.said[key]
		if _, holds := w.holds[key]; !holds {
			if known && now-said < episodeEvery {
				continue
			}
			w.log.Warn(x.Text)
			w.said[key] = now
		}
		w.holds[key] = x.Text
	}
	for _, key := range slices.Sorted(maps.Keys(over)) {
		w.log.Info("no longer: " + over[key])
		delete(w.holds, key)
	}
	maps.DeleteFunc(w.said, func(key string, said time.Duration) bool {
		_, holds := w.holds[key]
		return !holds && now-said >= episodeEvery
	})
}
