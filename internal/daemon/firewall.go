package daemon

import (
	"errors"
	"fmt"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
)

// A firewall is what the daemon has to do with nftables: its own table, and what
// rules of the user's forward. The reconcile owns it. Where the kernel has no
// nftables it does nothing and warns.
type firewall struct {
	table    *rules.Table // nil without nftables
	warnings []string     // that stay as long as the daemon runs
}

func openFirewall(name string) (*firewall, error) {
	f := &firewall{}
	t, err := rules.Open(rules.Config{Name: name})
	if missing := new(rules.UnsupportedError); errors.As(err, &missing) {
		f.warnings = append(f.warnings, "no guard and no cap on children: "+missing.Error())
		return f, nil
	}
	if errors.Is(err, rules.ErrForeignTable) {
		return nil, fmt.Errorf(`%w with the key "table"`, err)
	}
	if err != nil {
		return nil, err
	}
	f.table = t
	for _, m := range t.Missing() {
		f.warnings = append(f.warnings, m.Error())
	}
	return f, nil
}

// set makes the table do what the configuration wants.
func (f *firewall) set(cfg config.Config, outside []string) error {
	if f.table == nil {
		return nil
	}
	return f.table.Set(rules.Desired{OutsideLinks: outside, Guard: cfg.Guard, MaxChildren: cfg.MaxChildren})
}

// forwards returns the test for outside endpoints that rules of the user's
// forward, and what he should know about these rules.
func (f *firewall) forwards(network gateway.Network) (covers func(cone.Endpoint) bool, warnings []string, err error) {
	if f.table == nil {
		return nil, nil, nil
	}
	var outside []rules.Link
	for _, l := range network.Links {
		if l.Outside {
			outside = append(outside, rules.Link{Index: l.Index, Name: l.Name})
		}
	}
	if len(outside) == 0 {
		return nil, nil, nil
	}
	all, err := rules.Forwards(0, outside)
	if err != nil {
		return nil, nil, fmt.Errorf("read port forwards: %w", err)
	}
	var sure []rules.Forward
	for _, r := range all {
		switch {
		case r.Unknown:
			warnings = append(warnings, fmt.Sprintf(
				"a forward that is not understood is known from its first flow on only: %s", r.Text))
			continue
		case r.All:
			warnings = append(warnings, fmt.Sprintf(
				"a rule forwards all ports, so that no permission can stand on its addresses: %s", r.Text))
		}
		sure = append(sure, r)
	}
	return func(e cone.Endpoint) bool {
		for _, r := range sure {
			if r.Covers(e) {
				return true
			}
		}
		return false
	}, warnings, nil
}

// guard is what status shows of the table.
func (f *firewall) guard() (g control.Guard) {
	if f.table == nil {
		return g
	}
	if c, err := f.table.Counters(); err == nil {
		g = control.Guard{Drops: c.GuardDrops, Children: c.ChildDrops, PortZero: c.PortZeroDrops}
	}
	return g
}

// close lets go of the table, and removes it unless it is to be kept.
func (f *firewall) close(keep bool) error {
	if f.table == nil {
		return nil
	}
	var err error
	if !keep {
		err = f.table.Remove()
	}
	return errors.Join(err, f.table.Close())
}
