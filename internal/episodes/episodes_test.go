package episodes

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/episodes/episodestest"
)

// Fails when a lasting condition is logged at each reconcile, or never again after the first
// time.
func TestWhatGoesOnIsLoggedWhenItBeginsGrowsAndEnds(t *testing.T) {
	log, lines := episodestest.Logged()
	now := time.Hour
	const reconcile = 30 * time.Second
	e := New(log, func() time.Duration { return now }, reconcile)
	expect := func(want string) {
		t.Helper()
		if got := lines(); got != want {
			t.Errorf("logged %q, want %q", got, want)
		}
	}
	note := func() { e.Note(slog.LevelInfo, "refused: forwarded", "permissions refused", 1, "reason", "forwarded") }

	note()
	expect("level=INFO msg=\"permissions refused\" count=1 reason=forwarded\n")
	const day = int(24 * time.Hour / reconcile)
	for range day - 1 {
		now += reconcile
		note()
		e.Tell()
	}
	if got := lines(); strings.Count(got, "\n") != 3 || !strings.HasSuffix(got, " count=900 reason=forwarded\n") {
		t.Errorf("logged in a day: %q", got)
	}
	now += 10 * time.Minute
	e.Tell()
	expect("") // it may go on
	now += 10 * time.Minute
	e.Tell()
	expect("level=INFO msg=\"no longer: permissions refused\" count=2880 reason=forwarded\n")
	e.Tell()
	expect("")
	note()
	expect("level=INFO msg=\"permissions refused\" count=1 reason=forwarded\n")

	// A burst grows tenfold in no time.
	e.Note(slog.LevelWarn, "other", "something", 1)
	expect("level=WARN msg=something count=1\n")
	for range 1000 {
		e.Note(slog.LevelWarn, "other", "something", 1)
		e.Tell()
	}
	expect("")
	now += time.Minute
	e.Tell()
	expect("level=WARN msg=something count=1000\n")

	// What is seen once in an hour goes on in between.
	e = New(log, func() time.Duration { return now }, time.Hour)
	note()
	expect("level=INFO msg=\"permissions refused\" count=1 reason=forwarded\n")
	now += 2 * time.Hour
	e.Tell()
	expect("")
}
