package control

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// lockName is an abstract unix socket. The kernel scopes its name to the network namespace,
// whatever the mounts, and frees it however the process ends, so nothing is left after kill
// -9.
//
// Any local user may take an abstract name. That keeps the daemon from starting, and
// RunningError names the user's process. The user gains nothing else, because Find does not
// trust that process.
const lockName = "@conenatd"

// A Lock makes this daemon the only one in its network namespace, and tells commands where
// it listens.
type Lock struct {
	ln     net.Listener
	socket string
	done   chan struct{}
}

// A RunningError says that another daemon holds the lock of the network namespace.
type RunningError struct {
	PID int // 0 if it is not visible, for example in another PID namespace
}

func (e *RunningError) Error() string {
	pid := ""
	if e.PID != 0 {
		pid = fmt.Sprintf(" (pid %d)", e.PID)
	}
	return "conenatd is already running in this network namespace" + pid +
		`: stop it first, or see "conenatd status"`
}

// Acquire takes the lock of the calling thread's network namespace. socket is the path of
// the control socket on which the daemon listens; it is empty for a process that is not a
// daemon. Acquire does not wait: if the lock is taken, the error is a *RunningError. The
// caller must Close the Lock after Serve has returned, because the lock also protects the
// control socket.
func Acquire(socket string) (*Lock, error) { return acquire(lockName, socket) }

func acquire(name, socket string) (*Lock, error) {
	ln, err := net.Listen("unix", name)
	if errors.Is(err, unix.EADDRINUSE) {
		running := &RunningError{}
		if c, holder, err := dialLock(name); err == nil {
			running.PID = int(holder.Pid)
			c.Close()
		}
		return nil, running
	}
	if err != nil {
		return nil, fmt.Errorf("take lock: %w", err)
	}
	l := &Lock{ln: newReserve(ln), socket: socket, done: make(chan struct{})}
	go l.answer()
	return l, nil
}

// Close releases the lock.
func (l *Lock) Close() error {
	err := l.ln.Close()
	<-l.done
	return err
}

// answer sends the path of the control socket to each client that connects, and closes the
// connection. The client already knows our pid from the kernel. Without this loop,
// connections would stay in the backlog after their clients are gone; after some thousands
// nobody could connect any more. An error ends the loop but not the lock, which is the
// bound name.
func (l *Lock) answer() {
	defer close(l.done)
	for {
		c, err := l.ln.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, l.socket) // the socket's buffer has room for it
		c.Close()
	}
}

// Find returns the path of the control socket of the daemon in the calling thread's network
// namespace, whatever its configuration. The error is ErrNotRunning if there is no daemon.
func Find() (string, error) { return find(lockName, folder) }

func find(name, folder string) (string, error) {
	path, _, err := ask(name, folder)
	return path, err
}

// ask returns where the holder of a lock listens, and who it is.
func ask(name, folder string) (socket string, holder *unix.Ucred, err error) {
	c, holder, err := dialLock(name)
	if errors.Is(err, unix.ECONNREFUSED) {
		return "", nil, fmt.Errorf(`%w: start it with "conenatd run"`, ErrNotRunning)
	}
	if err != nil {
		return "", nil, fmt.Errorf("find conenatd: %w", err)
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(answerTime)); err != nil {
		return "", nil, fmt.Errorf("find conenatd: %w", err)
	}
	path, err := io.ReadAll(io.LimitReader(c, maxPath))
	switch {
	case err != nil:
		return "", nil, fmt.Errorf("find conenatd: the process with pid %d does not answer: %w", holder.Pid, err)
	case len(path) == 0: // a cleanup is under way
		return "", nil, fmt.Errorf(`%w: start it with "conenatd run"`, ErrNotRunning)
	case !trusted(holder, string(path), folder):
		return "", nil, fmt.Errorf("find conenatd: the process with pid %d of user %d has its name in this network namespace, and may not be conenatd: "+
			"name its socket with --control-socket if it is, or end it", holder.Pid, holder.Uid)
	}
	return string(path), holder, nil
}

// maxPath is the length of the longest path of a unix socket.
const maxPath = 107

// trusted reports whether to believe the lock holder's answer about the control socket. The
// holder must run as root, as this user, or as the owner of the folder of the default
// sockets. Otherwise the path must be the default one for this network namespace, where no
// other user can make a socket.
func trusted(holder *unix.Ucred, path, folder string) bool {
	own, err := DefaultSocket()
	return trustedUser(holder, folder) || err == nil && path == filepath.Join(folder, filepath.Base(own))
}

func trustedUser(holder *unix.Ucred, folder string) bool {
	if holder.Uid == 0 || int(holder.Uid) == os.Geteuid() {
		return true
	}
	info, err := os.Stat(folder)
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Uid == holder.Uid
}

// dialLock connects to the process that holds a lock. holder is the process that called listen, with
// pid 0 if it is not visible. It never blocks: connecting to a unix socket with a full backlog
// fails at once.
func dialLock(name string) (c *net.UnixConn, holder *unix.Ucred, err error) {
	if c, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: name, Net: "unix"}); err != nil {
		return nil, nil, err
	}
	raw, err := c.SyscallConn()
	if err == nil {
		var failed error
		err = raw.Control(func(fd uintptr) {
			holder, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		})
		err = errors.Join(err, failed)
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("identify the process that holds it: %w", err), c.Close())
	}
	return c, holder, nil
}
