package daemon

import (
	"context"
	"errors"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
)

// changes are changes by others that the reconcile has still to look at.
type changes struct {
	rules    bool // somebody's transaction in nftables, or rules of iptables-legacy
	elements bool // a transaction that could change elements of the map
	links    bool // links, addresses or routes
	ways     bool // translated flows left by links that are not outside links
	flows    bool // some may have been misjudged meanwhile
}

// lookAround looks at what others changed, as far as the budget allows: at a single change
// at once, and if changes never end, at all that came since the last look.
func (d *Daemon) lookAround(ctx context.Context, q *ctwatch.Queries) {
	err := d.lookAtRules()
	if d.changed == (changes{}) {
		err = errors.Join(err, d.lookAtLegacy())
	}
	if d.changed != (changes{}) && d.budget.allows(d.now()) {
		d.budget.spend(func() { err = errors.Join(err, d.lookAtChanges(q)) })
		late, look := d.budget.wait(), d.budget.look
		d.ask(func() { d.late, d.look = late, look })
	}
	if ctx.Err() == nil {
		d.failures.note(requestLookAtChanges, 1, err)
	}
}

// lookAtRules checks whether somebody changed nftables since the last time. It repairs our
// own tables at once if somebody may have changed or deleted them.
func (d *Daemon) lookAtRules() error {
	if d.firewall.tables == nil {
		return nil
	}
	changed, err := d.firewall.tables.Changed()
	if err != nil {
		return err
	}
	var broken bool
	var cfg config.Config
	var zones cone.Zones
	ok := d.ask(func() {
		cfg, zones = d.cfg.Config, d.engine.Model.Zones()
		broken = d.backends.nft != nil && d.backends.nft.Broken()
	})
	if !ok {
		return errEnded
	}
	d.changed.rules = d.changed.rules || changed
	d.firewall.retry.changed = d.firewall.retry.changed || changed
	err = d.followZones(cfg, zones)
	if !broken && (!changed || d.firewall.tables.Owned()) {
		return err
	}
	// Nothing else finds elements that somebody deleted.
	d.changed.elements = true
	mended, failed := d.mendRules(cfg, d.network)
	err = errors.Join(err, failed)
	if mended || broken {
		err = errors.Join(err, d.compare(true))
	}
	if mended && wantsMapping(cfg) {
		d.wantReconcile() // for the mappings of living flows
	}
	return err
}

// lookAtLegacy checks whether somebody changed rules of iptables-legacy since the last time,
// as far as the budget allows.
func (d *Daemon) lookAtLegacy() (err error) {
	if !d.budget.allowsPoll(d.now()) {
		return nil
	}
	d.budget.spend(func() { d.changed.rules, err = d.firewall.reader.LegacyChanged() })
	d.firewall.retry.changed = d.firewall.retry.changed || d.changed.rules
	return err
}

// lookAtChanges looks at all that others changed. Looks that fail are left for the next
// time.
func (d *Daemon) lookAtChanges(q *ctwatch.Queries) error {
	was := d.changed
	d.changed = changes{}
	var errs []error
	try := func(wanted bool, again *bool, look func() error) {
		if !wanted {
			return
		}
		if err := look(); err != nil {
			*again = true
			errs = append(errs, err)
		}
	}
	try(was.ways && !was.links, &d.changed.ways, func() error {
		var cfg config.Config
		if !d.ask(func() { cfg = d.cfg.Config }) {
			return errEnded
		}
		found, err := d.followFlows(cfg)
		was.links = was.links || found
		return err
	})
	try(was.links, &d.changed.links, func() error {
		// A flow that began meanwhile may have been misjudged.
		misjudged, err := d.readGateway()
		was.flows = was.flows || misjudged
		return err
	})
	try(was.rules && !was.links, &d.changed.rules, func() error {
		followed, err := d.readRules()
		was.flows = was.flows || followed
		return err
	})
	try(was.elements, &d.changed.elements, func() error { return d.compare(true) })
	try(was.flows, &d.changed.flows, func() error {
		err := d.readFlows(q)
		d.ask(d.report)
		return err
	})
	return errors.Join(errs...)
}

// readRules brings the model up to date about what the user's rules do. It reports
// whether other subnets are enabled now.
func (d *Daemon) readRules() (followed bool, err error) {
	var cfg config.Config
	if !d.ask(func() { cfg = d.cfg.Config }) {
		return false, errEnded
	}
	d.firewall.look()
	d.broken.due = true
	if other, err := d.uplinks.ask(d.firewall, d.network); err != nil || other {
		misjudged, failed := d.readGateway()
		return misjudged, errors.Join(err, failed)
	}
	err = d.readForwards(cfg, d.network)
	tables, failed := d.firewall.read(cfg)
	err = errors.Join(err, failed, d.redecide(cfg, d.network, tables))
	followed, failed = d.follow(cfg, d.network)
	return followed, errors.Join(err, failed)
}

// isLate is the delay of others' changes from which on the user is warned.
const isLate = 2 * time.Second
