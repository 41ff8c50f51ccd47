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
func (r *reconciler) lookAround(ctx context.Context, q *ctwatch.Queries) {
	err := r.lookAtRules()
	if r.changed == (changes{}) {
		err = errors.Join(err, r.lookAtLegacy())
	}
	if r.changed != (changes{}) && r.budget.Allows(r.now()) {
		r.budget.Spend(func() { err = errors.Join(err, r.lookAtChanges(q)) })
		late, look := r.budget.Wait(), r.budget.Look
		r.ask(func(l *loop) { l.late, l.look = late, look })
	}
	if ctx.Err() == nil {
		r.failures.Note(requestLookAtChanges, 1, err)
	}
}

// lookAtRules checks whether somebody changed nftables since the last time. It repairs our
// own tables at once if somebody may have changed or deleted them.
func (r *reconciler) lookAtRules() error {
	if r.firewall.tables == nil {
		return nil
	}
	changed, err := r.firewall.tables.Changed()
	if err != nil {
		return err
	}
	var broken bool
	var cfg config.Config
	var zones cone.Zones
	ok := r.ask(func(l *loop) {
		cfg, zones = l.cfg, l.engine.Model.Zones()
		broken = l.backends.nft != nil && l.backends.nft.Broken()
	})
	if !ok {
		return errEnded
	}
	r.changed.rules = r.changed.rules || changed
	r.firewall.retry.Changed = r.firewall.retry.Changed || changed
	err = r.followZones(cfg, zones)
	if !broken && (!changed || r.firewall.tables.Owned()) {
		return err
	}
	// Nothing else finds elements that somebody deleted.
	r.changed.elements = true
	repaired, failed := r.repairRules(cfg, r.network)
	err = errors.Join(err, failed)
	if repaired || broken {
		err = errors.Join(err, r.compare(true))
	}
	if repaired && wantsMapping(cfg) {
		r.wantReconcile() // for the mappings of living flows
	}
	return err
}

// lookAtLegacy checks whether somebody changed rules of iptables-legacy since the last time,
// as far as the budget allows.
func (r *reconciler) lookAtLegacy() (err error) {
	if !r.budget.AllowsPoll(r.now()) {
		return nil
	}
	r.budget.Spend(func() { r.changed.rules, err = r.firewall.reader.LegacyChanged() })
	r.firewall.retry.Changed = r.firewall.retry.Changed || r.changed.rules
	return err
}

// lookAtChanges looks at all that others changed. Looks that fail are left for the next
// time.
func (r *reconciler) lookAtChanges(q *ctwatch.Queries) error {
	was := r.changed
	r.changed = changes{}
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
	try(was.ways && !was.links, &r.changed.ways, func() error {
		var cfg config.Config
		if !r.ask(func(l *loop) { cfg = l.cfg }) {
			return errEnded
		}
		found, err := r.followFlows(cfg)
		was.links = was.links || found
		return err
	})
	try(was.links, &r.changed.links, func() error {
		// A flow that began meanwhile may have been misjudged.
		misjudged, err := r.readGateway()
		was.flows = was.flows || misjudged
		return err
	})
	try(was.rules && !was.links, &r.changed.rules, func() error {
		followed, err := r.readRules()
		was.flows = was.flows || followed
		return err
	})
	try(was.elements, &r.changed.elements, func() error { return r.compare(true) })
	try(was.flows, &r.changed.flows, func() error {
		err := r.readFlows(q)
		r.ask((*loop).report)
		return err
	})
	return errors.Join(errs...)
}

// readRules brings the model up to date about what the user's rules do. It reports
// whether other subnets are enabled now.
func (r *reconciler) readRules() (followed bool, err error) {
	var cfg config.Config
	if !r.ask(func(l *loop) { cfg = l.cfg }) {
		return false, errEnded
	}
	r.firewall.look()
	r.forgetStaleByRules()
	r.broken.Again()
	if other, err := r.uplinks.ask(r.firewall, r.network); err != nil || other {
		misjudged, failed := r.readGateway()
		return misjudged, errors.Join(err, failed)
	}
	err = r.readForwards(cfg, r.network)
	err = errors.Join(err, r.readTables(cfg), r.redecide(cfg, r.network))
	followed, failed := r.follow(cfg, r.network)
	return followed, errors.Join(err, failed)
}

// isLate is the delay of others' changes from which on the user is warned.
const isLate = 2 * time.Second
