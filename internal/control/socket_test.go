package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestTheSocketIsForOwnerAndGroupWhateverTheUmask(t *testing.T) {
	for _, umask := range []int{0, 0o22, 0o77} {
		path := filepath.Join(t.TempDir(), "run", "conenatd", "c.sock")
		if err := os.MkdirAll(filepath.Dir(filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		old := unix.Umask(umask)
		ln, err := Listen(path)
		unix.Umask(old)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|0o660 {
			t.Errorf("umask %#o: %v, %v", umask, info.Mode(), err)
		}
		if info, err := os.Stat(filepath.Dir(path)); err != nil || info.Mode().Perm()&0o22 != 0 {
			t.Errorf("umask %#o: directory %v, %v", umask, info.Mode(), err)
		}
	}
}

func TestTheSocketIsNeverOpenToAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	old := unix.Umask(0)
	ln, err := bind(path) // before Listen sets the mode
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if info, err := os.Lstat(path); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// leftBehind makes the socket file that a killed daemon leaves.
func leftBehind(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.sock")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestASocketOfADeadDaemonIsReplaced(t *testing.T) {
	ln, err := Listen(leftBehind(t))
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
}

func TestASocketInUseStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	first, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), path+" is in use") {
		t.Errorf("second Listen: %v", err)
	}
	connect(t, path)
}

func TestWhatIsNoSocketStays(t *testing.T) {
	stale := leftBehind(t)
	for name, put := range map[string]func(path string) error{
		"file":      func(path string) error { return os.WriteFile(path, []byte("mine"), 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"link":      func(path string) error { return os.Symlink(stale, path) },
	} {
		path := filepath.Join(t.TempDir(), "c.sock")
		if err := put(path); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Lstat(path)
		if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "is not a socket") {
			t.Errorf("%s: %v", name, err)
		}
		if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
			t.Errorf("%s: gone: %v", name, err)
		}
	}
}

// Fails when root's group may not write into the folder, and when its owner, whose daemon may run, loses it.
func TestRootSharesTheFolderOfTheDefaultSockets(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: run with sudo")
	}
	const nobody = 65534
	dir := t.TempDir()
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, nobody, nobody)); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ path, want string }{
		{"/elsewhere/c.sock", "-rwxr-xr-x 65534 65534"},
		{filepath.Join(dir, "c.sock"), "-rwxrwxr-x 65534 0"},
		{filepath.Join(dir, "c.sock"), "-rwxrwxr-x 65534 0"},
	} {
		if err := shareFolder(tc.path, dir); err != nil {
			t.Errorf("%s: %v", tc.path, err)
		}
		info, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		st := info.Sys().(*syscall.Stat_t)
		if got := fmt.Sprint(info.Mode().Perm(), st.Uid, st.Gid); got != tc.want {
			t.Errorf("%s: the folder is %s, want %s", tc.path, got, tc.want)
		}
	}
	if err := shareFolder("/no/such/c.sock", "/no/such"); err != nil {
		t.Error(err)
	}
}

// Daemons of network namespaces that no longer exist left their sockets.
//
// Fails when a daemon removes only its own socket.
func TestSocketsOfDeadDaemonsAreRemoved(t *testing.T) {
	dir := t.TempDir()
	old := time.Now().Add(-time.Hour)
	put := func(name string, live bool, made time.Time) {
		t.Helper()
		path := filepath.Join(dir, name)
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		ln.SetUnlinkOnClose(false)
		if live {
			t.Cleanup(func() { ln.Close() })
		} else if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, made, made); err != nil {
			t.Fatal(err)
		}
	}
	put("1.sock", false, old)
	put("2.sock", true, old)
	put("3.sock", false, time.Now()) // its daemon may be about to listen
	put("4.note", false, old)
	if err := os.WriteFile(filepath.Join(dir, "5.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	sweep(dir, staleTime)
	var left []string
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if want := "2.sock 3.sock 4.note 5.sock"; err != nil || strings.Join(left, " ") != want {
		t.Errorf("left %q, want %q: %v", left, want, err)
	}
}
