package daemon

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"
)

// warnEvery is the least time between two times that one warning is logged.
const warnEvery = time.Minute

// A warning is a sentence for the user. The key says what it is about: the numbers in
// the text may change meanwhile.
type warning struct{ key, text string }

// warnings are those that hold at one time, in the order of a status.
type warnings []warning

func (w *warnings) add(key, format string, args ...any) {
	*w = append(*w, warning{key, fmt.Sprintf(format, args...)})
}

// addAll adds texts that are always the same.
func (w *warnings) addAll(texts []string) {
	for _, t := range texts {
		*w = append(*w, warning{t, t})
	}
}

func (w warnings) texts() []string {
	out := make([]string, len(w))
	for i := range w {
		out[i] = w[i].text
	}
	return out
}

// A warner logs a warning when it arises and when it is over.
type warner struct {
	log   *slog.Logger
	holds map[string]string        // by key, the text
	said  map[string]time.Duration // by key, when it was logged last
}

func newWarner(log *slog.Logger) *warner {
	return &warner{log, make(map[string]string), make(map[string]time.Duration)}
}

// tell takes in which warnings hold now. One that comes and goes is logged once in
// warnEvery.
func (w *warner) tell(now time.Duration, all warnings) {
	over := maps.Clone(w.holds)
	for _, x := range all {
		delete(over, x.key)
		said, known := w.said[x.key]
		if _, holds := w.holds[x.key]; !holds {
			if known && now-said < warnEvery {
				continue
			}
			w.log.Warn(x.text)
			w.said[x.key] = now
		}
		w.holds[x.key] = x.text
	}
	for _, key := range slices.Sorted(maps.Keys(over)) {
		w.log.Info("no longer: " + over[key])
		delete(w.holds, key)
	}
	maps.DeleteFunc(w.said, func(key string, said time.Duration) bool {
		_, holds := w.holds[key]
		return !holds && now-said >= warnEvery
	})
}
