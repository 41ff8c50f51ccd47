package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
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

// installed returns the configuration of the service that a package installed, and the command
// that starts it.
func installed() (cfg config.Config, start string, err error) {
	start = "conenatd run --config " + unitConfig
	if _, failed := os.Stat("/run/systemd/system"); failed == nil { // sd_booted(3)
		start = "systemctl enable --now conenatd"
	}
	cfg, err = config.Load(unitConfig)
	return cfg, start, err
}

// enables is the command that enables networks in the configuration of the service, and starts it.
func enables(networks []netip.Prefix, start string) string {
	return fmt.Sprintf(`printf '\n[[subnet]]\nprefix = "%%s"\n' %s >>%s && %s`, control.Joined(networks, " "), unitConfig, start)
}

// howToStart says how to start the installed daemon, and which networks it would serve if its
// configuration enables none. Without an installed one it returns err.
func howToStart(err error) error {
	cfg, start, wrong := installed()
	switch {
	case errors.Is(wrong, fs.ErrNotExist):
		return err
	case errors.Is(wrong, fs.ErrPermission):
		return fmt.Errorf("%w; run as root to be told how to start it: %v", control.ErrNotRunning, wrong)
	case wrong != nil:
		return fmt.Errorf("%w, and would not start: %v", control.ErrNotRunning, wrong)
	}
	if !cfg.EnablesNone() {
		return fmt.Errorf("%w: start it with %q", control.ErrNotRunning, start)
	}
	network, failed := gateway.ReadNetwork(0, gateway.Sides{Outside: cfg.Outside})
	if failed != nil {
		return errors.Join(err, failed)
	}
	likely := network.Proposals()
	if len(likely) == 0 {
		return fmt.Errorf("%w: %s enables no subnet, and none looks like an inside network: name yours there in a [[subnet]], then start it with %q%s",
			control.ErrNotRunning, unitConfig, start, passedOver(network))
	}
	return fmt.Errorf("%w, and %s enables no subnet. It would serve %s. This enables that, and starts it:\n  %s%s",
		control.ErrNotRunning, unitConfig, control.Joined(likely, ", "), enables(likely, start), passedOver(network))
}
