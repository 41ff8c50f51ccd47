package control

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// holdLock makes a copy of the test program hold the lock of this name until
// it is killed.
const holdLock = "CONENATD_TEST_HOLD_LOCK"

func hold(name string) {
	if _, err := acquire(name); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("held")
	select {}
}

// ownName is a lock that no other test and no daemon knows.
func ownName(t *testing.T) string {
	return fmt.Sprintf("%s-%d-%s", lockName, os.Getpid(), t.Name())
}

func mustAcquire(t *testing.T, name string) *Lock {
	t.Helper()
	l, err := acquire(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func mustClose(t *testing.T, l *Lock) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestTheSecondDaemonIsToldThePIDOfTheFirst(t *testing.T) {
	name := ownName(t)
	l := mustAcquire(t, name)
	// More often than a backlog is long: what was turned away stays nowhere.
	for range 10_000 {
		_, err := acquire(name)
		var running *RunningError
		if !errors.As(err, &running) || running.PID != os.Getpid() {
			t.Fatalf("second acquire: %v, want a RunningError with pid %d", err, os.Getpid())
		}
	}
	mustClose(t, l)
	mustClose(t, mustAcquire(t, name))
}

func TestRunningErrorSaysWhatToDo(t *testing.T) {
	for pid, want := range map[int]string{
		1234: `conenatd is already running in this network namespace (pid 1234): stop it first, or see "conenatd status"`,
		0:    `conenatd is already running in this network namespace: stop it first, or see "conenatd status"`,
	} {
		if got := (&RunningError{PID: pid}).Error(); got != want {
			t.Errorf("pid %d:\n got %s\nwant %s", pid, got, want)
		}
	}
}

func TestALockEndsWithItsKilledProcess(t *testing.T) {
	name := ownName(t)
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), holdLock+"="+name)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	_, held := acquire(name)
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // killed

	if strings.TrimSpace(line) != "held" {
		t.Fatalf("child: %q", line)
	}
	var running *RunningError
	if !errors.As(held, &running) || running.PID != child.Process.Pid {
		t.Errorf("while the child lives: %v, want a RunningError with pid %d", held, child.Process.Pid)
	}
	mustClose(t, mustAcquire(t, name))
}

func TestEachNetworkNamespaceHasItsLockAndSocket(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	type result struct {
		lock *Lock
		path string
	}
	in := func(h *lab.Host) (r result, err error) {
		err = h.Do(func() (err error) {
			if r.path, err = DefaultSocket(); err != nil {
				return err
			}
			r.lock, err = Acquire()
			return err
		})
		return r, err
	}
	gateway, err := in(l.Gateway)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, gateway.lock)
	outside, err := in(l.Outside)
	if err != nil {
		t.Fatalf("in another namespace: %v", err)
	}
	defer mustClose(t, outside.lock)
	again, err := in(l.Gateway)
	if running := (*RunningError)(nil); !errors.As(err, &running) {
		t.Errorf("again in the first namespace: %v", err)
	}
	if again.path != gateway.path || outside.path == gateway.path {
		t.Errorf("sockets: %s, then %s, and %s in another namespace", gateway.path, again.path, outside.path)
	}
	if !strings.HasPrefix(gateway.path, "/run/conenatd/") || !strings.HasSuffix(gateway.path, ".sock") {
		t.Errorf("socket: %s", gateway.path)
	}
}
