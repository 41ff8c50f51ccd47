package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketMode lets root and the file's group in. Linux asks for write
// permission to connect.
const socketMode = 0o660

// DefaultSocket returns the path of the control socket for the network
// namespace of the calling thread: /run/conenatd/INODE.sock, where INODE is
// the number in "readlink /proc/self/ns/net". A daemon and a command in the
// same namespace so find each other without being told, and daemons in two
// namespaces of one machine do not meet.
func DefaultSocket() (string, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return "", fmt.Errorf("identify network namespace: %w", err)
	}
	return fmt.Sprintf("%s/%d.sock", folder, st.Ino), nil
}

const folder = "/run/conenatd"

// TakeFolder gives root the folder of the default sockets, which a daemon with a user of
// its own may have left: root without CAP_DAC_OVERRIDE could write nothing there. systemd
// gives it back to that user when it starts his daemon. Any other folder is left alone.
func TakeFolder(path string) error { return takeFolder(path, folder) }

func takeFolder(path, folder string) error {
	if os.Geteuid() != 0 || filepath.Dir(path) != folder {
		return nil
	}
	if err := os.Chown(folder, 0, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("take folder of control socket: %w", err)
	}
	return nil
}

// Listen opens the control socket, readable and writable for its owner and
// group. It makes the directory if there is none. A socket on which nobody
// answers is left from a dead daemon and replaced; a socket in use or anything
// else in the way is an error and stays.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make directory of control socket: %w", err)
	}
	ln, err := bind(path)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeStale(path); err != nil {
			return nil, fmt.Errorf("open control socket: %w", err)
		}
		ln, err = bind(path)
	}
	if err != nil {
		return nil, fmt.Errorf("open control socket: %w", err)
	}
	// What the umask took away.
	if err := os.Chmod(path, socketMode); err != nil {
		return nil, errors.Join(fmt.Errorf("open control socket: %w", err), ln.Close())
	}
	return ln, nil
}

// bind sets the mode before there is a file: the kernel gives the file the
// socket's own mode (unix_bind_bsd), so there is no moment when it is open to
// all, whatever the umask.
func bind(path string) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), socketMode) }), err)
	}}
	return lc.Listen(context.Background(), "unix", path)
}

// removeStale removes a socket on which nobody answers.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is in the way and is not a socket: move it, or choose another path", path)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) { // a full backlog is EAGAIN: somebody lives
		return fmt.Errorf("%s is in use by another process: stop it, or choose another path", path)
	}
	return os.Remove(path)
}
