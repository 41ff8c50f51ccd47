package control

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A reserve is a listener that keeps a spare descriptor, for the time when the process or
// the machine has no other left. Even then it accepts connections, one at a time. Accept
// never returns EMFILE or ENFILE.
type reserve struct {
	net.Listener

	mu     sync.Mutex
	spare  *os.File // nil while in use, or if it could not be opened again
	closed bool
}

func newReserve(ln net.Listener) net.Listener {
	l := &reserve{Listener: ln}
	l.keep()
	return l
}

// exhaustedTime is the interval between attempts to accept while there is no descriptor.
const exhaustedTime = 50 * time.Millisecond

func (l *reserve) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		switch {
		case errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE):
			// The kernel returns this error whether a client waits or not. Do not release
			// the descriptor without a client: somebody else would take it.
			if !l.pending() || !l.lend() {
				time.Sleep(exhaustedTime)
			}
		case err != nil:
			return nil, err
		default:
			l.keep()
			return &reserveConn{c, l}, nil
		}
	}
}

// pending reports whether a client is waiting.
func (l *reserve) pending() bool {
	ln, ok := l.Listener.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := ln.SyscallConn()
	if err != nil {
		return true
	}
	n := 0
	err = raw.Control(func(fd uintptr) {
		n, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	})
	return err != nil || n > 0 // Accept reports a closed listener
}

func (l *reserve) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.lend()
	return l.Listener.Close()
}

// keep opens the spare descriptor again, if possible.
func (l *reserve) keep() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.spare == nil && !l.closed {
		l.spare, _ = os.Open(os.DevNull) // if this fails, the end of a connection tries again
	}
}

// lend closes the spare descriptor, and reports whether there was one.
func (l *reserve) lend() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.spare == nil {
		return false
	}
	_ = l.spare.Close()
	l.spare = nil
	return true
}

// A reserveConn returns its descriptor to the reserve when it is closed.
type reserveConn struct {
	net.Conn
	l *reserve
}

func (c *reserveConn) Close() error {
	err := c.Conn.Close()
	c.l.keep()
	return err
}
