package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Somebody replaces the configuration file with a pipe, or with a file that never
// ends.
//
// Fails when that reload, a later one or the stop waits for a writer of the pipe.
func TestReloadOfAFileThatBlocksIsRefused(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	path := filepath.Join(t.TempDir(), "c.toml")
	write := func(text string) {
		s.Must(os.WriteFile(path, []byte("[[subnet]]\nprefix = \"10.47.11.0/24\"\n"+text), 0o644))
	}
	write("")
	s.Start("--config", path)
	refused := 0
	for what, put := range map[string]func() error{
		"pipe":     func() error { return unix.Mkfifo(path, 0o600) },
		"endless":  func() error { return os.Symlink("/dev/zero", path) },
		"too long": func() error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 1<<30)) },
	} {
		s.Must(os.Remove(path))
		s.Must(put())
		refused++
		if out, code := s.CLI("reload"); code != 1 || !strings.Contains(out, path+": expected a readable file: it is ") {
			t.Errorf("%s: exit %d, %q", what, code, out)
		}
		refused++
		s.Must(s.Daemon.Signal(syscall.SIGHUP))
		s.Until("the signal is obeyed", func() bool { return s.logs("ERROR", "the old one stays in force") == refused })
	}
	s.Must(os.Remove(path))
	write("")
	if out, code := s.CLI("reload"); code != 0 {
		t.Errorf("a good file: exit %d, %q", code, out)
	}
	s.Must(os.Remove(path))
	s.Must(unix.Mkfifo(path, 0o600))
	s.Must(s.Daemon.Signal(syscall.SIGHUP))
	s.Stop()
}
