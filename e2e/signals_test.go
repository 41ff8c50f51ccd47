package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Somebody signals a daemon that has hardly begun to start: its configuration is being read. SIGHUP
// ends no start; the configuration is read again when the daemon runs. SIGUSR1 ends it as it ends
// a daemon that runs, with status 0 and nothing undone.
//
// Fails when main catches these signals only after it has read the configuration.
func TestSignalsDuringTheStart(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	path := filepath.Join(t.TempDir(), "c.toml")
	s.Must(os.WriteFile(path, []byte("[[subnet]]\nprefix = \"10.47.11.0/24\"\n"), 0o644))

	signalled := s.atTheFirstOpen(path, syscall.SIGHUP)
	s.Start("--config", path)
	s.Must(<-signalled)
	s.Until("the configuration is read again", func() bool { return s.logs("INFO", "configuration reloaded") == 1 })
	s.Stop()

	signalled = s.atTheFirstOpen(path, syscall.SIGUSR1)
	ctx, cancel := context.WithTimeout(context.Background(), stage.Patience())
	defer cancel()
	out, err := s.Gateway.Command(ctx, stage.Exe(), "run", "--config", path,
		"--control-socket", filepath.Join(t.TempDir(), "s")).CombinedOutput()
	s.Must(<-signalled)
	if err != nil {
		t.Errorf("after SIGUSR1: %v\n%s", err, out)
	}
}

// atTheFirstOpen sends a signal to the first process that opens a file, before the kernel lets it do
// so (fanotify(7)), once another thread of it has taken the signal. The channel gives the result.
func (s *scene) atTheFirstOpen(path string, sig syscall.Signal) <-chan error {
	s.T.Helper()
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_CONTENT|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDONLY|unix.O_CLOEXEC)
	s.Must(err)
	events := os.NewFile(uintptr(fd), "fanotify")
	s.Must(events.SetReadDeadline(time.Now().Add(stage.Patience())))
	s.Must(unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_OPEN_PERM, unix.AT_FDCWD, path))
	done := make(chan error, 1)
	go func() {
		defer events.Close() // lets later opens pass
		var e unix.FanotifyEventMetadata
		if err := binary.Read(events, binary.NativeEndian, &e); err != nil {
			done <- err
			return
		}
		err := unix.Kill(int(e.Pid), sig)
		poll := time.NewTicker(time.Millisecond)
		defer poll.Stop()
		for range 1000 { // the thread that the kernel chose may be the one that waits here
			if err != nil || !pending(int(e.Pid), sig) {
				break
			}
			<-poll.C
		}
		if failed := binary.Write(events, binary.NativeEndian, unix.FanotifyResponse{Fd: e.Fd, Response: unix.FAN_ALLOW}); err == nil {
			err = failed
		}
		_ = unix.Close(int(e.Fd))
		done <- err
	}()
	return done
}

// pending reports whether no thread of a process has taken a signal yet.
func pending(pid int, sig syscall.Signal) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false // it has ended
	}
	_, mask, _ := strings.Cut(string(text), "ShdPnd:")
	var set uint64
	_, _ = fmt.Sscanf(mask, "%x", &set)
	return set&(1<<(sig-1)) != 0
}
