package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/daemon"
	"github.com/conenatd/conenatd/internal/gateway"
)

// unitConfig is the configuration file of the service that packages install.
const unitConfig = "/etc/conenatd/conenatd.toml"

// notRunning adds to the error of a daemon that does not run what a dead one left, and how to start
// the installed one. It returns other errors unchanged.
func notRunning(err error) error {
	if !errors.Is(err, control.ErrNotRunning) {
		return err
	}
	if left, failed := daemon.Leftovers(); failed == nil && len(left) > 0 {
		return fmt.Errorf("%w\na dead daemon left the tables %s: a start takes them over, and \"conenatd cleanup\" removes them", howToStart(err), strings.Join(left, ", "))
	}
	return howToStart(err)
}

// howToStart says how to start the installed daemon, and which networks it would serve if its
// configuration enables none. Without an installed one it returns err.
func howToStart(err error) error {
	cfg, wrong := config.Load(unitConfig)
	switch {
	case errors.Is(wrong, fs.ErrNotExist):
		return err
	case errors.Is(wrong, fs.ErrPermission):
		return fmt.Errorf("%w; run as root to be told how to start it: %v", control.ErrNotRunning, wrong)
	case wrong != nil:
		return fmt.Errorf("%w, and would not start: %v", control.ErrNotRunning, wrong)
	}
	start := "conenatd run --config " + unitConfig
	if _, err := os.Stat("/run/systemd/system"); err == nil { // sd_booted(3)
		start = "systemctl enable --now conenatd"
	}
	if !cfg.EnablesNone() {
		return fmt.Errorf("%w: start it with %q", control.ErrNotRunning, start)
	}
	network, failed := gateway.ReadNetwork(0, gateway.Sides{Outside: cfg.Outside})
	if failed != nil {
		return errors.Join(err, failed)
	}
	var likely []string
	for _, p := range network.Proposals() {
		likely = append(likely, p.String())
	}
	if len(likely) == 0 {
		return fmt.Errorf("%w: %s enables no subnet, and none looks like an inside network: name yours there in a [[subnet]], then start it with %q%s",
			control.ErrNotRunning, unitConfig, start, passedOver(network))
	}
	return fmt.Errorf("%w, and %s enables no subnet. It would serve %s. This enables that, and starts it:\n"+
		`  printf '\n[[subnet]]\nprefix = "%%s"\n' %s >>%s && %s%s`,
		control.ErrNotRunning, unitConfig, strings.Join(likely, ", "), strings.Join(likely, " "), unitConfig, start, passedOver(network))
}
