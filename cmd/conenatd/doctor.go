package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/daemon"
	"github.com/conenatd/conenatd/internal/doctor"
	"github.com/conenatd/conenatd/internal/doctor/collect"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/portpool"
)

// doctorFailed is the exit status if doctor itself failed.
const doctorFailed = 3

func doctorCommand() *cobra.Command {
	var flags config.Flags
	var asJSON bool
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Find what is wrong on this gateway, and the line that repairs it",
		Long: `Look at the kernel, its settings, links and routes, your firewall rules and saved
rules, and at the running daemon if there is one. For each finding say what it is,
why it matters, and the exact line that repairs it, if there is one.

Nothing is changed, but the kernel may load modules. Without a running daemon the
flags, or the file of --config, are those that "conenatd run" would have; without
any, the configuration of the installed package counts. Findings that need flows are
listed as not checked. If a daemon runs, its configuration counts, and the flags
other than --control-socket do not matter.

The exit status is 0 without warnings and errors, 1 with warnings, 2 with errors,
3 if the gateway cannot be examined, and 78 if the command line or the
configuration is wrong.`,
		Example: "  sudo conenatd doctor\n  sudo conenatd doctor --config /etc/conenatd/conenatd.toml --json",
		Args:    exactly(),
	}
	registerFlags(c, &flags)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := flags.Resolve()
		if err != nil {
			return err
		}
		facts, err := facts(c, cfg)
		switch {
		case config.IsUsage(err) && !errors.Is(err, fs.ErrPermission):
			return err // a mistake in the installed configuration
		case err != nil:
			fmt.Fprintln(c.ErrOrStderr(), "conenatd:", err)
			return exitStatus(doctorFailed)
		}
		report := doctor.Diagnose(facts)
		return writeReport(c, &report, asJSON)
	}
	return c
}

// facts asks the running daemon, or examines the gateway as one would at its start.
func facts(c *cobra.Command, cfg config.Config) (doctor.Facts, error) {
	path, err := cfg.ControlSocket, error(nil)
	if path == "" {
		path, err = control.Find()
	}
	var st control.Status
	if err == nil {
		st, err = control.Dial(path).Status(c.Context())
	}
	if err == nil {
		f, err := collect.Gateway(st)
		f.Running = true
		return f, err
	}
	if !errors.Is(err, control.ErrNotRunning) {
		return doctor.Facts{}, err
	}
	start := ""
	if own, command, wrong := installed(); !configured(c) && !errors.Is(wrong, fs.ErrNotExist) {
		if wrong != nil {
			return doctor.Facts{}, wrong
		}
		cfg, start = own, command
	}
	var passedOver []string
	proposed := cfg.EnablesNone()
	if proposed {
		network, err := gateway.ReadNetwork(0, gateway.Sides{Outside: cfg.Outside})
		if err != nil {
			return doctor.Facts{}, err
		}
		likely := network.Proposals()
		for _, p := range likely {
			cfg.Subnets = append(cfg.Subnets, config.Subnet{Prefix: p})
		}
		if passedOver = network.NotProposed(); start != "" {
			start = enables(likely, start)
		}
	}
	st, refused := daemon.Examine(cfg)
	untried := ""
	switch {
	case errors.Is(refused, daemon.ErrUntried):
		untried, refused = daemon.ErrUntried.Error(), nil
	case errors.Is(refused, fs.ErrPermission):
		return doctor.Facts{}, refused
	}
	f, err := collect.Gateway(st)
	if err != nil {
		return f, err
	}
	f.Proposed, f.PassedOver, f.Start, f.Untried = proposed, passedOver, start, untried
	if refused != nil {
		f.NoStart = refused.Error()
		if pool := new(portpool.Error); errors.As(refused, &pool) {
			f.StartFix = pool.Fix
		}
	}
	f.Left, err = daemon.Leftovers()
	return f, err
}

// configured reports whether flags tell the configuration.
func configured(c *cobra.Command) (told bool) {
	c.Flags().Visit(func(f *pflag.Flag) { told = told || f.Name != "json" && f.Name != "control-socket" })
	return told
}

// colored reports whether to print in colours: on a terminal, unless NO_COLOR is set
// (no-color.org).
func colored() bool {
	_, err := unix.IoctlGetTermios(int(os.Stdout.Fd()), unix.TCGETS)
	return err == nil && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}
