package episodes

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/episodes/episodestest"
)

func TestFailuresAreCountedAndDoNotFloodTheLog(t *testing.T) {
	log, lines := episodestest.Logged()
	now := time.Duration(0)
	f := NewFailures(log, func() time.Duration { return now }, 30*time.Second)
	expect := func(want string) {
		t.Helper()
		if got := lines(); got != want {
			t.Errorf("logged %q, want %q", got, want)
		}
	}
	f.Note("look_up_flow", 1, nil)
	expect("")
	f.Note("look_up_flow", 1, errors.New("no buffer"), "src", "a")
	expect("level=WARN msg=\"look up flow\" count=1 src=a err=\"no buffer\"\n")
	for range 1000 {
		f.Note("look_up_flow", 2, errors.New("no memory"), "src", "b")
		now += time.Millisecond
	}
	expect("")
	f.Note("deny_permissions", 3, errors.New("full")) // another kind
	expect("level=WARN msg=\"deny permissions\" count=3 err=full\n")
	f.Tell()
	expect("")
	now += time.Minute
	f.Tell()
	expect("level=WARN msg=\"look up flow\" count=2000 src=b err=\"no memory\"\n")
	f.Tell()
	expect("")
	f.Note("deny_permissions", 1, fmt.Errorf("send: %w", unix.ENOBUFS))
	expect("level=WARN msg=\"deny permissions\" count=1 err=\"send: no buffer space available\"\n")
	f.Note("deny_permissions", 1, fmt.Errorf("send: %w", unix.ENOBUFS))
	expect("")
	if n := f.Totals(); n["look_up_flow"] != 2001 || n["deny_permissions"] != 5 {
		t.Errorf("counted %v", n)
	}
}
