package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/budget"
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/mapping"
)

// flowsAtOnce is how many flows of a dump the loop handles in one piece.
const flowsAtOnce = 1024

// run repairs whatever the events missed: at the start, regularly, and after an
// overrun. It calls ready after the first success. Until then it retries soon, and gives
// up after firstTries failures.
func (r *reconciler) run(ctx context.Context, every time.Duration, ready func()) error {
	q := r.reads
	t := time.NewTicker(every)
	defer t.Stop()
	look := time.NewTicker(budget.PollEvery)
	defer look.Stop()
	var first firstReconcile
	second := time.NewTimer(betweenLooks) // for the second look at sockets
	defer second.Stop()
	for {
		var err error
		inLoop := r.budget.InLoop
		cost := budget.ThreadTime(func() { err = r.reconcileOnce(q) }) + r.budget.InLoop - inLoop
		if ctx.Err() != nil {
			return nil
		}
		ended := r.now()
		var hurried <-chan time.Time
		r.failures.Note(requestReconcile, 1, err)
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
			strays, moved := r.strays, r.moved
			if r.changed.ways { // these already wait for the budget
				strays = nil
			}
			if r.changed.links {
				moved = nil
			}
			select {
			case <-ctx.Done():
				return nil
			case <-soon:
				again = true
			case <-t.C:
				again = soon == nil
			case <-r.hurry:
				if soon == nil && hurried == nil {
					hurried = time.After(ended + budget.Rest(cost) - r.now())
				}
			case <-hurried:
				again = true
			case job := <-r.jobs:
				job(r)
			case look := <-r.looks:
				look(r)
			case <-second.C:
				if err := r.lookAgain(); ctx.Err() == nil {
					r.failures.Note(requestLookAtSockets, 1, err)
				}
			case <-look.C:
				r.poll(ctx, q)
			case <-moved:
				r.changed.links = true
				r.lookAround(ctx, q)
			case <-strays:
				r.changed.ways = true
				r.lookAround(ctx, q)
			}
		}
	}
}

// poll looks at what nothing tells of.
func (r *reconciler) poll(ctx context.Context, q *ctwatch.Queries) {
	if err := r.lookAtConntrack(); ctx.Err() == nil {
		r.failures.Note(requestLookAtConntrack, 1, err)
	}
	if err := r.lookForHelpers(); ctx.Err() == nil {
		r.failures.Note(requestLookForHelpers, 1, err)
	}
	r.lookAround(ctx, q)
	r.lookAtFlows(ctx)
	r.budget.Also(func() { r.lookForListeners(ctx) })
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
func (s *shared) watchLinks(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = s.links.Close() })()
	for {
		err := s.links.Wait()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case s.moved <- struct{}{}:
		default: // a look is already asked for
		}
	}
}

func (r *reconciler) reconcileOnce(q *ctwatch.Queries) error {
	var errs []error
	r.changed = changes{}
	if k, err := r.readConntrack(); err != nil {
		errs = append(errs, err)
	} else {
		r.size = k.Max
		r.ask(func(l *loop) { l.kernel = k })
	}
	if _, err := r.readGateway(); err != nil {
		errs = append(errs, err)
	}
	timeouts, err := readTimeouts()
	r.failures.Note(requestReadTimeouts, 1, err)
	r.ask(func(l *loop) { l.engine.Model.SetTimeouts(timeouts) })
	r.failures.Note(requestLookForHelpers, 1, r.lookForHelpers()) // before flows earn expectations
	if err := r.readFlows(q); err != nil {
		errs = append(errs, err)
	}
	if err := r.repairTableSize(); err != nil {
		errs = append(errs, err)
	}
	if err := r.compare(false); err != nil {
		errs = append(errs, err)
	}
	r.ask((*loop).report)
	return errors.Join(errs...)
}

// readGateway brings the model up to date about links, addresses, the user's
// forwards and the gateway's own sockets. It reports whether flows may have been
// misjudged because the model did not know this before.
func (r *reconciler) readGateway() (misjudged bool, err error) {
	var cfg config.Config
	if !r.ask(func(l *loop) { cfg = l.cfg }) {
		return false, errEnded
	}
	_, err = r.followFlows(cfg)
	r.failures.Note(requestFollowFlows, 1, err)
	r.firewall.look()
	network, err := r.readNetwork(cfg)
	if err != nil {
		return false, err
	}
	if r.forgetBackups(network) {
		network.Mark(r.uplinks.sides(cfg))
	}
	r.uplinks.remember(network)
	r.links.Know(network, slices.Concat(cfg.Outside, cfg.Inside), wantsMapping(cfg) || cfg.HealFlows)
	_, failed := r.repairRules(cfg, network)
	if failed == nil { // all links have their sets
		failed = r.firewall.moveMappings(cfg, network)
	}
	r.broken.SawNetwork(r.network, network)
	r.rerouted.shared = network.Shares()
	if !network.SameRoutes(r.network) {
		r.log.Debug("routes changed")
		r.rerouted.looks = rerouteLooks
		r.forgetStale()
	}
	r.rerouted.strands = r.rerouted.strands || !slices.Equal(network.Addrs, r.network.Addrs)
	r.forgetStaleByRules()
	failed = errors.Join(failed, r.readForwards(cfg, network), r.lookAtSockets(cfg, network))
	if !r.ask(func(l *loop) { r.firewall.passedBefore = l.engine.Model.PassedBySubnet() }) {
		return false, errEnded
	}
	failed = errors.Join(failed, r.readTables(cfg), r.redecide(cfg, network))
	topology := network.Topology().Compile()
	hear, had := r.hearSelf(cfg), r.firewall.known
	r.ask(func(l *loop) {
		misjudged = newOutside(l.network, network) || wantsMapping(cfg) && !topology.Equal(l.topology)
		r.network = network.Lean()
		l.network, l.shown, l.topology = r.network, nil, topology
		l.mayStrand = flows.NewSources(r.network, had).Another
		l.sockets.SetNetwork(network)
		misjudged = l.engine.Model.SetTopology(r.now(), topology) || misjudged
		l.engine.Model.SetLinkLookup(l.network.Way())
		if r.sure {
			l.engine.ReviewSockets()
		}
		l.warned.Tell(r.now(), l.warnings())
	})
	notes, err := r.firewall.forgetAddresses(cfg, network)
	for _, n := range notes {
		r.log.Info(n)
	}
	failed = errors.Join(failed, err, r.endRerouted(cfg, network), r.firewall.keepAlive(cfg))
	moved := hear() // for the old subnets, before follow enables others
	followed, err := r.follow(cfg, network)
	return moved || misjudged || followed, errors.Join(failed, err)
}

// readForwards brings the model up to date about what the user's rules forward, and the tables
// about what they do with the sources of packets and take from inside hosts.
func (r *reconciler) readForwards(cfg config.Config, network gateway.Network) error {
	covered, warnings := r.firewall.forwards(prefixes(cfg.Subnets), network)
	more, changed, err := r.firewall.sourceNAT(cfg, network)
	warnings = append(warnings, more...)
	diverts, publishes := r.firewall.divert(cfg, network), r.firewall.publish(network)
	if changed || diverts || publishes || r.firewall.helpersChanged(cfg) {
		_, failed := r.firewall.set(cfg, network.OutsideLinks())
		err = errors.Join(err, failed)
	}
	if changed {
		r.wantReconcile()
	}
	err = errors.Join(err, r.firewall.endDiverted(cfg)) // also those that an earlier daemon left
	r.ask(func(l *loop) {
		l.ruleWarnings, l.overtaken = warnings, r.firewall.overtaken
		l.warned.Tell(r.now(), l.warnings())
	})
	hidden, known := r.firewall.hidden, r.firewall.forwardsKnown
	if known != r.forwardsKnown || r.firewall.understood != r.unheard {
		err = errors.Join(err, r.filterEvents(cfg))
	}
	if covered != r.forwarded || hidden != r.hidden || known != r.forwardsKnown {
		r.forwarded, r.hidden, r.forwardsKnown = covered, hidden, known
		r.ask(func(l *loop) { l.engine.Model.BeginForwards(r.now(), leads(covered, hidden), known) })
		for at := 0; at >= 0; {
			if !r.ask(func(l *loop) { at = l.engine.Model.ReviewForwards(r.now(), at, flowsAtOnce) }) {
				return errEnded
			}
		}
	}
	taken := r.firewall.taken
	r.ask(func(l *loop) {
		l.engine.Model.EndInterim(r.now(), taken.Forwards)
	})
	return err
}

// readFlows shows the model all flows in the conntrack table.
func (r *reconciler) readFlows(q *ctwatch.Queries) error {
	var cfg config.Config
	r.ask(func(l *loop) { cfg = l.cfg })
	r.failures.Note(requestAssumeAddresses, 1, r.firewall.assumeAddresses(cfg, r.network))
	addrs := len(r.firewall.mappedAddrs)
	var before mapping.Applied
	r.ask(func(l *loop) { before = l.applied })
	m, err := r.firewall.newMapper(cfg, r.network, r.served, before)
	r.settled = r.settled && len(r.firewall.mappedAddrs) == addrs // else look for sockets on the new ones
	if err != nil {
		r.failures.Note(requestReadMappings, 1, err)
		m = nil
	}
	r.failures.Note(requestLookAtListeners, 1, r.hideNothing())
	stranded, failed := r.beginStranded(cfg, r.network)
	failed = errors.Join(failed, r.seeEnded())
	r.ask(func(l *loop) { l.engine.Model.BeginSnapshot(r.now()) })
	piece := make([]cone.Flow, 0, flowsAtOnce)
	age := beginDump(r.now())
	hand := func() {
		var err error
		piece, err = r.firewall.sure(piece)
		failed = errors.Join(failed, err)
		r.ask(func(l *loop) {
			failed = errors.Join(failed, l.adoptHeld(piece))
			now := r.now()
			late := age.ofPiece(now)
			for i := range piece {
				piece[i].Late = late
				l.engine.SnapshotFlow(now, &piece[i])
			}
		})
		piece = piece[:0]
		r.lookBetween()
	}
	err = q.Dump(func(f *cone.Flow) {
		if m != nil {
			m.See(f)
		}
		if stranded != nil {
			stranded.See(f)
		}
		if piece = append(piece, *f); len(piece) == flowsAtOnce {
			hand()
		}
	})
	hand()
	failed = errors.Join(failed, r.seeEnded()) // those that ended meanwhile
	if err = errors.Join(err, failed); err != nil {
		r.ask(func(l *loop) { l.engine.Model.AbortSnapshot() })
		return err
	}
	r.ask(func(l *loop) { l.engine.Model.EndSnapshot(r.now()) })
	r.firewall.dumped = true
	if m != nil {
		err = r.keep(m, q)
		r.ask(func(l *loop) {
			l.applied = m.Applied(l.tables.Mapping.Left + l.tables.Mapping.PoolUsedUp)
		})
	} else {
		r.ask(func(l *loop) { l.applied = mapping.Applied{} })
	}
	if stranded != nil { // mappings that would give flows the wrong address again have ended
		failed := r.endStranded(stranded, q)
		r.failures.Note(requestLookAtRoutes, 1, failed)
		r.rerouted.strands = failed != nil
	}
	return err
}

// A dumpAge tells how late what a dump shows is known: the process may be stopped while it
// reads. The kernel fills a message when the one before is read, so a piece was not filled before
// the one before it was begun.
type dumpAge struct{ before, begun time.Duration }

// beginDump is called before the dump is asked for.
func beginDump(now time.Duration) dumpAge { return dumpAge{before: now, begun: now} }

// ofPiece returns the greatest possible age of a piece that was read by now. The next one begins.
func (a *dumpAge) ofPiece(now time.Duration) time.Duration {
	late := lateness(now - a.before)
	a.before, a.begun = a.begun, now
	return late
}

// lookBetween runs a look that a status request waits for. Long parts of the reconcile call
// it, so that the request does not wait for their end.
func (r *reconciler) lookBetween() {
	select {
	case look := <-r.looks:
		look(r)
	default:
	}
}

// repairRules brings our tables to the desired state, and logs it if somebody had changed
// them.
func (r *reconciler) repairRules(cfg config.Config, network gateway.Network) (changed bool, err error) {
	r.firewall.setSides(network)
	repaired := r.firewall.repaired
	changed, err = r.firewall.set(cfg, network.OutsideLinks())
	if r.firewall.repaired > repaired {
		r.noted.Note(slog.LevelWarn, "tables", "somebody changed conenatd's nftables tables; they are repaired", 1, "table", cfg.Table)
	}
	return changed, err
}

// compare lets exactly the permissions stand that should. mapTouched says that somebody may
// have changed the elements of the map.
func (r *reconciler) compare(mapTouched bool) error {
	return r.comparer.Repair(mapTouched, r.firewall.tables != nil && r.firewall.tables.Owned())
}

// manyPermissions is from how many on the heap is collected more often. Permissions and flows
// hold no pointers, so a collection takes the same time however many there are.
const manyPermissions = 1 << 15

// keepSmall lets the heap of a daemon with many permissions grow by a quarter before it is
// collected, not by as much as it holds. The environment variable GOGC comes first.
func (l *loop) keepSmall(standing int) {
	if os.Getenv("GOGC") != "" {
		return
	}
	if many := standing >= manyPermissions; many != l.many {
		l.many = many
		debug.SetGCPercent(map[bool]int{false: 100, true: 25}[many])
	}
}

// report notes what went wrong since the last report, and logs what is due.
func (l *loop) report() {
	s := l.engine.Model.Stats()
	l.keepSmall(s.Standing)
	for r := range cone.Reasons {
		n, reason := s.Refusals[r]-l.reported.Refusals[r], cone.Reason(r).String()
		if err := l.engine.TakeRefusal(cone.Reason(r)); err != nil {
			l.noted.Note(slog.LevelWarn, "refused by the kernel: "+reason, "permissions refused", n, "reason", reason, "err", err)
		} else {
			l.noted.Note(slog.LevelInfo, "refused: "+reason, "permissions refused", n, "reason", reason)
		}
	}
	l.noted.Note(slog.LevelInfo, "conflicts", "permissions wait for another inside host", s.Conflicts-l.reported.Conflicts)
	l.reported = s
	e := l.events.Stats()
	l.noted.Note(slog.LevelWarn, "overruns", "conntrack events were lost, the table was read again; a larger event_buffer helps",
		e.Overruns-l.reportedEvents.Overruns)
	l.noted.Note(slog.LevelWarn, "malformed", "conntrack events could not be decoded", e.Malformed-l.reportedEvents.Malformed)
	l.reportedEvents = e
	l.noted.Tell()
	l.failures.Tell()
	l.warned.Tell(l.now(), l.warnings())
}
