package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/mdlayher/sdnotify"
	"github.com/spf13/cobra"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/daemon"
	"github.com/conenatd/conenatd/internal/gateway"
)

func runCommand() *cobra.Command {
	var flags config.Flags
	c := &cobra.Command{
		Use:   "run",
		Short: "Run the daemon",
		Long: `Run the daemon in the foreground until SIGTERM or SIGINT. It then takes
everything that it made out of the kernel. Flags override the configuration file.`,
		Example: "  conenatd run --subnet 192.168.1.0/24",
		Args:    cobra.NoArgs,
	}
	flags.Register(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := flags.Resolve()
		if err != nil {
			return err
		}
		return run(c.Context(), cfg, c.ErrOrStderr())
	}
	return c
}

// noSubnet says that no subnet is enabled, and lists the candidates and the
// command that enables them.
func noSubnet(cfg config.Config) error {
	network, err := gateway.ReadNetwork(0, cfg.Outside)
	if err != nil {
		return err
	}
	candidates := network.Candidates()
	if len(candidates) == 0 {
		return &config.UsageError{Err: errors.New("no subnet is enabled and none looks like an inside network: name one, such as\n" +
			"  conenatd run --subnet 192.168.1.0/24")}
	}
	var b strings.Builder
	b.WriteString("no subnet is enabled. These look like inside networks; enable them with\n  conenatd run")
	for _, p := range candidates {
		fmt.Fprintf(&b, " --subnet %v", p)
	}
	b.WriteString("\nor all of them with\n  conenatd run --subnet auto")
	return &config.UsageError{Err: errors.New(b.String())}
}

func run(ctx context.Context, cfg config.Config, stderr io.Writer) error {
	if len(cfg.Subnets) == 0 && !cfg.AutoSubnets {
		return noSubnet(cfg)
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	socket, err := socketPath(cfg.ControlSocket)
	if err != nil {
		return err
	}
	d, err := daemon.New(daemon.Config{Config: cfg, Version: versionText(), Socket: socket, Log: log})
	if err != nil {
		return err
	}
	notify, err := sdnotify.New()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("tell the service manager", "err", err)
	}
	defer notify.Close()
	defer context.AfterFunc(ctx, func() { _ = notify.Notify(sdnotify.Stopping) })()
	return d.Run(ctx, func() {
		if err := notify.Notify(sdnotify.Ready); err != nil {
			log.Warn("tell the service manager", "err", err)
		}
	})
}

// socketPath is the control socket that was named, or that of this network
// namespace.
func socketPath(named string) (string, error) {
	if named != "" {
		return named, nil
	}
	return control.DefaultSocket()
}
