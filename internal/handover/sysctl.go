package handover

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The folder of the settings, and those that conenatd uses.
const (
	Dir       = "/proc/sys/net/netfilter"
	ExpectMax = "nf_conntrack_expect_max"
	Acct      = "nf_conntrack_acct"
	Events    = "nf_conntrack_events"

	// wantedExpectMax lets 75,000 permissions stand as expectations. The hash
	// of the kernel stays as it is, so its chains grow to about 100 entries.
	wantedExpectMax = 100_000
)

// wanted has the settings that the daemon raises to the value here while it runs, if they
// are lower.
var wanted = map[string]int{ExpectMax: wantedExpectMax, Acct: 1}

// Sysctls reads and writes the settings of conntrack. For each one that it raised it writes
// a note, so that another process can restore the setting after a kill -9.
type Sysctls struct {
	Dir   string // the constant Dir, except in tests
	Notes Notes
}

// Open returns those of this network namespace.
func Open() (Sysctls, error) {
	n, err := openNotes()
	return Sysctls{Dir: Dir, Notes: n}, err
}

// Read returns the value of a setting of this network namespace.
func Read(name string) (int, error) { return Sysctls{Dir: Dir}.Read(name) }

// Read returns the value of the setting name, which may lead to another folder of settings.
func (s Sysctls) Read(name string) (int, error) {
	b, err := os.ReadFile(filepath.Join(s.Dir, name))
	if err != nil {
		return 0, fmt.Errorf("read sysctl: %w", err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("read sysctl %s: %w", name, err)
	}
	return n, nil
}

// Raise gives a setting its wanted value if it is lower and may be written, and returns the
// value before and the value now. It is not an error if it may not be written, as in a
// container, or if nobody could restore it.
func (s Sysctls) Raise(name string) (before, now int, err error) {
	before, err = s.Read(name)
	if err != nil || before >= wanted[name] {
		return before, before, err
	}
	f, err := os.OpenFile(filepath.Join(s.Dir, name), os.O_WRONLY, 0)
	if err != nil {
		return before, before, nil
	}
	defer f.Close()
	// The note comes first: a kill in between leaves nothing to restore. If somebody
	// lowered the setting since the last time, restore returns to that value.
	switch err := s.Notes.write(name, strconv.Itoa(before), 0o644); {
	case errors.Is(err, fs.ErrPermission):
		return before, before, nil
	case err != nil:
		return before, before, fmt.Errorf("note sysctl %s: %w", name, err)
	}
	if _, err := fmt.Fprintf(f, "%d\n", wanted[name]); err != nil {
		return before, before, nil
	}
	now, err = s.Read(name)
	return before, now, err
}

// Restore undoes Raise for a setting, by the note of whichever process raised it, unless
// somebody changed the setting since.
func (s Sysctls) Restore(name string) error {
	text, mine, err := s.Notes.read(name)
	if err != nil {
		return fmt.Errorf("read note of sysctl: %w", err)
	}
	before, broken := strconv.Atoi(text)
	if now, err := s.Read(name); mine && broken == nil && err == nil && now == wanted[name] {
		if err := os.WriteFile(filepath.Join(s.Dir, name), fmt.Appendf(nil, "%d\n", before), 0); err != nil {
			return fmt.Errorf("restore sysctl: %w", err)
		}
	}
	if err := s.Notes.remove(name, mine); err != nil {
		return fmt.Errorf("remove note of sysctl: %w", err)
	}
	return nil
}

// RestoreAll restores every setting.
func (s Sysctls) RestoreAll() error {
	var errs []error
	for name := range wanted {
		errs = append(errs, s.Restore(name))
	}
	return errors.Join(errs...)
}
