//go:build !conenatd_small

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/top"
)

// shortestInterval is the minimum of --interval.
const shortestInterval = 100 * time.Millisecond

func topCommand() *cobra.Command {
	var o top.Options
	c := &cobra.Command{
		Use:   "top",
		Short: "Show the permissions on a full screen, and keep it up to date",
		Args:  exactly(),
	}
	d := running{socketFlag(c)}
	c.RunE = func(c *cobra.Command, _ []string) error { return top.Run(c.Context(), d, o) }
	c.Long = `Show the verdict, the totals and the permissions on a full screen, sorted, until "q"
or Ctrl-C. With several of the flags --host, --peer, --subnet and --state, show the
permissions that match each of them.

"<" and ">", or the arrows to the left and right, sort by another column: FLOWS and
CHILDREN with the most first, AGE with the youngest first, EXPIRES with the next to
end first. "r" reverses that. The other arrows, PgUp, PgDn, Home and End scroll. A
row that was scrolled to stays on the screen when others come and go.

A daemon that stops is waited for. A list that takes long is asked for less often.`
	c.Example = "  conenatd top --state refused\n  conenatd top --subnet 192.168.1.0/24 --interval 5s"
	fs := c.Flags()
	fs.DurationVar(&o.Interval, "interval", time.Second, "`time` between two looks")
	filterFlags(fs, &o.Filter)
	stateFlag(c, &o.Filter)
	complete(c, "interval", completeWords())
	c.PreRunE = func(*cobra.Command, []string) error {
		if o.Interval < shortestInterval {
			return &config.UsageError{Err: fmt.Errorf("interval %v: expected at least %v", o.Interval, shortestInterval)}
		}
		return fullScreen()
	}
	return c
}

// running is the daemon that runs now. Another one may have another socket.
type running struct {
	dial func() (*control.Client, error)
}

func (r running) Status(ctx context.Context) (control.Status, error) {
	client, err := r.dial()
	if err != nil {
		return control.Status{}, err
	}
	return client.Status(ctx)
}

func (r running) Permissions(ctx context.Context, f func(control.Permission) error) error {
	client, err := r.dial()
	if err != nil {
		return err
	}
	return client.Permissions(ctx, f)
}

// fullScreen returns an error unless standard input and output are a terminal that can show a
// full screen.
func fullScreen() error {
	const instead = `use "conenatd list" or "conenatd watch"`
	for _, f := range []*os.File{os.Stdin, os.Stdout} {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err != nil {
			return &config.UsageError{Err: errors.New("top: standard input and output are not both a terminal: " + instead)}
		}
	}
	if term := os.Getenv("TERM"); term == "" || term == "dumb" {
		return &config.UsageError{Err: fmt.Errorf("top: a terminal with TERM=%q cannot show a full screen: %s", term, instead)}
	}
	return nil
}
