package control

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Stop ends the daemon in the calling thread's network namespace by SIGTERM, and waits until
// its process has ended, at most for the given time. It returns the pid of the daemon, or 0
// without an error if none runs.
//
// Stop finds the daemon as Find does, but it believes only a holder of the lock that runs as
// root, as this user, or as the owner of the folder of the default sockets.
//
// A network namespace may have several root directories: of a chroot, or of a container that
// shares the network of the machine. Stop leaves the daemon of another root directory alone,
// so that the removal of a package in a chroot does not stop the daemon of the machine.
func Stop(wait time.Duration) (pid int, err error) { return stop(lockName, folder, wait) }

func stop(name, folder string, wait time.Duration) (pid int, err error) {
	_, holder, err := ask(name, folder)
	if errors.Is(err, ErrNotRunning) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	if holder.Pid == 0 {
		return 0, errors.New("stop conenatd: its process is not visible from this PID namespace: stop it where it was started")
	}
	pid = int(holder.Pid)
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, fmt.Errorf("stop conenatd: open the process with pid %d: %w", pid, err)
	}
	defer unix.Close(pidfd)
	// The daemon may have ended before we opened its process, and another one may have its pid.
	if _, again, err := ask(name, folder); err != nil || *again != *holder {
		return 0, errors.Join(errors.New("stop conenatd: it ended or restarted meanwhile: try again"), err)
	}
	// Any user may name the default socket, and may have called listen in a process that has
	// ended, so that another user's process has its pid.
	if !trustedUser(holder, folder) {
		return 0, fmt.Errorf("stop conenatd: the process with pid %d of user %d may not be conenatd: end it yourself", pid, holder.Uid)
	}
	switch same, err := sameRoot(pid); {
	case errors.Is(err, fs.ErrPermission):
		return 0, fmt.Errorf("stop conenatd: compare root directories: %w: run as root, or as the user of pid %d", err, pid)
	case err != nil:
		return 0, fmt.Errorf("stop conenatd: compare root directories: %w", err)
	case !same:
		return 0, fmt.Errorf("stop conenatd: the daemon with pid %d has another root directory: stop it where it was started", pid)
	}
	if err := unix.PidfdSendSignal(pidfd, unix.SIGTERM, nil, 0); err != nil {
		return 0, fmt.Errorf("stop conenatd: %w", err)
	}
	for end := time.Now().Add(wait); ; {
		left := max(time.Until(end), 0)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("stop conenatd: wait for its end: %w", err)
		case n == 0:
			return 0, fmt.Errorf("stop conenatd: the daemon with pid %d still runs after %v", pid, wait)
		default:
			return pid, nil
		}
	}
}

// sameRoot reports whether a process has the root directory of this one.
func sameRoot(pid int) (bool, error) {
	mine, err := os.Stat("/")
	if err != nil {
		return false, err
	}
	its, err := os.Stat(fmt.Sprintf("/proc/%d/root", pid))
	if err != nil {
		return false, err
	}
	return os.SameFile(mine, its), nil
}
