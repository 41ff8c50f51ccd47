package daemon_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/daemon"
	"github.com/conenatd/conenatd/internal/lab"
)

// exhaustedInside runs a daemon, uses up all descriptors of the process, says so, and
// goes on until its input ends.
func exhaustedInside(dir string) error {
	d, err := newInside(dir)
	if err != nil {
		return err
	}
	stop, ended := runReady(d)
	defer stop()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100, Max: 100}); err != nil {
		return err
	}
	var all []int
	for {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EMFILE) {
			break
		}
		if err != nil {
			return err
		}
		all = append(all, fd)
	}
	fmt.Println("full")
	_, _ = io.Copy(io.Discard, os.Stdin)
	for _, fd := range all {
		_ = unix.Close(fd)
	}
	stop()
	return <-ended
}

// Fails when the listener needs a free descriptor, and when net/http writes to stderr
// what goes wrong with it.
func TestStatusAnswersWithoutAFreeDescriptor(t *testing.T) {
	t.Parallel()
	l := lab.ForTest(t, lab.Options{})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := l.Gateway.Command(t.Context(), self)
	c.Env = append(os.Environ(), insideEnv+"="+dir, roleEnv+"=exhausted")
	var stderr strings.Builder
	c.Stderr = &stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "full\n" {
		t.Errorf("the daemon says %q", line)
	}
	path := filepath.Join(dir, "control.sock")
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if st, err := control.Dial(path).Status(ctx); err != nil || len(st.Subnets) != 1 {
			t.Errorf("status: %v, %+v", err, st)
		}
		cancel()
		err := l.Gateway.Do(func() error {
			if found, err := control.Find(); err != nil || found != path {
				return fmt.Errorf("found %q, want %q: %w", found, path, err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(in.Close(), c.Wait()); err != nil || stderr.Len() > 0 {
		t.Errorf("%v: %s", err, stderr.String())
	}
}

// narrowInside runs daemons under two limits of open files: one less than a daemon asks for,
// and what it asks for.
func narrowInside(dir string) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	enough := len(entries) - 1 + daemon.Descriptors
	limit := func(n int) error {
		return unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(n), Max: 1000})
	}
	if err := limit(enough - 1); err != nil {
		return err
	}
	_, err = newInside(dir)
	if err == nil || strings.Count(err.Error(), "\n") > 0 || !strings.Contains(err.Error(), "raise it") {
		return fmt.Errorf("with too few, the start says %w", err)
	}
	if err := limit(enough); err != nil {
		return err
	}
	d, err := newInside(dir)
	if err != nil {
		return err
	}
	stop, ended := runReady(d)
	defer stop()
	st, err := control.Dial(filepath.Join(dir, "control.sock")).Status(context.Background())
	if err == nil && len(st.Counters.Failed) > 0 {
		err = fmt.Errorf("with enough, these requests failed: %v", st.Counters.Failed)
	}
	stop()
	return errors.Join(err, <-ended)
}

// Fails when a daemon starts that cannot open what it needs, and when what it asks for is
// less than it needs.
func TestStartWithTooFewDescriptorsIsRefused(t *testing.T) {
	t.Parallel()
	runRole(t, lab.ForTest(t, lab.Options{}), "narrow")
}
