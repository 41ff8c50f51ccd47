package daemon

import (
	"errors"
	"slices"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// What New and Examine find out before a daemon runs.

// firstNetwork reads the network, and adds the subnets to cfg that it enables by itself.
func (r *reconciler) firstNetwork(cfg *config.Config) (n gateway.Network, err error) {
	if n, err = r.readNetwork(*cfg); err != nil {
		return n, err
	}
	named := len(cfg.Subnets)
	if cfg.Subnets, err = r.firewall.subnets(*cfg, n, nil, nil); err != nil || len(cfg.Subnets) == named {
		return n, err
	}
	return r.readNetwork(*cfg) // links to the added subnets lead inside
}

// readPorts reads the gateway's own sockets.
func readPorts(n gateway.Network) (*gateway.PortSet, error) {
	sockets, err := gateway.DialSockets(0)
	if err != nil {
		return nil, err
	}
	sockets.SetNetwork(n)
	held, err := sockets.Ports()
	return held, errors.Join(err, sockets.Close())
}

// firstRules asks the user's rules what they forward and how they translate, and chooses the
// ports of mappings. sure says that two looks found the sockets (choosePorts).
func (l *loop) firstRules(f *firewall, n gateway.Network, served *gateway.PortSet, sure bool) (forwarded *userrules.Covered, err error) {
	f.setSides(n)
	forwarded, l.ruleWarnings = f.forwards(prefixes(l.cfg.Subnets), n)
	f.divert(l.cfg, n)
	// What cannot be read is among the warnings; the first reconcile tries again.
	more, _, _ := f.sourceNAT(l.cfg, n)
	l.ruleWarnings = slices.Concat(l.ruleWarnings, more)
	f.ports, l.portWarnings, err = f.choosePorts(l.cfg, n, served, sure, f.shared.Covers)
	return forwarded, err
}
