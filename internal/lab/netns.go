package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrPrivilege says that this process may not make network namespaces.
var ErrPrivilege = errors.New("the lab needs root: run with sudo")

// ownNetNS is the network namespace of the calling thread; /proc/self would be that
// of the first thread.
const ownNetNS = "/proc/thread-self/ns/net"

// Namespace is an anonymous network namespace. It lives until Close, and longer if
// a process or socket is left in it.
//
// All methods may be called concurrently, except Close.
type Namespace struct {
	file *os.File
}

// newNamespace makes an empty namespace; even its lo is down.
func newNamespace() (*Namespace, error) {
	n := new(Namespace)
	err := onOtherThread(
		func() error { return unix.Unshare(unix.CLONE_NEWNET) },
		func() (err error) {
			n.file, err = os.Open(ownNetNS)
			return err
		})
	switch {
	case errors.Is(err, unix.EPERM):
		return nil, ErrPrivilege
	case err != nil:
		return nil, fmt.Errorf("create network namespace: %w", err)
	}
	return n, nil
}

// Do runs fn on a thread inside the namespace and returns its error. There, files
// below /proc/sys/net are the namespace's, and sockets and processes that fn makes
// stay in it. Goroutines that fn starts run outside it. /proc/net stays that of the
// process: use /proc/thread-self/net.
//
// fn runs in a goroutine of its own, so it must not call t.Fatal.
func (n *Namespace) Do(fn func() error) error {
	return onOtherThread(func() error {
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return nil
	}, fn)
}

// onOtherThread moves a thread out of its network namespace with enter, runs fn on it
// and moves the thread back. A thread that cannot go back is discarded: the runtime
// ends a thread whose goroutine returns while locked to it.
func onOtherThread(enter, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errGoexit
		defer func() { done <- err }()
		err = enterAndReturn(enter, fn)
	}()
	return <-done
}

// errGoexit is the error for a function that ended its goroutine.
var errGoexit = errors.New("run in network namespace: the function ended its goroutine")

func enterAndReturn(enter, fn func() error) error {
	runtime.LockOSThread()
	home, err := os.Open(ownNetNS)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer home.Close()
	if err := enter(); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	err = fn()
	if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
	return err
}

// FD returns the descriptor of the namespace, for netlink.Config.NetNS. The
// Namespace keeps owning it; after Close it is -1.
func (n *Namespace) FD() int { return int(n.file.Fd()) }

// path names the namespace for other processes. iproute2 accepts it in place of a
// namespace's name.
func (n *Namespace) path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.FD())
}

// ListenUDP opens a socket inside the namespace. It can be used from anywhere
// and keeps the namespace alive until it is closed.
func (n *Namespace) ListenUDP(addr netip.AddrPort) (*net.UDPConn, error) {
	var conn *net.UDPConn
	err := n.Do(func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
		return err
	})
	return conn, err
}

// Sysctl reads a setting by its dotted name, such as "net.ipv4.ip_forward".
func (n *Namespace) Sysctl(name string) (string, error) {
	var value []byte
	err := n.sysctl(name, func(path string) (err error) {
		value, err = os.ReadFile(path)
		return err
	})
	return strings.TrimSpace(string(value)), err
}

// SetSysctl writes a setting of the namespace.
func (n *Namespace) SetSysctl(name, value string) error {
	return n.sysctl(name, func(path string) error {
		return os.WriteFile(path, []byte(value), 0)
	})
}

// sysctl refuses settings outside net, which belong to the whole machine.
func (n *Namespace) sysctl(name string, fn func(path string) error) error {
	if !strings.HasPrefix(name, "net.") {
		return fmt.Errorf("sysctl %s: not a setting of a network namespace", name)
	}
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	if err := n.Do(func() error { return fn(path) }); err != nil {
		return fmt.Errorf("sysctl %s: %w", name, err)
	}
	return nil
}

// Close releases the namespace. A second call does nothing. It does not end processes
// that were started inside.
func (n *Namespace) Close() error {
	if err := n.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close network namespace: %w", err)
	}
	return nil
}
