package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fakeSysctls is a folder that looks like /proc/sys/net/netfilter.
func fakeSysctls(t *testing.T, value string) sysctls {
	t.Helper()
	dir := t.TempDir()
	s := sysctls{dir: dir, note: filepath.Join(dir, "run", "c.sysctl")}
	s.set(t, value)
	return s
}

func (s sysctls) set(t *testing.T, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, expectMax), []byte(value+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (s sysctls) want(t *testing.T, value string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, expectMax))
	if got := strings.TrimSpace(string(b)); err != nil || got != value {
		t.Errorf("%s is %q (%v), want %q", expectMax, got, err, value)
	}
}

func TestExpectMaxIsRaisedAndPutBack(t *testing.T) {
	s := fakeSysctls(t, "4096")
	if _, n, err := s.raise(); err != nil || n != wantedExpectMax {
		t.Fatalf("raise: %d, %v", n, err)
	}
	s.want(t, "100000")
	if err := s.restore(); err != nil {
		t.Fatal(err)
	}
	s.want(t, "4096")
	if _, err := os.Stat(s.note); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the note is still there: %v", err)
	}
}

// After a kill -9 the note still says what was there before the first daemon.
func TestExpectMaxIsPutBackAfterKillAndRestart(t *testing.T) {
	s := fakeSysctls(t, "4096")
	for range 2 {
		if _, _, err := s.raise(); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.restore(); err != nil {
		t.Fatal(err)
	}
	s.want(t, "4096")
}

func TestLargerExpectMaxIsLeftAlone(t *testing.T) {
	s := fakeSysctls(t, "200000")
	if _, n, err := s.raise(); err != nil || n != 200_000 {
		t.Fatalf("raise: %d, %v", n, err)
	}
	if err := s.restore(); err != nil {
		t.Fatal(err)
	}
	s.want(t, "200000")
}

func TestExpectMaxThatTheUserChangedMeanwhileStays(t *testing.T) {
	s := fakeSysctls(t, "4096")
	if _, _, err := s.raise(); err != nil {
		t.Fatal(err)
	}
	s.set(t, "150000")
	if err := s.restore(); err != nil {
		t.Fatal(err)
	}
	s.want(t, "150000")
}
