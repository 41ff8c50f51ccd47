package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

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

// sysctls reads and writes the settings of conntrack. What it changed it notes
// in a file, so that another process can put it back after a kill -9.
type sysctls struct {
	dir  string // sysctlDir but in tests
	note string // path of the file
}

// openSysctls returns those of this network namespace. The note has a fixed place, so that
// another process finds it without knowing the configuration.
func openSysctls() (sysctls, error) {
	note, err := control.File(".sysctl")
	return sysctls{dir: sysctlDir, note: note}, err
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

// raise makes room in the expectation table, where that is allowed (in the
// first network namespace), and returns the size that it had and the one that it has then.
func (s sysctls) raise() (before, size int, err error) {
	before, err = s.read(expectMax)
	if err != nil || before >= wantedExpectMax {
		return before, before, err
	}
	path := filepath.Join(s.dir, expectMax)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return before, before, nil // not ours to change; the cap follows
	}
	defer f.Close()
	// The note first: killed in between, there is nothing to put back. Where somebody
	// made the table smaller since the last time, that is what he gets back.
	switch err := s.write(before); {
	case errors.Is(err, fs.ErrPermission):
		return before, before, nil // nobody could put it back; the cap follows
	case err != nil:
		return before, before, fmt.Errorf("note sysctl %s: %w", expectMax, err)
	}
	if _, err := fmt.Fprintf(f, "%d\n", wantedExpectMax); err != nil {
		return before, before, nil
	}
	size, err = s.read(expectMax)
	return before, size, err
}

// write makes the note.
func (s sysctls) write(n int) error {
	if err := os.MkdirAll(filepath.Dir(s.note), 0o755); err != nil {
		return err
	}
	if err := os.Remove(s.note); err != nil && !errors.Is(err, fs.ErrNotExist) { // it may be another user's
		return err
	}
	return os.WriteFile(s.note, fmt.Appendf(nil, "%d\n", n), 0o644)
}

// restore puts back what raise changed, unless somebody else changed it since.
func (s sysctls) restore() error {
	b, err := os.ReadFile(s.note)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read note of sysctl: %w", err)
	}
	if now, err := s.read(expectMax); err == nil && now == wantedExpectMax {
		if err := os.WriteFile(filepath.Join(s.dir, expectMax), b, 0); err != nil {
			return fmt.Errorf("restore sysctl: %w", err)
		}
	}
	if err := os.Remove(s.note); err != nil {
		return fmt.Errorf("remove note of sysctl: %w", err)
	}
	return nil
}
