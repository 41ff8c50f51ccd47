package selftest

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/conenatd/conenatd/internal/lab"
)

// TestMain can also play a daemon that does nothing: it reports that it is ready
// and waits for its end.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "run" {
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		if c, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET")); err == nil {
			_, _ = c.Write([]byte("READY=1"))
		}
		<-stop
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// A selftest that passes with any daemon would be worthless.
func TestDaemonThatDoesNothingFails(t *testing.T) {
	lab.ForTest(t, lab.Options{}) // skips without privilege
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	all := checks
	defer func() { checks = all }()
	// The slowest checks wait for a packet like the first one, so two are enough.
	checks = []check{all[0], all[5]}
	var out bytes.Buffer
	if err := Run(&out, exe); err != ErrFailed {
		t.Errorf("error %v, want ErrFailed", err)
	}
	if n := strings.Count(out.String(), "FAIL  "); n != 3 { // the second check applies to one backend only
		t.Errorf("%d checks failed, want 3:\n%s", n, &out)
	}
}

// Fails when an error ends more than its attempt, or a fault of the selftest itself looks like one.
func TestAttemptEndsWithItsError(t *testing.T) {
	wrong := errors.New("wrong")
	after := false
	if err := attempt(func() { get(0, wrong); after = true }); err != wrong || after {
		t.Errorf("error %v, want %v; it went on: %v", err, wrong, after)
	}
	if err := attempt(func() { must(nil); after = get(true, nil) }); err != nil || !after {
		t.Errorf("error %v without one; it went on: %v", err, after)
	}
	defer func() {
		if p := recover(); p != "a fault" {
			t.Errorf("panic %v", p)
		}
	}()
	_ = attempt(func() { panic("a fault") })
}
