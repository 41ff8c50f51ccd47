package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/control"
)

// noteLasts is how long a list counts, as long as the sets "revoked" and "unsure" in the kernel.
const noteLasts = 2 * time.Hour

// Notes are files beside the control socket that tell the next process in this network
// namespace what it cannot learn from the kernel.
type Notes struct {
	Path   string // of each note, without its name
	cookie uint64 // of the network namespace, 0 before Linux 5.14
}

// openNotes returns those of this network namespace. They have a fixed place, so that
// another process finds them without knowing the configuration.
func openNotes() (Notes, error) {
	path, err := control.File(".")
	if err != nil {
		return Notes{}, err
	}
	cookie, err := netnsCookie()
	return Notes{Path: path, cookie: cookie}, err
}

// netnsCookie returns a number that no other network namespace has or gets until the next
// boot, unlike the inode number, which the kernel reuses. It is 0 before Linux 5.14.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("identify network namespace: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil && !errors.Is(err, unix.ENOPROTOOPT) {
		return 0, fmt.Errorf("identify network namespace: %w", err)
	}
	return cookie, nil
}

func (n Notes) file(name string) string { return n.Path + name }

// write makes the note name, or replaces it, with one line of text, which the cookie of the
// namespace follows.
func (n Notes) write(name, text string, mode fs.FileMode) error {
	path := n.file(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // it may be another user's
		return err
	}
	return os.WriteFile(path, fmt.Appendf(nil, "%s %d\n", text, n.cookie), mode)
}

// read returns the text of the note name. mine is false if there is no note, if it is
// broken, as after a full disk, or if it is of a namespace that is gone.
func (n Notes) read(name string) (text string, mine bool, err error) {
	b, err := os.ReadFile(n.file(name))
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	line := strings.TrimSuffix(string(b), "\n")
	i := strings.LastIndexByte(line, ' ')
	cookie, err := strconv.ParseUint(line[i+1:], 10, 64)
	return line[:max(i, 0)], i > 0 && err == nil && cookie == n.cookie, nil
}

// remove removes the note name, if there is one. It is no error if another user's note stays
// that is not of this namespace.
func (n Notes) remove(name string, mine bool) error {
	err := os.Remove(n.file(name))
	if errors.Is(err, fs.ErrNotExist) || !mine && errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

// writeList makes the note name of a list, or removes it if the list is empty.
func writeList[E any](n Notes, name string, list []E) error {
	if len(list) == 0 {
		return n.removeList(name)
	}
	text, err := json.Marshal(list)
	if err == nil {
		err = n.write(name, string(text), 0o600)
	}
	if err != nil {
		return fmt.Errorf("note what is %s: %w", name, err)
	}
	return nil
}

// readList returns the list of the note name, unless it is too old.
func readList[E any](n Notes, name string) (list []E, err error) {
	text, mine, err := n.read(name)
	if err != nil {
		return nil, fmt.Errorf("read what is %s: %w", name, err)
	}
	if info, err := os.Stat(n.file(name)); !mine || err != nil || time.Since(info.ModTime()) > noteLasts {
		return nil, nil
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return nil, fmt.Errorf("read what is %s: %w", name, err)
	}
	return list, nil
}

// removeList removes the note name, if there is one.
func (n Notes) removeList(name string) error {
	if err := n.remove(name, false); err != nil {
		return fmt.Errorf("remove what is noted as %s: %w", name, err)
	}
	return nil
}
