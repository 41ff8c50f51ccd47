package control

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// lockName is an abstract unix socket. The kernel scopes its name to the
// network namespace, whatever the mounts, and frees it when the process ends
// in any way, so nothing stays behind after kill -9.
//
// Any local user may take an abstract name. One who does keeps the daemon from
// starting, and RunningError names his process; he gains nothing else.
const lockName = "@conenatd"

// A Lock makes this daemon the only one of its network namespace.
type Lock struct {
	ln   net.Listener
	done chan struct{}
}

// A RunningError says that another daemon has the network namespace.
type RunningError struct {
	PID int // 0 if it cannot be seen, as from another PID namespace
}

func (e *RunningError) Error() string {
	pid := ""
	if e.PID != 0 {
		pid = fmt.Sprintf(" (pid %d)", e.PID)
	}
	return "conenatd is already running in this network namespace" + pid +
		`: stop it first, or see "conenatd status"`
}

// Acquire takes the lock of the calling thread's network namespace. It does
// not wait: when the lock is taken the error is a *RunningError. The caller
// must Close the Lock, after Serve has returned: what it protects includes the
// control socket.
func Acquire() (*Lock, error) { return acquire(lockName) }

func acquire(name string) (*Lock, error) {
	ln, err := net.Listen("unix", name)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, &RunningError{PID: listenerPID(name)}
	}
	if err != nil {
		return nil, fmt.Errorf("take lock: %w", err)
	}
	l := &Lock{ln: ln, done: make(chan struct{})}
	go l.turnAway()
	return l, nil
}

// Close gives the lock back.
func (l *Lock) Close() error {
	err := l.ln.Close()
	<-l.done
	return err
}

// turnAway hangs up on whoever connects. The kernel has told him our pid by
// then, and there is nothing else to say. A connection left in the backlog
// would stay there when its client is gone: some thousand of them, and the
// next daemon could no longer connect to learn the pid. An error ends the loop
// but not the lock, which is the bound name.
func (l *Lock) turnAway() {
	defer close(l.done)
	for {
		c, err := l.ln.Accept()
		if err != nil {
			return
		}
		c.Close()
	}
}

// listenerPID asks the kernel who listens on a unix socket: SO_PEERCRED on our
// end is the process that called listen. It never blocks: to connect to a
// unix socket with a full backlog fails at once.
func listenerPID(name string) int {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return 0
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}
