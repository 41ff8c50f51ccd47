package top

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gdamore/tcell/v3/vt"
	"go.uber.org/goleak"

	"github.com/conenatd/conenatd/internal/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A fake is a daemon that can stop and come back.
type fake struct {
	mu     sync.Mutex
	ps     []control.Permission
	err    error
	lists  int           // under way
	most   int           // lists that were under way at once
	asking chan struct{} // if not nil, a list waits until it is closed
}

func (f *fake) Status(context.Context) (control.Status, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return status, f.err
}

func (f *fake) Permissions(ctx context.Context, each func(control.Permission) error) error {
	f.mu.Lock()
	f.lists++
	f.most = max(f.most, f.lists)
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.lists--
	}()
	ps, err, asking := slices.Clone(f.ps), f.err, f.asking
	f.mu.Unlock()
	if asking != nil {
		select {
		case <-asking:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for i := range ps {
		if err := each(ps[i]); err != nil {
			return err
		}
	}
	return err
}

func (f *fake) becomes(ps []control.Permission, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ps, f.err = ps, err
}

// A play is "top" on an emulated terminal.
type play struct {
	*testing.T
	*fake
	vt.MockTerm
	ended chan error
	stop  context.CancelFunc
}

func start(t *testing.T, f *fake) *play {
	t.Helper()
	t.Setenv("TERM", "xterm-256color")
	t.Setenv("LC_ALL", "C.UTF-8")
	ctx, stop := context.WithCancel(t.Context())
	p := &play{t, f, vt.NewMockTerm(vt.MockOptSize{X: 100, Y: 10}), make(chan error, 1), stop}
	go func() { p.ended <- show(ctx, f, Options{Interval: time.Millisecond}, p.MockTerm, status) }()
	t.Cleanup(stop)
	return p
}

// line returns a line of the screen.
func (p *play) line(y int) string {
	var b strings.Builder
	for x := range 200 {
		b.WriteString(p.GetCell(vt.Coord{X: vt.Col(x), Y: vt.Row(y)}).C)
	}
	return strings.TrimRight(b.String(), " ")
}

// wants waits until a line of the screen has this beginning.
func (p *play) wants(y int, text string) {
	p.Helper()
	for end := time.Now().Add(time.Minute); !strings.HasPrefix(p.line(y), text); {
		if time.Now().After(end) {
			p.Fatalf("line %d is %q, want %q", y, p.line(y), text)
		}
		time.Sleep(time.Millisecond)
	}
}

// ends waits for the end.
func (p *play) ends() {
	p.Helper()
	select {
	case err := <-p.ended:
		if err != nil {
			p.Error(err)
		}
	case <-time.After(time.Minute):
		p.Fatal("it does not end")
	}
}

// Fails when the screen does not follow the daemon, when a daemon that stops ends it or is not
// named, when it does not go on with one that comes back, and when "q" does not end it.
func TestScreenFollowsTheDaemon(t *testing.T) {
	p := start(t, &fake{ps: permissions(3)})
	p.wants(0, "works")
	p.wants(3, "10.47.0.0:5060")
	p.wants(9, "1-3 of 3")
	p.becomes(permissions(4), nil)
	p.wants(6, "10.47.0.3:5060")
	p.becomes(nil, errors.New("no conenatd runs here"))
	p.wants(0, "no conenatd runs here")
	p.wants(6, "10.47.0.3:5060")
	p.becomes(permissions(2), nil)
	p.wants(0, "works")
	p.wants(9, "1-2 of 2")
	p.SendRaw([]byte("r"))
	p.wants(3, "10.47.0.1:5060")
	p.SendRaw([]byte("q"))
	p.ends()
}

// Fails when a refused permission has no colour, and when it has one although the user wants
// none (no-color.org).
func TestColours(t *testing.T) {
	for _, none := range []string{"", "1"} {
		t.Setenv("NO_COLOR", none)
		ps := permissions(1)
		ps[0].State = "refused"
		p := start(t, &fake{ps: ps})
		p.wants(3, "10.47.0.0:5060")
		at := vt.Col(strings.Index(p.line(3), "refused"))
		if cell := p.GetCell(vt.Coord{X: at, Y: 3}); (cell.S.Fg() == p.GetCell(vt.Coord{X: 0, Y: 3}).S.Fg()) != (none != "") {
			t.Errorf("with NO_COLOR=%q %q has the colour %v", none, cell.C, cell.S.Fg())
		}
		p.stop()
		p.ends()
	}
}

// Fails when the screen does not take on another size of the terminal.
func TestScreenTakesAnotherSize(t *testing.T) {
	p := start(t, &fake{ps: permissions(100)})
	defer p.ends()
	defer p.stop()
	p.wants(9, "1-6 of 100")
	p.SetSize(vt.Coord{X: 40, Y: 20})
	p.wants(19, "1-16 of 100")
	p.wants(18, "10.47.0.15:5060")
	p.SetSize(vt.Coord{X: 8, Y: 4})
	p.wants(3, "10.47.0.")
	p.SetSize(vt.Coord{X: 120, Y: 6})
	p.wants(5, "1-2 of 100")
}

// Fails when the list is asked for again while it comes, whatever keys are pressed, and when
// "q" waits for it.
func TestSlowListIsAskedForOnce(t *testing.T) {
	f := &fake{ps: permissions(100)}
	p := start(t, f)
	p.wants(9, "1-6 of 100")
	f.mu.Lock()
	f.asking = make(chan struct{})
	f.mu.Unlock()
	p.SendRaw([]byte("  "))
	for range 10 {
		p.SendRaw([]byte("j"))
		p.wants(9, "14-19 of 100")
		p.SendRaw([]byte("k"))
		p.wants(9, "13-18 of 100")
	}
	f.mu.Lock()
	if f.most > 1 {
		t.Errorf("%d lists at once", f.most)
	}
	f.mu.Unlock()
	p.SendRaw([]byte{3})
	p.ends()
}
