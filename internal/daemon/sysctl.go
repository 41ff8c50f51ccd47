package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/control"
)

const (
	sysctlDir = "/proc/sys/net/netfilter"
	expectMax = "nf_conntrack_expect_max"
	acct      = "nf_conntrack_acct"
	events    = "nf_conntrack_events"

	// wantedExpectMax lets 75,000 permissions stand as expectations. The hash
	// of the kernel stays as it is, so its chains grow to about 100 entries.
	wantedExpectMax = 100_000
)

// wanted has the settings that the daemon raises to the value here while it runs, if they
// are lower.
var wanted = map[string]int{expectMax: wantedExpectMax, acct: 1}

// sysctls reads and writes the settings of conntrack. For each one that it raised it writes
// a note, so that another process can restore the setting after a kill -9.
type sysctls struct {
	dir    string // sysctlDir, except in tests
	notes  string // path of the notes, without the name of the setting
	cookie uint64 // of the network namespace, 0 before Linux 5.14
}

// openSysctls returns those of this network namespace. The notes have a fixed place, so that
// another process finds them without knowing the configuration.
func openSysctls() (sysctls, error) {
	notes, err := control.File(".")
	if err != nil {
		return sysctls{}, err
	}
	cookie, err := netnsCookie()
	return sysctls{dir: sysctlDir, notes: notes, cookie: cookie}, err
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

func (s sysctls) read(name string) (int, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, name))
	if err != nil {
		return 0, fmt.Errorf("read sysctl: %w", err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("read sysctl %s: %w", name, err)
	}
	return n, nil
}

// raise gives a setting its wanted value if it is lower and may be written, and returns the
// value before and the value now. It is not an error if it may not be written, as in a
// container, or if nobody could restore it.
func (s sysctls) raise(name string) (before, now int, err error) {
	before, err = s.read(name)
	if err != nil || before >= wanted[name] {
		return before, before, err
	}
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_WRONLY, 0)
	if err != nil {
		return before, before, nil
	}
	defer f.Close()
	// The note comes first: a kill in between leaves nothing to restore. If somebody
	// lowered the setting since the last time, restore returns to that value.
	switch err := s.write(name, before); {
	case errors.Is(err, fs.ErrPermission):
		return before, before, nil
	case err != nil:
		return before, before, fmt.Errorf("note sysctl %s: %w", name, err)
	}
	if _, err := fmt.Fprintf(f, "%d\n", wanted[name]); err != nil {
		return before, before, nil
	}
	now, err = s.read(name)
	return before, now, err
}

func (s sysctls) note(name string) string { return s.notes + name }

// write makes the note of a setting: the value before, and the cookie of the namespace.
func (s sysctls) write(name string, before int) error {
	path := s.note(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // it may be another user's
		return err
	}
	return os.WriteFile(path, fmt.Appendf(nil, "%d %d\n", before, s.cookie), 0o644)
}

// restore undoes raise for a setting, by the note of whichever process raised it, unless
// somebody changed the setting since.
func (s sysctls) restore(name string) error {
	b, err := os.ReadFile(s.note(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read note of sysctl: %w", err)
	}
	var before int
	var cookie uint64
	_, broken := fmt.Sscan(string(b), &before, &cookie) // for instance after a full disk
	if now, err := s.read(name); broken == nil && cookie == s.cookie && err == nil && now == wanted[name] {
		if err := os.WriteFile(filepath.Join(s.dir, name), fmt.Appendf(nil, "%d\n", before), 0); err != nil {
			return fmt.Errorf("restore sysctl: %w", err)
		}
	}
	err = os.Remove(s.note(name))
	if broken == nil && cookie != s.cookie && errors.Is(err, fs.ErrPermission) {
		return nil // another user's, for a namespace that is gone
	}
	if err != nil {
		return fmt.Errorf("remove note of sysctl: %w", err)
	}
	return nil
}

// restoreAll restores every setting.
func (s sysctls) restoreAll() error {
	var errs []error
	for name := range wanted {
		errs = append(errs, s.restore(name))
	}
	return errors.Join(errs...)
}
