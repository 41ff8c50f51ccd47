package control

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// holdLock makes a copy of the test program hold the lock of this name until
// it is killed.
const holdLock = "CONENATD_TEST_HOLD_LOCK"

// holdSocket is the path on which the copy says that it listens.
const holdSocket = "CONENATD_TEST_HOLD_SOCKET"

// holdRoot is the root directory that the copy gets, and holdDeaf lets it ignore SIGTERM.
const (
	holdRoot = "CONENATD_TEST_HOLD_ROOT"
	holdDeaf = "CONENATD_TEST_HOLD_DEAF"
)

func hold(name string) {
	if root := os.Getenv(holdRoot); root != "" {
		if err := syscall.Chroot(root); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	if os.Getenv(holdDeaf) != "" {
		signal.Ignore(syscall.SIGTERM)
	}
	if _, err := acquire(name, os.Getenv(holdSocket)); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("held")
	select {}
}

// ownName is the name of a lock that no other test and no daemon uses.
func ownName(t *testing.T) string {
	return fmt.Sprintf("%s-%d-%s", lockName, os.Getpid(), t.Name())
}

func mustAcquire(t *testing.T, name string) *Lock {
	t.Helper()
	l, err := acquire(name, "")
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
	// More connections than a backlog holds: none of them must stay in it.
	for i := range 10_000 {
		_, err := acquire(name, "")
		var running *RunningError
		if !errors.As(err, &running) || running.PID != os.Getpid() {
			t.Fatalf("second acquire: %v, want a RunningError with pid %d", err, os.Getpid())
		}
		if i%1000 == 0 { // until all so far are answered: a busy machine must not fill the backlog
			if _, err := find(name, ""); !errors.Is(err, ErrNotRunning) {
				t.Fatalf("find: %v, want ErrNotRunning", err)
			}
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
	child := holder(t, exec.Command(os.Args[0]), name, "")
	_, held := acquire(name, "")
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // killed

	var running *RunningError
	if !errors.As(held, &running) || running.PID != child.Process.Pid {
		t.Errorf("while the child lives: %v, want a RunningError with pid %d", held, child.Process.Pid)
	}
	mustClose(t, mustAcquire(t, name))
}

// holder starts a copy of the test program that holds the lock and says that it listens
// on socket.
func holder(t *testing.T, child *exec.Cmd, name, socket string) *exec.Cmd {
	t.Helper()
	child.Env = append(os.Environ(), holdLock+"="+name, holdSocket+"="+socket)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = child.Process.Kill() // it may be done
		_ = child.Wait()
	})
	if line, _ := bufio.NewReader(out).ReadString('\n'); strings.TrimSpace(line) != "held" {
		t.Fatalf("child: %q", line)
	}
	return child
}

func TestWhoHoldsTheLockSaysWhereItListens(t *testing.T) {
	name, path := ownName(t), "/some/where/c.sock"
	l, err := acquire(name, path)
	if err != nil {
		t.Fatal(err)
	}
	for range 10_000 { // more often than a backlog is long
		if got, err := find(name, folder); err != nil || got != path {
			t.Fatalf("found %q, %v", got, err)
		}
	}
	mustClose(t, l)
	if got, err := find(name, folder); !errors.Is(err, ErrNotRunning) {
		t.Errorf("without a daemon: found %q, %v", got, err)
	}
	defer mustClose(t, mustAcquire(t, name)) // a cleanup
	if got, err := find(name, folder); !errors.Is(err, ErrNotRunning) {
		t.Errorf("during a cleanup: found %q, %v", got, err)
	}
}

// Any local user may take the lock. Root must not use that user's socket.
//
// Fails when every holder is trusted.
func TestAnotherUserIsNotBelieved(t *testing.T) {
	name, his, child := ownName(t), forAll(t), asNobody(t)
	own, err := DefaultSocket()
	if err != nil {
		t.Fatal(err)
	}
	holder(t, child, name, filepath.Join(his, filepath.Base(own)))
	want := fmt.Sprintf("the process with pid %d of user %d has its name", child.Process.Pid, nobody)
	if got, err := find(name, folder); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("found %q, %v", got, err)
	}
	if got, err := find(name, his); err != nil { // it is the default socket
		t.Errorf("found %q, %v", got, err)
	}
	other := ownName(t) + "-other"
	holder(t, asNobody(t), other, filepath.Join(his, "1.sock"))
	if got, err := find(other, his); err == nil { // it is that of another network namespace
		t.Errorf("found %q", got)
	}
	given := forAll(t)
	if err := os.Chown(given, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	if got, err := find(name, given); err != nil { // which is his
		t.Errorf("found %q, %v", got, err)
	}
}

const nobody = 65534

// asNobody returns a command that runs a copy of the test program as the user nobody.
func asNobody(t *testing.T) *exec.Cmd {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: run with sudo")
	}
	dir := forAll(t)
	text, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "control.test")
	if err := os.WriteFile(program, text, 0o755); err != nil {
		t.Fatal(err)
	}
	child := exec.Command(program)
	child.Dir = dir
	child.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	return child
}

// forAll makes a folder that every user may read.
func forAll(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "conenatd-control-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
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
			r.lock, err = Acquire("")
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
