package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/sdnotify"
	"github.com/spf13/cobra"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/daemon"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/logs"
	"github.com/conenatd/conenatd/internal/sandbox"
)

// runName is the command of the daemon.
const runName = "run"

func runCommand(caught *signals) *cobra.Command {
	var flags config.Flags
	c := &cobra.Command{
		Use:   runName,
		Short: "Run the daemon",
		Long: `Run the daemon in the foreground until SIGTERM or SIGINT. It then takes
everything that it made out of the kernel, unless on_stop says otherwise. SIGUSR1
ends it, too, but leaves everything for the next daemon: send it for an upgrade. SIGHUP
and "conenatd reload" make it read the configuration file again; flags override
the file.

The exit status is 78 if the configuration or the command line is wrong, so that
no new start can succeed, and 1 for any other error, such as a file that cannot
be read. Other commands have the same.`,
		Example: "  conenatd run --subnet 192.168.1.0/24",
		Args:    exactly(),
	}
	registerFlags(c, &flags)
	c.RunE = func(c *cobra.Command, _ []string) error {
		return run(c.Context(), caught, &flags)
	}
	return c
}

// noSubnet says that no subnet is enabled, and lists the candidates and the command that
// enables them.
func noSubnet(cfg config.Config) error {
	network, err := gateway.ReadNetwork(0, gateway.Sides{Outside: cfg.Outside})
	if err != nil {
		return err
	}
	candidates := network.Proposals()
	if len(candidates) == 0 {
		return &config.UsageError{Err: errors.New("no subnet is enabled and none looks like an inside network: name one, such as\n" +
			"  conenatd run --subnet 192.168.1.0/24" + passedOver(network))}
	}
	var b strings.Builder
	b.WriteString("no subnet is enabled. These look like inside networks; enable them with\n  conenatd run")
	for _, p := range candidates {
		fmt.Fprintf(&b, " --subnet %v", p)
	}
	b.WriteString("\nor all of them with\n  conenatd run --subnet auto")
	b.WriteString(passedOver(network))
	return &config.UsageError{Err: errors.New(b.String())}
}

// passedOver says which networks are left out of a proposal, a line each.
func passedOver(network gateway.Network) (text string) {
	for _, p := range network.NotProposed() {
		text += "\nleft out: " + p
	}
	return text
}

func run(ctx context.Context, caught *signals, flags *config.Flags) error {
	cfg, err := flags.Resolve()
	if err != nil {
		return err
	}
	if cfg.EnablesNone() {
		return noSubnet(cfg)
	}
	socket := cfg.ControlSocket
	if socket == "" {
		if socket, err = control.DefaultSocket(); err != nil {
			return err
		}
	}
	if err := control.ShareFolder(socket); err != nil {
		return err
	}
	control.SweepNotes() // the sandbox does not see other processes
	if err := sandbox.Enter(); err != nil {
		return err
	}
	var level slog.LevelVar
	level.Set(cfg.LogLevel)
	log := slog.New(logs.New(os.Stderr, cfg.LogFormat, &level))
	d, err := daemon.New(daemon.Config{
		Config: cfg, Version: versionText(), Socket: socket, Log: log,
		Level: &level, Reload: flags.Resolve,
	})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	notify, err := sdnotify.New()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("tell the service manager", "err", err)
	}
	defer notify.Close()
	defer context.AfterFunc(ctx, func() { _ = notify.Notify(sdnotify.Stopping) })()
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-caught.upgrade:
			d.HandOver()
			stop()
		case <-ended:
		}
	}()
	go reloadOn(caught.hangup, ended, d)
	go watchdog(notify, ended, d)
	return d.Run(ctx, func() {
		if err := notify.Notify(sdnotify.Ready); err != nil {
			log.Warn("tell the service manager", "err", err)
		}
	})
}

// reloadOn reloads the configuration at each signal. The daemon logs the result.
func reloadOn(hangup <-chan os.Signal, ended <-chan struct{}, d *daemon.Daemon) {
	for {
		select {
		case <-hangup:
			_ = d.Reload()
		case <-ended:
			return
		}
	}
}

// watchdog tells the service manager that the daemon's loop still works, twice in each
// WATCHDOG_USEC (sd_watchdog_enabled(3)), if the manager asks for that.
func watchdog(notify *sdnotify.Notifier, ended <-chan struct{}, d *daemon.Daemon) {
	n, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || n <= 0 {
		return
	}
	t := time.NewTicker(time.Duration(n) * time.Microsecond / 2)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if d.Alive() {
				_ = notify.Notify("WATCHDOG=1") // if telling fails, the manager takes the daemon for dead
			}
		case <-ended:
			return
		}
	}
}
