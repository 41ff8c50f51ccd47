package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
)

// In a process of its own a test binary listens, and so is somebody else's listener: see
// TestForeignListenerIsFound.
const listenEnv = "CONENATD_BENCH_LISTEN"

func TestMain(m *testing.M) {
	if os.Getenv(listenEnv) != "" {
		os.Exit(listen())
	}
	os.Exit(m.Run())
}

// listen joins a group of conntrack, prints a line, and waits until its standard input ends.
// It has no relation to the tests that look for it: its parent, a shell, has ended.
func listen() int {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.NFNLGRP_CONNTRACK_DESTROY - 1)})
	}
	if err != nil {
		return 1
	}
	if _, err := os.Stdout.WriteString("listens\n"); err != nil {
		return 1
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// listenersOf returns the foreign listeners in the namespace of a host.
func listenersOf(t *testing.T, h *lab.Host) (there []foreign) {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Fstat(h.FD(), &stat); err != nil {
		t.Fatal(err)
	}
	all, err := foreigners()
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(f foreign) bool { return f.netns != stat.Ino })
}

// Fails when a listener in another network namespace is not found or not named, and when a
// race measures beside it.
func TestForeignListenerIsFound(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	if there := listenersOf(t, l.Gateway); len(there) != 0 {
		t.Fatalf("there is %v already", there)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The shell ends at once, so that the listener is no descendant of this process. A shell
	// reads nothing for a program in the background, so the pipe is passed on by name.
	cmd := l.Gateway.Command(t.Context(), "sh", "-c", `exec 3<&0; "$0" <&3 3<&- & exit`, self)
	cmd.Env = append(os.Environ(), listenEnv+"=1")
	end, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	said, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer end.Close()
	if _, err := io.ReadFull(said, make([]byte, len("listens\n"))); err != nil {
		t.Fatal(err)
	}
	there := listenersOf(t, l.Gateway)
	if len(there) != 1 || there[0].pid == 0 || !strings.Contains(there[0].String(), "bench.test") {
		t.Fatalf("found %v", there)
	}
	r := (&options{rounds: 1, log: io.Discard, stopped: func() error { return nil }}).race([]cell{{run: func(*gateway) (time.Duration, error) {
		t.Error("it measures")
		return 1, nil
	}}})
	if _, err := r.against(new(gateway), []*gateway{new(gateway)}); !errors.Is(err, errDisturbed) || !strings.Contains(err.Error(), "bench.test") {
		t.Errorf("the race ends with %v", err)
	}
	if err := run(t.Context(), []string{"-exe", self, "-tables", "a"}, io.Discard); !errors.Is(err, errDisturbed) {
		t.Errorf("the program ends with %v", err)
	}
}

// Fails when the program takes its own listeners for somebody else's, or a listener does not
// listen.
func TestOwnListenersDoNotDisturb(t *testing.T) {
	for _, listen := range []listening{silent, reader, conntrackE} {
		g, err := newGateway(arm{name: "an ear", listen: listen}, "")
		if errors.Is(err, lab.ErrPrivilege) || errors.Is(err, exec.ErrNotFound) || os.Getenv("CONENATD_NO_LAB") != "" {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := g.start(); err != nil {
			t.Fatal(err)
		}
		heard, err := listenersIn(fmt.Sprintf("/proc/self/fd/%d", g.Gateway.FD()))
		if err != nil || len(heard) != 1 {
			t.Errorf("%d listeners (%v)", len(heard), err)
		}
		if there := listenersOf(t, g.Gateway); len(there) != 0 {
			t.Errorf("%v is taken for somebody else's", there)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
