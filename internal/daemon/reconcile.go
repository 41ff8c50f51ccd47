package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/gateway"
)

const (
	// flowsAtOnce is how many flows of a dump the loop handles in one piece.
	flowsAtOnce = 1024

	// lookEvery is the time between two checks whether somebody changed
	// nftables. A check costs one query.
	lookEvery = 250 * time.Millisecond

	// hurriedShare limits reconciles that lost events ask for to 1/hurriedShare of a CPU
	// (see rest).
	hurriedShare = 30
)

// reconcile repairs whatever the events missed: at the start, regularly, and after an
// overrun. It calls ready after the first success. Until then it retries soon, and gives
// up after firstTries failures.
func (d *Daemon) reconcile(ctx context.Context, every time.Duration, ready func()) error {
	q := d.reads
	t := time.NewTicker(every)
	defer t.Stop()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	var first firstReconcile
	second := time.NewTimer(betweenLooks) // for the second look at sockets
	defer second.Stop()
	for {
		var err error
		inLoop := d.budget.inLoop
		cost := threadTime(func() { err = d.reconcileOnce(q) }) + d.budget.inLoop - inLoop
		if ctx.Err() != nil {
			return nil
		}
		ended := d.now()
		var hurried <-chan time.Time
		d.failures.note(requestReconcile, 1, err)
		var soon <-chan time.Time // the retry of a daemon that is not ready
		second.Reset(betweenLooks)
		if ready != nil {
			wait, err := first.tried(err)
			switch {
			case err != nil:
				return err
			case wait > 0:
				soon = time.After(wait)
			default:
				ready()
				ready = nil
			}
		}
		for again := false; !again; {
			strays := d.strays
			if d.changed.ways { // strays already wait for the budget
				strays = nil
			}
			select {
			case <-ctx.Done():
				return nil
			case <-soon:
				again = true
			case <-t.C:
				again = soon == nil
			case <-d.hurry:
				if soon == nil && hurried == nil {
					hurried = time.After(ended + rest(cost) - d.now())
				}
			case <-hurried:
				again = true
			case job := <-d.jobs:
				job()
			case look := <-d.looks:
				look()
			case <-second.C:
				if err := d.lookAgain(); ctx.Err() == nil {
					d.failures.note(requestLookAtSockets, 1, err)
				}
			case <-look.C:
				if err := d.lookAtConntrack(); ctx.Err() == nil {
					d.failures.note(requestLookAtConntrack, 1, err)
				}
				d.lookAround(ctx, q)
				d.lookAtFlows(ctx)
			case <-d.moved:
				d.changed.links = true
				d.lookAround(ctx, q)
			case <-strays:
				d.changed.ways = true
				d.lookAround(ctx, q)
			}
		}
	}
}

// A firstReconcile counts failures until the first successful reconcile, which makes a
// daemon ready. Another program may be in the way for a moment.
type firstReconcile struct{ failed int }

const (
	firstTries = 8
	firstWait  = 100 * time.Millisecond // doubled each time: 12.7 s in all
)

// tried takes the result of a try. It returns how long to wait before the next one, 0 after
// a success, and an error after firstTries failures.
func (f *firstReconcile) tried(err error) (wait time.Duration, _ error) {
	if err == nil {
		return 0, nil
	}
	if f.failed++; f.failed == firstTries {
		return 0, fmt.Errorf("no reconcile of %d was good: %w", firstTries, err)
	}
	return firstWait << (f.failed - 1), nil
}

// watchLinks makes the reconcile look at the gateway as soon as links, addresses
// or routes change.
func (d *Daemon) watchLinks(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = d.links.Close() })()
	for {
		err := d.links.Wait()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case d.moved <- struct{}{}:
		default: // a look is already asked for
		}
	}
}

func (d *Daemon) reconcileOnce(q *ctwatch.Queries) error {
	var errs []error
	d.changed = changes{}
	if k, err := d.readConntrack(); err != nil {
		errs = append(errs, err)
	} else {
		d.size = k.Max
		d.ask(func() { d.kernel = k })
	}
	if _, err := d.readGateway(); err != nil {
		errs = append(errs, err)
	}
	timeouts, err := readTimeouts()
	d.failures.note(requestReadTimeouts, 1, err)
	d.ask(func() { d.engine.Model.SetTimeouts(timeouts) })
	if err := d.readFlows(q); err != nil {
		errs = append(errs, err)
	}
	if err := d.mendTableSize(); err != nil {
		errs = append(errs, err)
	}
	if err := d.compare(false); err != nil {
		errs = append(errs, err)
	}
	d.ask(d.report)
	return errors.Join(errs...)
}

// readGateway brings the model up to date about links, addresses, the user's
// forwards and the gateway's own sockets. It reports whether flows may have been
// misjudged because the model did not know this before.
func (d *Daemon) readGateway() (misjudged bool, err error) {
	var cfg config.Config
	if !d.ask(func() { cfg = d.cfg.Config }) {
		return false, errEnded
	}
	_, err = d.followFlows(cfg)
	d.failures.note(requestFollowFlows, 1, err)
	d.firewall.look()
	network, err := d.readNetwork(cfg)
	if err != nil {
		return false, err
	}
	if d.forgetBackups(network) {
		network.Mark(d.uplinks.sides(cfg))
	}
	d.uplinks.remember(network)
	d.links.Know(network, slices.Concat(cfg.Outside, cfg.Inside), wantsMapping(cfg) || cfg.HealFlows)
	_, failed := d.mendRules(cfg, network)
	notes, err := d.firewall.forgetAddresses(cfg, network)
	for _, n := range notes {
		d.log.Info(n)
	}
	d.broken.sawNetwork(d.network, network)
	if !network.SameRoutes(d.network) {
		d.rerouted.looks = rerouteLooks
	}
	failed = errors.Join(failed, err, d.endRerouted(cfg, network))
	failed = errors.Join(failed, d.readForwards(cfg, network), d.lookAtSockets(cfg, network))
	tables, err := d.firewall.read(cfg)
	failed = errors.Join(failed, err, d.redecide(cfg, network, tables))
	topology := network.Topology().Compile()
	hear := d.hearSelf(cfg)
	d.ask(func() {
		d.tables = tables
		misjudged = newOutside(d.network, network) || wantsMapping(cfg) && !topology.Equal(d.topology)
		d.network, d.topology = network.Lean(), topology
		d.sockets.SetNetwork(network)
		misjudged = d.engine.Model.SetTopology(d.now(), topology) || misjudged
		d.engine.Model.SetWay(d.network.Way())
		if d.sure {
			d.engine.ReviewSockets()
		}
		d.warned.tell(d.now(), d.warnings())
	})
	moved := hear() // for the old subnets, before follow enables others
	followed, err := d.follow(cfg, network)
	return moved || misjudged || followed, errors.Join(failed, err)
}

// readForwards brings the model up to date about what the user's rules forward.
func (d *Daemon) readForwards(cfg config.Config, network gateway.Network) error {
	covered, warnings := d.firewall.forwards(network)
	more, changed, err := d.firewall.sourceNAT(cfg, network)
	warnings = slices.Concat(warnings, more)
	if changed {
		_, failed := d.firewall.set(cfg, network.OutsideLinks())
		err = errors.Join(err, failed)
		d.wantReconcile()
	}
	d.ask(func() {
		d.ruleWarnings, d.hidden, d.overtaken = warnings, d.firewall.hidden, d.firewall.overtaken
		d.warned.tell(d.now(), d.warnings())
	})
	whole := d.firewall.whole
	if whole != d.whole || d.firewall.hidden != d.unheard {
		err = errors.Join(err, d.filterEvents(cfg))
	}
	if covered == d.forwarded && whole == d.whole {
		return err
	}
	d.forwarded, d.whole = covered, whole
	d.ask(func() { d.engine.Model.BeginForwards(covered.Bars, whole) })
	for at := 0; at >= 0; {
		if !d.ask(func() { at = d.engine.Model.ReviewForwards(d.now(), at, flowsAtOnce) }) {
			return errEnded
		}
	}
	return err
}

// readFlows shows the model all flows in the conntrack table.
func (d *Daemon) readFlows(q *ctwatch.Queries) error {
	var cfg config.Config
	var served *gateway.PortSet
	d.ask(func() { cfg, served = d.cfg.Config, d.served })
	d.failures.note(requestAssumeAddresses, 1, d.firewall.assumeAddresses(cfg, d.network))
	addrs := len(d.firewall.mappedAddrs)
	m, err := d.firewall.newMapper(cfg, d.network, served)
	d.settled = d.settled && len(d.firewall.mappedAddrs) == addrs // else look for sockets on the new ones
	if err != nil {
		d.failures.note(requestReadMappings, 1, err)
		m = nil
	}
	if m != nil {
		d.ask(func() { m.before = d.applied })
	}
	d.ask(func() { d.engine.Model.BeginSnapshot(d.now()) })
	piece := make([]cone.Flow, 0, flowsAtOnce)
	var failed error
	hand := func() {
		var err error
		piece, err = d.firewall.sure(piece)
		failed = errors.Join(failed, err)
		d.ask(func() {
			now := d.now()
			for i := range piece {
				d.engine.SnapshotFlow(now, &piece[i])
			}
		})
		piece = piece[:0]
		d.lookBetween()
	}
	err = q.Dump(func(f *cone.Flow) {
		if m != nil {
			m.see(f)
		}
		if piece = append(piece, *f); len(piece) == flowsAtOnce {
			hand()
		}
	})
	hand()
	if err = errors.Join(err, failed); err != nil {
		d.ask(d.engine.Model.AbortSnapshot)
		return err
	}
	d.ask(func() { d.engine.Model.EndSnapshot(d.now()) })
	d.firewall.dumped = true
	if m != nil {
		err = d.keep(m, q)
		d.ask(func() {
			m.applied.settle(&m.before, d.tables.Mapping)
			d.applied = m.applied
		})
	} else {
		d.ask(func() { d.applied = applied{} })
	}
	return err
}

// lookBetween runs a look that a status request waits for. Long parts of the reconcile call
// it, so that the request does not wait for their end.
func (d *Daemon) lookBetween() {
	select {
	case look := <-d.looks:
		look()
	default:
	}
}

// mendRules brings our tables to the desired state, and logs it if somebody had changed
// them.
func (d *Daemon) mendRules(cfg config.Config, network gateway.Network) (changed bool, err error) {
	d.firewall.setSides(network)
	repaired := d.firewall.repaired
	changed, err = d.firewall.set(cfg, network.OutsideLinks())
	if d.firewall.repaired > repaired {
		d.noted.note(slog.LevelWarn, "tables", "somebody changed conenatd's nftables tables; they are put back", 1, "table", cfg.Table)
	}
	return changed, err
}

// compare lets exactly the permissions stand that should. meddled says that somebody may
// have changed the elements of the map.
func (d *Daemon) compare(meddled bool) error {
	return d.comparer.Repair(meddled, d.firewall.tables != nil && d.firewall.tables.Owned())
}

// report notes what went wrong since the last report, and logs what is due.
func (d *Daemon) report() {
	s := d.engine.Model.Stats()
	for r := range cone.Reasons {
		n, reason := s.Refusals[r]-d.reported.Refusals[r], cone.Reason(r).String()
		if err := d.engine.TakeRefusal(cone.Reason(r)); err != nil {
			d.noted.note(slog.LevelWarn, "refused by the kernel: "+reason, "permissions refused", n, "reason", reason, "err", err)
		} else {
			d.noted.note(slog.LevelInfo, "refused: "+reason, "permissions refused", n, "reason", reason)
		}
	}
	d.noted.note(slog.LevelInfo, "conflicts", "permissions wait for another inside host", s.Conflicts-d.reported.Conflicts)
	d.reported = s
	e := d.events.Stats()
	d.noted.note(slog.LevelWarn, "overruns", "conntrack events were lost, the table was read again; a larger event_buffer helps",
		e.Overruns-d.reportedEvents.Overruns)
	d.noted.note(slog.LevelWarn, "malformed", "conntrack events could not be decoded", e.Malformed-d.reportedEvents.Malformed)
	d.reportedEvents = e
	d.noted.tell()
	d.failures.tell()
	d.warned.tell(d.now(), d.warnings())
}
