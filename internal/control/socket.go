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

// socketMode gives access to root and the file's group. On Linux, connecting requires write
// permission.
const socketMode = 0o660

// DefaultSocket returns the path of the control socket for the network namespace of the
// calling thread, /run/conenatd/INODE.sock (see File). So daemons in two namespaces of one
// machine do not conflict.
func DefaultSocket() (string, error) { return File(".sock") }

// File returns the path of a file for the calling thread's network namespace, independent
// of the configuration: /run/conenatd/INODE followed by the suffix, where INODE is the
// number in "readlink /proc/self/ns/net".
func File(suffix string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return "", fmt.Errorf("identify network namespace: %w", err)
	}
	return fmt.Sprintf("%s/%d%s", folder, st.Ino, suffix), nil
}

const folder = "/run/conenatd"

// ShareFolder lets root's group write into the folder of the default sockets, if that belongs to the user of
// another daemon: root without CAP_DAC_OVERRIDE could not. That daemon may run, here or in another network
// namespace, so its user remains the owner. Other folders are left alone.
func ShareFolder(path string) error { return shareFolder(path, folder) }

func shareFolder(path, folder string) error {
	info, err := os.Stat(folder)
	if os.Geteuid() != 0 || filepath.Dir(path) != folder || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && info.Sys().(*syscall.Stat_t).Uid == 0 {
		return nil
	}
	if err == nil {
		err = os.Chown(folder, -1, 0)
	}
	if err == nil {
		err = os.Chmod(folder, info.Mode().Perm()|0o070)
	}
	if err != nil {
		return fmt.Errorf("share folder of control socket: %w", err)
	}
	return nil
}

// Listen opens the control socket, readable and writable for its owner and group. It makes
// the directory if there is none. A socket on which nobody answers is from a dead daemon
// and is replaced. A socket in use, or another file at the path, stays and is an error. If
// path is in the default folder, Listen also removes the sockets of dead daemons of other
// network namespaces, which may never get a new daemon.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make directory of control socket: %w", denied(err))
	}
	ln, err := bind(path)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeStale(path); err != nil {
			return nil, fmt.Errorf("open control socket: %w", err)
		}
		ln, err = bind(path)
	}
	if err != nil {
		return nil, fmt.Errorf("open control socket: %w", denied(err))
	}
	// Restore the bits that the umask removed.
	if err := os.Chmod(path, socketMode); err != nil {
		return nil, errors.Join(fmt.Errorf("open control socket: %w", err), ln.Close())
	}
	if filepath.Dir(path) == folder {
		sweep(folder, staleTime)
	}
	return ln, nil
}

// denied says what a user, and root without its capabilities, may need. Other errors remain as they are.
func denied(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w; choose a folder of the user that runs conenatd (root, too, cannot write into those of others: it keeps CAP_NET_ADMIN alone)", err)
	}
	return err
}

// stale reports whether path is a socket on which nobody answers.
func stale(path string) bool {
	if info, err := os.Lstat(path); err != nil || info.Mode().Type() != fs.ModeSocket {
		return false
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED) // a full backlog gives EAGAIN: somebody listens
}

// bind sets the mode before the file exists: the kernel gives the file the socket's own
// mode (unix_bind_bsd). So the socket is never open to all, whatever the umask.
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
	if !stale(path) {
		return fmt.Errorf("%s is in use by another process: stop it, or choose another path", path)
	}
	return os.Remove(path)
}
