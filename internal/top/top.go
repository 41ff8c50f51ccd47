// Package top shows the permissions of a running daemon on a full screen, and keeps it up to
// date. It only asks the daemon, and keeps no more than some screens of the list.
package top

import (
	"context"
	"time"

	"github.com/gdamore/tcell/v3"

	"github.com/conenatd/conenatd/internal/control"
)

// A Daemon answers what the screen shows. control.Client is one.
type Daemon interface {
	Status(ctx context.Context) (control.Status, error)
	Permissions(ctx context.Context, f func(control.Permission) error) error
}

// Options are what the user chose.
type Options struct {
	Interval time.Duration // between two looks, more if a look takes longer
	Filter   control.Filter
}

// Run shows the permissions on the terminal that is standard input and output, until the user
// quits or ctx ends. It returns an error if there is no daemon at the start; one that stops
// later may come back. On return the terminal is as it was before.
func Run(ctx context.Context, d Daemon, o Options) error {
	status, err := d.Status(ctx)
	if err != nil {
		return err
	}
	tty, err := tcell.NewStdIoTty()
	if err != nil {
		return err
	}
	return show(ctx, d, o, tty, status)
}

// An answer is what a look found.
type answer struct {
	status control.Status
	page   page
	err    error
	took   time.Duration
}

// look asks the daemon for what r wants.
func look(ctx context.Context, d Daemon, r request) (a answer) {
	start := time.Now()
	if a.status, a.err = d.Status(ctx); a.err == nil {
		a.page, a.err = r.read(func(f func(control.Permission) error) error { return d.Permissions(ctx, f) })
	}
	a.page.at = time.Now()
	a.took = a.page.at.Sub(start)
	return a
}

// restPerLook keeps looks that nobody asked for to a tenth of the time: a look at a long list
// takes a core of the gateway.
const restPerLook = 9

// show is Run on any terminal, after the first answer. It asks for the list again after the interval, or at once if the
// user wants another part of it. It rests at least as long as the last look took, and restPerLook times as long if
// nobody asked.
func show(ctx context.Context, d Daemon, o Options, tty tcell.Tty, status control.Status) error {
	// Nothing is asked of the terminal: an answer that comes late would look like keys.
	screen, err := tcell.NewTerminfoScreenFromTty(tty, tcell.OptNegotiation(false), tcell.OptSanitizeContent(true))
	if err != nil {
		return err
	}
	if err := screen.Init(); err != nil {
		return err
	}
	defer screen.Fini()
	ctx, cancel := context.WithCancel(ctx)

	m := model{next: request{order: order{column: "INT"}, filter: o.Filter}, status: status, page: page{at: time.Now()}}
	m.resize(screen.Size())
	answers := make(chan answer)
	var last answer
	looking, again := false, false // a look is under way; the request changed since
	defer func() {
		if cancel(); looking {
			<-answers
		}
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	urge := func() {
		if again = looking; !looking {
			timer.Reset(time.Until(last.page.at.Add(last.took)))
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
			looking = true
			go func(r request) { answers <- look(ctx, d, r) }(m.next)
			continue
		case last = <-answers:
			looking = false
			m.accept(last)
			if timer.Reset(max(o.Interval-last.took, restPerLook*last.took)); again {
				urge()
			}
		case ev := <-screen.EventQ():
			switch ev := ev.(type) {
			case *tcell.EventResize:
				m.resize(ev.Size())
				screen.Sync()
				urge()
			case *tcell.EventKey:
				changed, quit := m.press(ev.Key(), ev.Str())
				if quit {
					return nil
				}
				if changed {
					urge()
				}
			case *tcell.EventError:
				return ev
			}
		}
		paint(screen, m.lines(time.Now()))
	}
}

// paint shows lines on the screen.
func paint(screen tcell.Screen, lines []line) {
	screen.Clear()
	for y, l := range lines {
		x := 0
		for _, p := range l {
			screen.PutStrStyled(x, y, p.text, p.style)
			x += len([]rune(p.text))
		}
	}
	screen.Show()
}
