//go:build !conenatd_small

package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/probe"
)

// errNoServer is for a command line without --server. There is no default: whom a host
// contacts is the user's choice.
var errNoServer = errors.New("--server: expected a STUN server with two addresses (RFC 5780), for example your own coturn outside " +
	"with two listening-ip; conenatd contacts no server that you did not name")

func probeCommand() *cobra.Command {
	var server, from string
	var lifetime time.Duration
	var asJSON bool
	c := &cobra.Command{
		Use:   "probe",
		Short: "Find out on an inside host how its NAT and firewall treat UDP",
		Long: `Find out, on any host, how the NAT and the firewall between it and a STUN server
treat UDP: mapping, filtering and hairpinning by the tests of RFC 5780, and what this
means for SIP, consoles and WebRTC. It needs no root and no daemon, changes nothing,
and sends to the server and to this host's own outside endpoint alone.

The server must be outside, and must have two addresses for all tests. A coturn of
your own does: "turnserver --stun-only --listening-ip A --listening-ip B". There is no
default, so that no third party is asked whom you did not choose. If a name has IPv4 and
IPv6 addresses, both families are tested, as far as this host has them.

The exit status is 0 if peers that this host has sent to can answer from any port, 1 if
they can only from the same port, or if that is not known, 2 with a symmetric NAT, 3
without an answer from the server, and 78 if the command line is wrong.`,
		Example: "  conenatd probe --server stun.example.net\n  conenatd probe --server 203.0.113.1:3478 --from 192.168.1.20 --json",
		Args:    exactly(),
	}
	fs := c.Flags()
	fs.StringVar(&server, "server", "", "STUN server, as `host` or host:port; the default of the port is 3478")
	fs.StringVar(&from, "from", "", "send from this own `address`, if this host has several")
	fs.DurationVar(&lifetime, "lifetime", 0, "also test how long mappings live without packets, by waiting up to this `time`, at most 10m")
	fs.BoolVar(&asJSON, "json", false, "print JSON")
	complete(c, "server", completeWords())
	complete(c, "from", completeWords())
	complete(c, "lifetime", completeWords())
	c.RunE = func(c *cobra.Command, _ []string) error {
		o, err := probeOptions(server, from)
		if err == nil && c.Flags().Changed("lifetime") {
			o.Lifetime, err = lifetime, checkLifetime(lifetime)
		}
		if err != nil {
			return &config.UsageError{Err: err}
		}
		report, err := probe.Run(c.Context(), o)
		if err != nil {
			return err
		}
		return writeReport(c, &report, asJSON)
	}
	return c
}

func probeOptions(server, from string) (o probe.Options, err error) {
	if server == "" {
		return o, errNoServer
	}
	if o.Server, err = probe.ParseServer(server); err != nil {
		return o, err
	}
	if from != "" {
		if o.From, err = probe.OwnAddress(from); err != nil {
			return o, err
		}
	}
	return o, nil
}

func checkLifetime(d time.Duration) error {
	if d < time.Second || d > probe.MaxLifetime {
		return fmt.Errorf("lifetime %v: expected a time from 1s to %v", d, probe.MaxLifetime)
	}
	return nil
}
