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

// A reserve is a listener that keeps a descriptor back, for the time when the process,
// or the machine, has no other left: connections are accepted then too, one at a time.
// Accept never returns EMFILE or ENFILE.
type reserve struct {
	net.Listener

	mu     sync.Mutex
	spare  *os.File // nil while it is in use, or could not be had again
	closed bool
}

func newReserve(ln net.Listener) net.Listener {
	l := &reserve{Listener: ln}
	l.keep()
	return l
}

// exhaustedTime is the time between two looks for clients while there is no descriptor.
const exhaustedTime = 50 * time.Millisecond

func (l *reserve) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		switch {
		case errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE):
			// The kernel says so whether there is a client or not. Without one, somebody else
			// would take the descriptor.
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

// pending reports whether a client waits.
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
	return err != nil || n > 0 // a listener that is closed says so itself
}

func (l *reserve) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.lend()
	return l.Listener.Close()
}

// keep takes a descriptor back if there is one.
func (l *reserve) keep() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.spare == nil && !l.closed {
		l.spare, _ = os.Open(os.DevNull) // else the end of a connection tries again
	}
}

// lend makes the descriptor free, and reports whether there was one.
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

// A reserveConn gives its descriptor to the reserve when it ends.
type reserveConn struct {
	net.Conn
	l *reserve
}

func (c *reserveConn) Close() error {
	err := c.Conn.Close()
	c.l.keep()
	return err
}
