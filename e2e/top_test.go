package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/gdamore/tcell/v3/vt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/lab"
)

// A terminal is a pseudo-terminal and what its screen shows.
type terminal struct {
	*scene
	screen       vt.MockTerm
	master, line *os.File
}

// terminal opens one of this size.
func (s *scene) terminal(width, height uint16) *terminal {
	s.T.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	s.Must(err)
	control, err := master.SyscallConn()
	s.Must(err)
	var number int
	s.Must(control.Control(func(fd uintptr) {
		s.Must(unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0))
		s.Must(unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height}))
		number, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
	}))
	s.Must(err)
	line, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	s.Must(err)
	t := &terminal{s, vt.NewMockTerm(vt.MockOptSize{X: vt.Col(width), Y: vt.Row(height)}), master, line}
	s.Must(t.screen.Start())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for buf := make([]byte, 4096); ; {
			n, err := master.Read(buf)
			if err != nil {
				return
			}
			_, _ = t.screen.Write(buf[:n])
		}
	}()
	s.T.Cleanup(func() {
		for y := range int(height) {
			if s.T.Failed() {
				s.T.Logf("screen: %s", t.row(y))
			}
		}
		line.Close()
		master.Close()
		<-ended
		s.Must(t.screen.Stop())
	})
	return t
}

// run starts "conenatd top" on the terminal.
func (t *terminal) run(args ...string) *lab.Cmd {
	t.T.Helper()
	c := t.Gateway.Command(t.T.Context(), t.Exe, append([]string{"top"}, args...)...)
	c.Stdin, c.Stdout, c.Stderr = t.line, t.line, t.line
	c.Env = append(os.Environ(), "TERM=xterm-256color", "LC_ALL=C.UTF-8")
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	t.Must(c.Start())
	return c
}

func (t *terminal) press(keys string) {
	t.T.Helper()
	_, err := t.master.WriteString(keys)
	t.Must(err)
}

// row returns a line of the screen.
func (t *terminal) row(y int) string {
	var b strings.Builder
	for x := range 200 {
		b.WriteString(t.screen.GetCell(vt.Coord{X: vt.Col(x), Y: vt.Row(y)}).C)
	}
	return strings.TrimRight(b.String(), " ")
}

// wants waits until a line of the screen has each of these texts.
func (t *terminal) wants(y int, texts ...string) {
	t.T.Helper()
	t.Until(fmt.Sprintf("line %d of the screen has %q", y, texts), func() bool {
		return !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(t.row(y), text) })
	})
}

// modes returns the settings of the terminal.
func (t *terminal) modes() unix.Termios {
	t.T.Helper()
	modes, err := unix.IoctlGetTermios(int(t.line.Fd()), unix.TCGETS)
	t.Must(err)
	return *modes
}

// Fails when the screen does not show the permissions of real flows, when a key does not sort
// them, when a daemon that stops and comes back ends it, and when the terminal is not as it
// was afterwards.
func TestTopShowsPermissions(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Inside: 2})
	s.Serve()
	term := s.terminal(130, 12)
	before := term.modes()
	top := term.run("--interval=100ms")
	term.wants(0, "works")
	term.wants(2, "INT↑", "EXT", "PEER", "STATE", "FLOWS", "CHILDREN", "AGE", "EXPIRES")

	first, second, proxy, other := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5061)
	s.Contact(first, proxy)
	term.wants(3, first.Addr().String(), lab.PeerA.String(), "standing")
	s.Contact(second, proxy)
	s.Contact(second, other)
	rows := []string{first.Addr().String(), second.Addr().String()}
	if second.Addr().Compare(first.Addr()) < 0 {
		rows[0], rows[1] = rows[1], rows[0]
	}
	term.wants(3, rows[0])
	term.wants(4, rows[1])
	term.press("r")
	term.wants(3, rows[1])
	term.wants(4, rows[0])
	term.press(strings.Repeat(">", 4)) // EXT, PEER, STATE, FLOWS
	term.wants(2, "FLOWS↓")
	term.wants(3, second.Addr().String())
	term.press("r")
	term.wants(2, "FLOWS↑")
	term.wants(3, first.Addr().String())

	s.Stop()
	term.wants(0, "no conenatd runs in this network namespace")
	s.Serve()
	term.wants(0, "works")

	term.press("q")
	s.Must(top.Wait())
	if term.modes() != before {
		t.Errorf("the terminal is %+v, was %+v", term.modes(), before)
	}
	term.press("after\n") // echoed again, on the screen from before
	term.wants(0, "after")

	top = term.run("--host", second.Addr().Addr().String())
	term.wants(11, ", host "+second.Addr().Addr().String())
	term.press("\x03")
	s.Must(top.Wait())
	if term.modes() != before {
		t.Errorf("after Ctrl-C the terminal is %+v, was %+v", term.modes(), before)
	}
}

// Fails when "top" without a terminal, or on one that has no full screen, does not say so in one
// sentence, and when it does not end as after another wrong command line.
func TestTopNeedsATerminal(t *testing.T) {
	s := newScene(t, lab.Options{})
	fails := func(c *lab.Cmd, want string) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "errors")
		errors, err := os.Create(path)
		s.Must(err)
		defer errors.Close()
		c.Stderr = errors
		s.Must(c.Start())
		_ = c.Wait() // its status follows
		text, err := os.ReadFile(path)
		s.Must(err)
		if code := c.ProcessState.ExitCode(); code != config.UsageStatus || !strings.HasPrefix(string(text), want) || strings.Count(string(text), "\n") != 1 {
			t.Errorf("%q: %q, exit status %d", c.Args, text, code)
		}
	}
	term := s.terminal(80, 24)
	command := func(args ...string) *lab.Cmd {
		c := s.Gateway.Command(t.Context(), s.Exe, append([]string{"top"}, args...)...)
		c.Env = append(os.Environ(), "TERM=xterm")
		c.Stdin, c.Stdout = term.line, term.line
		return c
	}
	const none = "conenatd: top: standard input and output are not both a terminal: "
	c := command()
	c.Stdin = nil
	fails(c, none)
	c = command()
	c.Stdout = nil
	fails(c, none)
	c = command()
	c.Env = append(c.Env, "TERM=dumb")
	fails(c, `conenatd: top: a terminal with TERM="dumb" cannot show a full screen: `)
	fails(command("--interval=1ms"), "conenatd: interval 1ms: expected at least ")
	if out, code := s.CLI("top"); code != config.UsageStatus || !strings.HasPrefix(out, none) {
		t.Errorf("%q, exit status %d", out, code)
	}
}
