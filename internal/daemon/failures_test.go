package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/engine"
)

// logged returns a logger and what it wrote since the last call.
func logged() (log *slog.Logger, lines func() string) {
	var out strings.Builder
	log = slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
	return log, func() string {
		defer out.Reset()
		return out.String()
	}
}

func TestFailuresAreCountedAndDoNotFloodTheLog(t *testing.T) {
	log, lines := logged()
	now := time.Duration(0)
	f := newFailures(log, func() time.Duration { return now }, 30*time.Second)
	expect := func(want string) {
		t.Helper()
		if got := lines(); got != want {
			t.Errorf("logged %q, want %q", got, want)
		}
	}
	f.note(request(engine.LookUpFlow), 1, nil)
	expect("")
	f.note(request(engine.LookUpFlow), 1, errors.New("no buffer"), "src", "a")
	expect("level=WARN msg=\"look up flow\" count=1 src=a err=\"no buffer\"\n")
	for range 1000 {
		f.note(request(engine.LookUpFlow), 2, errors.New("no memory"), "src", "b")
		now += time.Millisecond
	}
	expect("")
	f.note(request(engine.DenyPermissions), 3, errors.New("full")) // another kind
	expect("level=WARN msg=\"deny permissions\" count=3 err=full\n")
	f.tell()
	expect("")
	now += time.Minute
	f.tell()
	expect("level=WARN msg=\"look up flow\" count=2000 src=b err=\"no memory\"\n")
	f.tell()
	expect("")
	f.note(request(engine.DenyPermissions), 1, fmt.Errorf("send: %w", unix.ENOBUFS))
	expect("level=WARN msg=\"deny permissions\" count=1 err=\"send: no buffer space available\"\n")
	f.note(request(engine.DenyPermissions), 1, fmt.Errorf("send: %w", unix.ENOBUFS))
	expect("")
	if n := f.totals(); n["look_up_flow"] != 2001 || n["deny_permissions"] != 5 {
		t.Errorf("counted %v", n)
	}
}
