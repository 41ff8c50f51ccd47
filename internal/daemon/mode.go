package daemon

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

func wantsExpect(cfg config.Config) bool { return cfg.Backend != config.BackendNFT }
func wantsMap(cfg config.Config) bool    { return cfg.Backend != config.BackendExpect }

// openBackends opens the backends that the configuration wants, and returns the permissions
// that an earlier daemon left. The loop does not run yet.
func (d *Daemon) openBackends() (adopted []expect.Adopted, err error) {
	cfg := d.cfg.Config
	inMap, err := d.firewall.left(cfg) // even if no map is wanted
	if err != nil {
		return nil, err
	}
	older, err := d.openOlder()
	if err != nil {
		return nil, err
	}
	defer older.close()
	inMap = append(inMap, older.standing...)
	opened, err := d.open(cfg)
	if err != nil {
		return nil, err
	}
	d.backends.expect, d.missing = opened.expect, opened.missing
	d.firewall.helpers = onAnchors(opened.expect)
	var expected []expect.Adopted
	if e := opened.expect; e != nil {
		expected = e.Adopted()
	} else if expected, err = expect.Left(0); err != nil {
		return nil, err
	}
	adopted = slices.Concat(expected, inMap)
	d.leave, d.made = len(adopted) > 0, true
	if wantsMap(cfg) && d.firewall.missing == nil {
		if d.backends.nft, err = d.firewall.openMap(cfg, d.network.OutsideLinks()); err != nil {
			return nil, err
		}
		if err := d.backends.nft.AdoptDenied(); err != nil {
			return nil, err
		}
		if err := older.moveTo(d.backends.nft, d.failures); err != nil {
			return nil, err
		}
	}
	// The other backend takes over the permissions of one that is no longer in use
	// before they end there.
	if d.backends.expect == nil {
		d.carry(expected)
		if _, err := expect.Cleanup(0); err != nil {
			return nil, err
		}
	}
	if d.backends.nft == nil {
		d.carry(inMap)
		if _, err = d.firewall.set(cfg, d.network.OutsideLinks()); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(older.moveUnsureTo(d.firewall.tables), d.adoptRevoked(older.revoked)); err != nil {
		return nil, err
	}
	return adopted, older.remove(d.log)
}

// adoptRevoked takes over what the user revoked under an earlier daemon; older has what
// tables with another name hold of it.
func (d *Daemon) adoptRevoked(older []cone.Key) (err error) {
	if d.firewall.tables == nil {
		return nil
	}
	d.backends.revoked = d.firewall.tables.NewRevoked()
	if d.denied, err = d.backends.revoked.Adopt(); err != nil {
		return err
	}
	d.denied = append(d.denied, older...)
	d.leave = d.leave || len(d.denied) > 0
	d.failures.note(request(engine.DenyPermissions), len(older), d.backends.revoked.Add(older))
	return nil
}

func onAnchors(e *expect.Backend) []string {
	if e == nil {
		return nil
	}
	return e.OnAnchors()
}

// carry grants what an earlier daemon left. The model decides later what stays.
func (d *Daemon) carry(left []expect.Adopted) {
	var ps []cone.Permission
	for _, a := range left {
		ps = append(ps, a.Permission)
	}
	d.backends.carriers().Each(func(_ cone.Carriers, x engine.Carrier) {
		carried := slices.DeleteFunc(slices.Clone(ps), func(p cone.Permission) bool { return !x.Carries(&p) })
		x.Grant(carried, func(i int, r cone.Reason, err error) {
			d.failures.note(requestCarryPermissionOver, 1, because(r, err), "ext", carried[i].Ext, "peer", carried[i].Peer)
		})
	})
}

// An opened backend is ready, but not in use yet.
type opened struct {
	expect  *expect.Backend
	missing string // why one wanted backend is missing; the other one is there
}

// open opens the expect backend if cfg wants it, and says what is missing.
func (d *Daemon) open(cfg config.Config) (o opened, err error) {
	if wantsMap(cfg) && d.firewall.missing != nil {
		err := fmt.Errorf("the nft backend is missing: %w", d.firewall.missing)
		if !wantsExpect(cfg) {
			return o, err
		}
		o.missing = err.Error()
	}
	if !wantsExpect(cfg) {
		return o, nil
	}
	o.expect, err = expect.Open(expect.Config{Lifetime: cfg.Lifetime, IPv6: anyIPv6(cfg), MayIPv6: cfg.Self})
	if errors.Is(err, expect.ErrNoHelper) && wantsMap(cfg) && d.firewall.missing == nil {
		o.missing = fmt.Sprintf("the expect backend is missing: %v", err)
		return o, nil
	}
	if err != nil {
		return o, err
	}
	if d.space, _, err = d.readSpace(); err != nil {
		return o, errors.Join(err, o.expect.Close())
	}
	n, _ := d.space.share()
	o.expect.SetMax(n)
	return o, nil
}

// change puts cfg in force, and switches backends if cfg wants others. New backends carry
// what stands before old ones let go of it. The reconcile calls it.
func (d *Daemon) change(cfg config.Config) error {
	var o opened
	var m *elements.Map
	d.firewall.forwards(d.network)
	if d.firewall.choosers == nil { // the first mapping must respect ports that rules choose
		_, _, err := d.firewall.sourceNAT(cfg, d.network)
		d.failures.note(requestLookAtChanges, 1, err)
	}
	ports, warnings, err := d.firewall.choosePorts(cfg, d.network, d.served, d.sure, d.firewall.understood.Covers)
	if err != nil {
		return err
	}
	hasExpect, hasMap := d.backends.expect != nil, d.backends.nft != nil // only the reconcile writes them
	if !hasExpect || !wantsExpect(cfg) {
		if o, err = d.open(cfg); err != nil {
			return err
		}
	}
	outside := d.network.OutsideLinks()
	old, helpers := d.firewall.ports, d.firewall.helpers
	d.firewall.ports = ports
	if o.expect != nil {
		d.firewall.helpers = onAnchors(o.expect)
	}
	decided := d.firewall.decisions
	d.firewall.decisions = d.firewall.decide(cfg, d.network)
	if wantsMap(cfg) && d.firewall.missing == nil && !hasMap {
		if m, err = d.firewall.openMap(cfg, outside); err != nil {
			d.firewall.withMap = false
		}
	} else {
		_, err = d.firewall.set(cfg, outside)
	}
	if err != nil {
		d.firewall.ports, d.firewall.helpers, d.firewall.decisions = old, helpers, decided
		return errors.Join(err, closeExpect(o.expect))
	}
	d.ask(func() {
		if o.expect != nil {
			d.backends.expect = o.expect
			d.setRoom(d.space)
		}
		if m != nil {
			d.backends.nft = m
		}
		if !hasExpect || !wantsExpect(cfg) {
			d.missing = o.missing
		}
		d.firewall.old.leavePools(d.cfg.Config, old.pools, cfg)
		d.cfg.Config, d.portWarnings, d.decisions = cfg, warnings, d.firewall.decisions
		d.useBackends()
		d.backends.configure(cfg)
		d.engine.Model.SetPolicy(d.now(), d.policy(cfg))
		d.failures.note(requestFilterConntrackEvents, 1, d.filterEvents(cfg))
	})
	if o.expect == nil && m == nil && (!hasExpect || wantsExpect(cfg)) && (!hasMap || wantsMap(cfg)) {
		return nil // the same backends
	}
	// cfg is in force: what fails now is logged, and left to the next reconcile.
	err = d.compare(false)
	if hasExpect && !wantsExpect(cfg) {
		err = errors.Join(err, d.dropExpect(cfg))
	}
	if hasMap && !wantsMap(cfg) {
		err = errors.Join(err, d.dropMap(cfg))
	}
	d.failures.note(requestLeaveTheOldBackend, 1, err)
	return nil
}

func closeExpect(e *expect.Backend) error {
	if e == nil {
		return nil
	}
	return e.Close()
}

// dropExpect ends what is left of the expectations, of which the model no longer wants
// any.
func (d *Daemon) dropExpect(cfg config.Config) (err error) {
	d.ask(func() {
		e := d.backends.expect
		d.backends.expect = nil
		d.useBackends()
		var all []cone.Permission
		err = e.List(func(p cone.Permission, _ time.Duration) { all = append(all, p) })
		err = errors.Join(err, e.Revoke(all), e.Close(), d.conntrack.restore(expectMax))
		d.firewall.helpers = nil
	})
	_, failed := d.firewall.set(cfg, d.network.OutsideLinks())
	return errors.Join(err, failed)
}

// dropMap removes the map, in which the model no longer wants anything.
func (d *Daemon) dropMap(cfg config.Config) (err error) {
	d.ask(func() {
		d.backends.nft = nil
		d.useBackends()
		d.firewall.withMap = false
	})
	_, err = d.firewall.set(cfg, d.network.OutsideLinks())
	return err
}
