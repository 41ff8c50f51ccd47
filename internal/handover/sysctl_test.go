package handover

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// raised are settings with a value below the wanted one, and others that somebody may give
// them.
var raised = []struct {
	name, before, other string
}{
	{ExpectMax, "4096", "150000"},
	{Acct, "0", "0"},
}

// fakeSysctls is a folder that looks like /proc/sys/net/netfilter.
func fakeSysctls(t *testing.T) Sysctls {
	t.Helper()
	dir := t.TempDir()
	return Sysctls{Dir: dir, Notes: Notes{Path: filepath.Join(dir, "run", "c."), cookie: 7}}
}

func (s Sysctls) set(t *testing.T, name, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.Dir, name), []byte(value+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (s Sysctls) want(t *testing.T, name, value string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.Dir, name))
	if got := strings.TrimSpace(string(b)); err != nil || got != value {
		t.Errorf("%s is %q (%v), want %q", name, got, err, value)
	}
}

// raiseTo raises a setting and wants it to be value then.
func (s Sysctls) raiseTo(t *testing.T, name, value string) {
	t.Helper()
	if _, n, err := s.Raise(name); err != nil || strconv.Itoa(n) != value {
		t.Fatalf("raise: %d, %v, want %s", n, err, value)
	}
	s.want(t, name, value)
}

// restored restores all and wants no note afterwards.
func (s Sysctls) restored(t *testing.T) {
	t.Helper()
	if err := s.RestoreAll(); err != nil {
		t.Fatal(err)
	}
	for name := range wanted {
		if _, err := os.Stat(s.Notes.file(name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the note of %s is still there: %v", name, err)
		}
	}
}

func TestSettingsAreRaisedAndRestored(t *testing.T) {
	s := fakeSysctls(t)
	for _, r := range raised {
		s.set(t, r.name, r.before)
		s.raiseTo(t, r.name, strconv.Itoa(wanted[r.name]))
	}
	s.restored(t)
	for _, r := range raised {
		s.want(t, r.name, r.before)
	}
}

// A reload that drops the expectations keeps the counters.
func TestOneSettingIsRestoredAlone(t *testing.T) {
	s := fakeSysctls(t)
	for _, r := range raised {
		s.set(t, r.name, r.before)
		s.raiseTo(t, r.name, strconv.Itoa(wanted[r.name]))
	}
	if err := s.Restore(ExpectMax); err != nil {
		t.Fatal(err)
	}
	s.want(t, ExpectMax, "4096")
	s.want(t, Acct, "1")
	s.restored(t)
	s.want(t, Acct, "0")
}

// After a kill -9 the note still says what was there before the first daemon.
func TestSettingsAreRestoredAfterKillAndRestart(t *testing.T) {
	for _, r := range raised {
		s := fakeSysctls(t)
		s.set(t, r.name, r.before)
		for range 2 {
			s.raiseTo(t, r.name, strconv.Itoa(wanted[r.name]))
		}
		s.restored(t)
		s.want(t, r.name, r.before)
	}
}

func TestSettingThatNeedsNoRaiseIsLeftAlone(t *testing.T) {
	for name, value := range map[string]string{ExpectMax: "200000", Acct: "1"} {
		s := fakeSysctls(t)
		s.set(t, name, value)
		s.raiseTo(t, name, value)
		s.restored(t)
		s.want(t, name, value)
	}
}

func TestSettingThatTheUserChangedMeanwhileStays(t *testing.T) {
	for _, r := range raised {
		s := fakeSysctls(t)
		s.set(t, r.name, r.before)
		s.raiseTo(t, r.name, strconv.Itoa(wanted[r.name]))
		s.set(t, r.name, r.other)
		s.restored(t)
		s.want(t, r.name, r.other)
	}
}

// A network namespace may have the inode, and so the notes, of one that is gone.
//
// Fails when restore does not compare the cookie.
func TestNoteOfAnotherNamespaceChangesNothing(t *testing.T) {
	for name, value := range wanted {
		s := fakeSysctls(t)
		s.set(t, name, strconv.Itoa(value))
		if err := (Notes{Path: s.Notes.Path, cookie: 8}).write(name, "0", 0o644); err != nil {
			t.Fatal(err)
		}
		s.restored(t)
		s.want(t, name, strconv.Itoa(value))
	}
}

func TestBrokenNoteGoes(t *testing.T) {
	s := fakeSysctls(t)
	s.Notes.cookie = 0
	s.set(t, Acct, "0")
	s.raiseTo(t, Acct, "1")
	if err := os.WriteFile(s.Notes.file(Acct), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.restored(t)
	s.want(t, Acct, "1")
}

func TestEachNamespaceHasACookie(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	seen := map[uint64]bool{}
	for _, n := range []*lab.Namespace{l.Gateway.Namespace, l.Outside.Namespace} {
		var first, again uint64
		err := n.Do(func() (err error) {
			if first, err = netnsCookie(); err == nil {
				again, err = netnsCookie()
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if first == 0 {
			t.Skip("SO_NETNS_COOKIE is of Linux 5.14")
		}
		if first != again || seen[first] {
			t.Errorf("cookie %d, again %d, of others %v", first, again, seen)
		}
		seen[first] = true
	}
}
