package daemon

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/episodes"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/handover"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

func wantsExpect(cfg config.Config) bool { return cfg.Backend != config.BackendNFT }
func wantsMap(cfg config.Config) bool    { return cfg.Backend != config.BackendExpect }

// openBackends opens the backends that the configuration wants, and returns the permissions
// that an earlier daemon left. The loop does not run yet.
func (d *Daemon) openBackends() (adopted []expect.Adopted, err error) {
	l, r := d.loop, d.reconcile
	cfg := l.cfg
	var inMap []expect.Adopted
	if wantsMap(cfg) && r.firewall.noMap() == nil {
		inMap, l.rest, err = r.firewall.leftSome(cfg, r.network.OutsideLinks())
	} else {
		inMap, err = r.firewall.left(cfg) // the other backend takes it over
	}
	if err != nil {
		return nil, err
	}
	older, err := d.openOlder()
	if err != nil {
		return nil, err
	}
	defer older.close()
	noted, err := d.conntrack.Notes.Revoked()
	d.failures.Note(requestNoteRevoked, 1, err)
	older.revoked = append(older.revoked, noted...)
	unsure, err := d.conntrack.Notes.Unsure(cfg.Inside)
	d.failures.Note(requestNoteUnsure, 1, err)
	older.unsure = append(older.unsure, unsure...)
	inMap = append(inMap, older.standing...)
	opened, err := r.open(cfg)
	if err != nil {
		return nil, err
	}
	r.backends.expect, l.missing = opened.expect, opened.missing
	r.firewall.helpers = onAnchors(opened.expect)
	var expected []expect.Adopted
	if e := opened.expect; e != nil {
		expected = e.Adopted()
	} else if expected, err = expect.Left(0); err != nil {
		return nil, err
	}
	adopted = slices.Concat(expected, inMap)
	d.leave, d.made = len(adopted) > 0, true
	if wantsMap(cfg) && r.firewall.noMap() == nil {
		if r.backends.nft, err = r.firewall.openMap(cfg, r.network.OutsideLinks()); err != nil {
			return nil, err
		}
		if err := r.backends.nft.AdoptDenied(); err != nil {
			return nil, err
		}
		if err := older.moveTo(r.backends.nft, d.failures); err != nil {
			return nil, err
		}
	}
	// The other backend takes over the permissions of one that is no longer in use
	// before they end there.
	if r.backends.expect == nil {
		r.carry(expected)
		if _, err := expect.Cleanup(0); err != nil {
			return nil, err
		}
	}
	if r.backends.nft == nil {
		r.carry(inMap)
		if _, err = r.firewall.set(cfg, r.network.OutsideLinks()); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(older.moveUnsureTo(r.firewall.tables), d.adoptRevoked(older.revoked)); err != nil {
		return nil, err
	}
	return adopted, older.remove(d.log)
}

// adoptRevoked takes over what the user revoked under an earlier daemon; older has what
// tables with another name, and the note, hold of it.
func (d *Daemon) adoptRevoked(older []cone.Revoked) error {
	r := d.reconcile
	d.denied = older
	if r.firewall.tables == nil {
		return nil
	}
	r.backends.revoked = r.firewall.tables.NewRevoked()
	keys, err := r.backends.revoked.Adopt()
	if err != nil {
		return err
	}
	d.denied = append(d.denied, revokedKeys(keys)...)
	d.leave = d.leave || len(d.denied) > 0
	keys = keys[:0]
	for _, x := range older {
		keys = append(keys, x.Key)
	}
	d.failures.Note(episodes.Request(engine.DenyPermissions), len(older), r.backends.revoked.Add(keys))
	return nil
}

// revokedKeys returns keys of a set in the kernel, which does not say which flows there
// were.
func revokedKeys(keys []cone.Key) (all []cone.Revoked) {
	for _, k := range keys {
		all = append(all, cone.Revoked{Key: k})
	}
	return all
}

func onAnchors(e *expect.Backend) []string {
	if e == nil {
		return nil
	}
	return e.OnAnchors()
}

// carry grants what an earlier daemon left. The model decides later what stays.
func (r *reconciler) carry(left []expect.Adopted) {
	var ps []cone.Permission
	for _, a := range left {
		if !a.MapTranslates { // else the map has it
			ps = append(ps, a.Permission)
		}
	}
	r.backends.carriers().Each(func(_ cone.Carriers, x engine.Carrier) {
		carried := slices.DeleteFunc(slices.Clone(ps), func(p cone.Permission) bool { return !x.Carries(&p) })
		x.Grant(carried, func(i int, why cone.Reason, err error) {
			r.failures.Note(requestCarryPermissionOver, 1, because(why, err), "ext", carried[i].Ext, "peer", carried[i].Peer)
		})
	})
}

// An opened backend is ready, but not in use yet.
type opened struct {
	expect  *expect.Backend
	missing string // why one wanted backend is missing; the other one is there
}

// open opens the expect backend if cfg wants it, and says what is missing.
func (r *reconciler) open(cfg config.Config) (o opened, err error) {
	if wantsMap(cfg) && r.firewall.noMap() != nil {
		err := fmt.Errorf("the nft backend is missing: %w", r.firewall.noMap())
		if !wantsExpect(cfg) {
			return o, err
		}
		o.missing = err.Error()
	}
	if !wantsExpect(cfg) {
		return o, nil
	}
	o.expect, err = expect.Open(expect.Config{Lifetime: cfg.Lifetime, IPv6: anyIPv6(cfg), MayIPv6: cfg.Self})
	if errors.Is(err, expect.ErrNoHelper) && wantsMap(cfg) && r.firewall.noMap() == nil {
		o.missing = fmt.Sprintf("the expect backend is missing: %v", err)
		return o, nil
	}
	if err != nil {
		return o, err
	}
	if r.space, _, err = r.readSpace(); err != nil {
		return o, errors.Join(err, o.expect.Close())
	}
	n, _ := r.space.share()
	o.expect.SetMax(n)
	return o, nil
}

// change puts cfg in force, and switches backends if cfg wants others. New backends carry
// what stands before old ones let go of it.
func (r *reconciler) change(cfg config.Config) error {
	var o opened
	var m *elements.Map
	r.firewall.forwards(prefixes(cfg.Subnets), r.network)
	if r.firewall.choosers == nil { // the first mapping must respect ports that rules choose
		_, _, err := r.firewall.sourceNAT(cfg, r.network)
		r.failures.Note(requestLookAtChanges, 1, err)
	}
	ports, warnings, err := r.firewall.choosePorts(cfg, r.network, r.served, r.sure, r.firewall.shared.Covers)
	if err != nil {
		return err
	}
	hasExpect, hasMap := r.backends.expect != nil, r.backends.nft != nil
	if !hasExpect || !wantsExpect(cfg) {
		if o, err = r.open(cfg); err != nil {
			return err
		}
	}
	outside := r.network.OutsideLinks()
	old, helpers := r.firewall.ports, r.firewall.helpers
	r.firewall.ports = ports
	if o.expect != nil {
		r.firewall.helpers = onAnchors(o.expect)
	}
	decided := r.firewall.decisions
	r.firewall.decisions = r.firewall.decide(cfg, r.network)
	if wantsMap(cfg) && r.firewall.noMap() == nil && !hasMap {
		if m, err = r.firewall.openMap(cfg, outside); err != nil {
			r.firewall.withMap = false
		}
	} else {
		_, err = r.firewall.set(cfg, outside)
	}
	if err != nil {
		r.firewall.ports, r.firewall.helpers, r.firewall.decisions = old, helpers, decided
		return errors.Join(err, closeExpect(o.expect))
	}
	r.ask(func(l *loop) {
		if o.expect != nil {
			r.backends.expect = o.expect
		}
		if m != nil {
			r.backends.nft = m
		}
		l.useBackends(r.backends)
		if o.expect != nil {
			l.setRoom(r.space)
		}
		if !hasExpect || !wantsExpect(cfg) {
			l.missing = o.missing
		}
		r.firewall.old.leavePools(l.cfg, old.pools, cfg)
		l.cfg, l.portWarnings, l.decisions = cfg, warnings, r.firewall.decisions
		l.backends.configure(cfg)
		l.engine.Model.SetPolicy(r.now(), l.policy(cfg))
		r.failures.Note(requestFilterConntrackEvents, 1, r.filterEvents(cfg))
	})
	if o.expect == nil && m == nil && (!hasExpect || wantsExpect(cfg)) && (!hasMap || wantsMap(cfg)) {
		return nil // the same backends
	}
	// cfg is in force: what fails now is logged, and left to the next reconcile.
	err = r.compare(false)
	if hasExpect && !wantsExpect(cfg) {
		err = errors.Join(err, r.dropExpect(cfg))
	}
	if hasMap && !wantsMap(cfg) {
		err = errors.Join(err, r.dropMap(cfg))
	}
	r.failures.Note(requestLeaveTheOldBackend, 1, err)
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
func (r *reconciler) dropExpect(cfg config.Config) (err error) {
	r.ask(func(l *loop) {
		e := r.backends.expect
		r.backends.expect = nil
		l.useBackends(r.backends)
		var all []cone.Permission
		err = e.List(func(p cone.Permission, _ time.Duration) { all = append(all, p) })
		err = errors.Join(err, e.Revoke(all), e.Close(), r.conntrack.Restore(handover.ExpectMax))
		r.firewall.helpers = nil
	})
	_, failed := r.firewall.set(cfg, r.network.OutsideLinks())
	return errors.Join(err, failed)
}

// dropMap removes the map, in which the model no longer wants anything.
func (r *reconciler) dropMap(cfg config.Config) (err error) {
	r.ask(func(l *loop) {
		r.backends.nft = nil
		l.useBackends(r.backends)
		r.firewall.withMap = false
	})
	_, err = r.firewall.set(cfg, r.network.OutsideLinks())
	return err
}
