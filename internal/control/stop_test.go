package control

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Fails when Stop sends no signal, or takes a missing daemon for an error.
func TestStopEndsTheDaemon(t *testing.T) {
	name := ownName(t)
	child := holder(t, exec.Command(os.Args[0]), name, "/some/where/c.sock")
	if pid, err := stop(name, folder, time.Minute); err != nil || pid != child.Process.Pid {
		t.Fatalf("stopped %d, %v, want pid %d", pid, err, child.Process.Pid)
	}
	_ = child.Wait() // killed
	if status := child.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGTERM {
		t.Errorf("the daemon: %v", child.ProcessState)
	}
	if pid, err := stop(name, folder, time.Minute); err != nil || pid != 0 {
		t.Errorf("without a daemon: stopped %d, %v", pid, err)
	}
	defer mustClose(t, mustAcquire(t, name)) // a cleanup
	if pid, err := stop(name, folder, time.Minute); err != nil || pid != 0 {
		t.Errorf("during a cleanup: stopped %d, %v", pid, err)
	}
}

// Fails when Stop does not wait for the end.
func TestStopSaysThatTheDaemonStillRuns(t *testing.T) {
	name := ownName(t)
	t.Setenv(holdDeaf, "yes")
	child := holder(t, exec.Command(os.Args[0]), name, "/some/where/c.sock")
	refused(t, name, folder, "still runs after 1ms", child)
}

// In a chroot a package is removed while the daemon of the machine runs, or the other way round.
//
// Fails when Stop does not compare root directories.
func TestStopLeavesAnotherRootDirectoryAlone(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: run with sudo")
	}
	name := ownName(t)
	t.Setenv(holdRoot, t.TempDir())
	child := holder(t, exec.Command(os.Args[0]), name, "/some/where/c.sock")
	refused(t, name, folder, "another root directory", child)
}

// Any user may take the lock and name the default socket. Root must not send a signal to a
// pid for which only that user vouches.
//
// Fails when Stop believes whom Find believes.
func TestStopDoesNotBelieveAnotherUser(t *testing.T) {
	name, his := ownName(t), forAll(t)
	own, err := DefaultSocket()
	if err != nil {
		t.Fatal(err)
	}
	child := holder(t, asNobody(t), name, filepath.Join(his, filepath.Base(own)))
	if path, err := find(name, his); err != nil {
		t.Errorf("found %q, %v", path, err)
	}
	refused(t, name, his, "of user 65534 may not be conenatd", child)
}

// refused fails the test unless a stop says why it does not stop the holder of a lock, which
// runs on.
func refused(t *testing.T, name, folder, why string, child *exec.Cmd) {
	t.Helper()
	if pid, err := stop(name, folder, time.Millisecond); err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("stopped %d, %v", pid, err)
	}
	_, err := acquire(name, "")
	if running := new(RunningError); !errors.As(err, &running) || running.PID != child.Process.Pid {
		t.Errorf("afterwards the lock: %v, want that pid %d has it", err, child.Process.Pid)
	}
}
