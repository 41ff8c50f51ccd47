package daemon

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/conenatd/conenatd/internal/audit"
	"github.com/conenatd/conenatd/internal/budget"
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/episodes"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/handover"
	"github.com/conenatd/conenatd/internal/histogram"
	"github.com/conenatd/conenatd/internal/mapping"
	"github.com/conenatd/conenatd/internal/rules/elements"
	"github.com/conenatd/conenatd/internal/userrules"
	"github.com/conenatd/conenatd/internal/watch"
)

// Config is what New needs beyond the user's configuration.
type Config struct {
	config.Config
	Version string
	// Socket is the path of the control socket.
	Socket string
	// Reload reads the configuration again.
	Reload func() (config.Config, error)
	Log    *slog.Logger
	// Level is the level of Log; a reload sets it. It may be nil.
	Level *slog.LevelVar
}

// A Daemon runs once. Its state has owners: what the loop owns is reached only through the
// *loop that the loop passes to functions (do, ask), and what the reconcile owns only through
// the *reconciler. After New only Run and Close use both.
type Daemon struct {
	*shared
	loop      *loop
	reconcile *reconciler

	closers   []func() error
	site      site
	made      bool           // this daemon took over the tables of an earlier one, or made them
	leave     bool           // permissions and tables stay in the kernel when this daemon ends
	handsOver atomic.Bool    // the next end is that of an upgrade: see HandOver
	denied    []cone.Revoked // what the user revoked under an earlier daemon
}

// shared is what all goroutines of a Daemon use. It stays as New made it, or is safe for
// concurrent use.
type shared struct {
	given     Config // as New got it
	log       *slog.Logger
	start     time.Time
	conntrack handover.Sysctls
	events    *ctwatch.Watcher
	links     *gateway.Watcher
	failures  *episodes.Failures
	noted     *episodes.Log // of other abnormal conditions

	inbox  chan func(*loop)
	pings  chan chan struct{}     // of Alive
	hurry  chan struct{}          // a reconcile is wanted
	moved  chan struct{}          // links, addresses or routes changed
	strays chan struct{}          // translated flows left by links that are not outside links
	born   chan cone.Flow         // children that may have the wrong outside address
	jobs   chan func(*reconciler) // run by the reconcile when it is idle
	looks  chan func(*reconciler) // run by the reconcile, even in the middle of its work
	ended  chan struct{}          // closed when the loop ended

	ready   chan struct{} // closed after the first reconcile
	adopted chan struct{} // closed when all permissions of an earlier daemon are adopted

	watchers watch.Watchers
	auditor  *audit.Auditor

	reloads  atomic.Uint64 // number of reloads begun
	reloaded struct {
		sync.Mutex
		last uint64 // number of the latest reload that is done
		err  error  // its result
	}
}

// A reconciler is what the reconcile owns.
type reconciler struct {
	*shared
	firewall   *firewall
	reads      *ctwatch.Queries
	statistics *ctwatch.Poller
	ports      *gateway.Sockets

	wanted        config.Config      // as the user gave it; loop.cfg also has the subnets found by "auto"
	hosts         []netip.Addr       // inside hosts of the permissions adopted at the start
	size          int                // of the conntrack table; the limits of loop.cfg are for this size
	counts        ctwatch.Counts     // conntrack statistics, as last read
	space         space              // as last told to the model
	backends      backends           // in use
	network       gateway.Network    // as last read
	held          *gateway.PortSet   // sockets at the last look
	looked        time.Duration      // time of that look
	settled       bool               // the last two looks found the same sockets
	served        *gateway.PortSet   // ports held at both of the last two looks, or at the only one
	sure          bool               // there were two looks
	forwarded     *userrules.Covered // what the user's rules forward, as last told to the model
	hidden        *userrules.Covered // the part of which no packet reaches the map
	forwardsKnown bool               // forwarded is complete
	unheard       *userrules.Covered // forwards whose flows the event filter leaves out
	unheardServed []ctwatch.Range    // sockets of the gateway whose flows it leaves out
	budget        budget.Budget      // of CPU time for looks at changes by neighbours
	comparer      engine.Comparer
	changed       changes // by neighbours, still to be looked at
	lean          lean
	uplinks       uplinks // outside links that no default route shows
	broken        flows.Search
	rerouted      rerouted
}

// A loop is what the loop owns.
type loop struct {
	*shared
	queries *ctwatch.Queries
	sockets *gateway.Sockets
	engine  *engine.Engine

	features       features      // of our tables
	cfg            config.Config // in force
	backends       backends      // in use; the engine has the same ones
	rest           *elements.Map // to be adopted from, see leftSome; may be nil
	missing        string        // which backend is missing and why
	quiet          bool          // the kernel hides flows that can have no permission
	network        gateway.Network
	shown          []string             // links that flows show to be outside links, or may show, until network says so
	judged         map[string]struct{}  // links by which flows left that the reconcile judged
	topology       cone.Topology        // of network
	mayStrand      func(cone.Addr) bool // children with this outside address may have the wrong one
	ruleWarnings   warnings             // about the user's forwards
	unsureWarnings warnings             // about flows by another link than the way back
	portWarnings   warnings             // about port_pool
	overtaken      bool                 // a chain of the user's translates all mapped traffic before ours
	decisions      map[netip.Prefix]decision
	room           cone.Room         // for expectations
	entries        ctwatch.Table     // of conntrack, when room was computed
	late           time.Duration     // how long changes by neighbours wait
	look           time.Duration     // CPU time of one look at such changes
	tables         control.Tables    // as last read
	kernel         control.Conntrack // as last read
	latency        histogram.Histogram
	applied        mapping.Applied       // mappings, at the last reconcile
	brokenNow      []control.BrokenFlows // found by the last whole walk
	healed         uint64                // broken flows that the daemon ended
	warned         *episodes.Warner
	behind         bool
	many           bool            // see keepSmall
	catchingUp     []chan struct{} // who waits until the event socket was empty
	reported       cone.Stats
	reportedEvents ctwatch.Stats
}

// New opens everything that the daemon needs in the kernel, and fails if something is
// missing. It takes over what an earlier daemon left, and revokes permissions that the
// configuration no longer allows. The caller must call Run or Close.
func New(cfg Config) (d *Daemon, err error) {
	d = newDaemon(cfg)
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
			d = nil
		}
	}()
	if err := d.open(); err != nil {
		return d, err
	}
	adopted, err := d.takeOver()
	if err != nil {
		return d, err
	}
	d.begin(adopted)
	return d, nil
}

// newDaemon returns a Daemon that has opened nothing.
func newDaemon(cfg Config) *Daemon {
	all := &shared{
		given: cfg, log: cfg.Log, start: time.Now(),
		inbox:  make(chan func(*loop), 64),
		pings:  make(chan chan struct{}, 1),
		hurry:  make(chan struct{}, 1),
		moved:  make(chan struct{}, 1),
		strays: make(chan struct{}, 1),
		born:   make(chan cone.Flow, mostBorn),
		jobs:   make(chan func(*reconciler)),
		looks:  make(chan func(*reconciler)),
		ended:  make(chan struct{}),

		ready:   make(chan struct{}),
		adopted: make(chan struct{}),
	}
	l, r := &loop{shared: all, cfg: cfg.Config}, &reconciler{shared: all, wanted: cfg.Config}
	d := &Daemon{shared: all, loop: l, reconcile: r}
	r.rerouted.outside = make(map[string]bool)
	r.rerouted.stale = make(flows.Stale)
	r.rerouted.looks = rerouteLooks // routes may have changed since an earlier daemon ran
	r.comparer = engine.Comparer{
		InLoop:  func(f func(*engine.Engine)) bool { return r.ask(func(l *loop) { f(l.engine) }) },
		Between: r.lookBetween,
	}
	l.warned, d.noted = episodes.NewWarner(d.log), episodes.New(d.log, d.now, cfg.Reconcile)
	d.auditor = audit.NewAuditor(&d.watchers, d.noted, d.standing)
	d.failures = episodes.NewFailures(d.log, d.now, cfg.Reconcile)
	return d
}

// open opens what the daemon needs, the lock first, and reads what the first decisions need.
func (d *Daemon) open() error {
	l, r, cfg := d.loop, d.reconcile, d.given
	if err := enoughDescriptors(); err != nil {
		return err
	}
	lock, err := control.Acquire(cfg.Socket)
	if err != nil {
		return err
	}
	d.closes(lock.Close)
	if err := d.auditor.Open(cfg.AuditLog); err != nil {
		return err
	}
	d.closes(d.auditor.Discard)
	if d.site, err = openSite(&cfg.Config, d.log); err != nil {
		return err
	}
	d.closes(d.site.close)
	if d.conntrack, err = handover.Open(); err != nil {
		return err
	}
	d.closes(d.restoreSysctls)
	if r.firewall, err = openFirewall(cfg.Table); err != nil {
		return err
	}
	d.closes(d.closeFirewall)
	if r.firewall.zones, err = r.firewall.leftZones(); err != nil {
		return err
	}
	r.firewall.look()
	if r.network, err = r.firstNetwork(&l.cfg); err != nil {
		return err
	}
	return d.openSockets()
}

// openSockets opens the netlink sockets of the loop and the reconcile, and reads the conntrack table's
// size and the local sockets.
func (d *Daemon) openSockets() (err error) {
	l, r, cfg := d.loop, d.reconcile, d.given
	// Subscribe before the first dump, so that no flow is missed in between.
	if d.events, err = ctwatch.Dial(ctwatch.Config{ReadBuffer: cfg.EventBuffer}); err != nil {
		return err
	}
	d.closes(d.events.Close)
	if l.queries, err = ctwatch.DialQueries(ctwatch.Config{}); err != nil {
		return err
	}
	d.closes(l.queries.Close)
	if r.reads, err = ctwatch.DialQueries(ctwatch.Config{}); err != nil {
		return err
	}
	d.closes(r.reads.Close)
	r.seeFlowsBefore(l.cfg)
	statistics, err := ctwatch.DialStatistics(ctwatch.Config{})
	if err != nil {
		return err
	}
	r.statistics = ctwatch.NewPoller(statistics)
	d.closes(r.statistics.Close)
	if l.kernel, err = r.conntrackWithin(nil); err != nil { // nothing was read before
		return err
	}
	r.size = l.kernel.Max
	l.cfg = l.cfg.Sized(r.size)
	if l.sockets, err = gateway.DialSockets(0); err != nil {
		return err
	}
	d.closes(l.sockets.Close)
	if r.ports, err = gateway.DialSockets(0); err != nil {
		return err
	}
	d.closes(r.ports.Close)
	if d.links, err = gateway.Watch(0); err != nil {
		return err
	}
	d.closes(d.links.Close)
	l.sockets.SetNetwork(r.network)
	r.ports.SetNetwork(r.network)
	if r.held, err = r.ports.Ports(); err != nil {
		return err
	}
	r.served, r.looked = r.held, d.now()
	return nil
}

// takeOver opens the backends, and returns the permissions of an earlier daemon.
func (d *Daemon) takeOver() (adopted []expect.Adopted, err error) {
	l, r := d.loop, d.reconcile
	// The model must know the forwards before the first grant.
	if r.forwarded, err = l.firstRules(r.firewall, r.network, r.served, false); err != nil {
		return nil, err
	}
	r.hidden, r.forwardsKnown = r.firewall.hidden, r.firewall.forwardsKnown
	d.decide()
	d.closes(d.closeExpect)
	adopted, err = d.openBackends()
	if err != nil {
		return nil, err
	}
	d.decide() // again: the warnings depend on the backends in use
	// Only now is it known which of the user's chains are older than our own chain.
	l.ruleWarnings = slices.DeleteFunc(l.ruleWarnings, func(w control.Finding) bool { return w.ID == warnRivalChain })
	l.ruleWarnings = append(l.ruleWarnings, r.firewall.rivals(l.cfg, r.network)...)
	l.overtaken = r.firewall.overtaken
	if err := d.goOnServing(adopted); err != nil {
		return nil, err
	}
	if err := r.filterEvents(l.cfg); err != nil {
		return nil, err
	}
	return adopted, nil
}

// begin makes the model, shows it what open found, and adopts what an earlier daemon left.
func (d *Daemon) begin(adopted []expect.Adopted) {
	l, r, cfg := d.loop, d.reconcile, d.given
	// Turn on accounting last, when nothing can fail any more: Close restores it only if
	// there is a model. The reconcile does not repeat this, so the user can turn it off.
	_, _, err := d.conntrack.Raise(handover.Acct)
	d.failures.Note(requestTurnOnAccounting, 1, err)
	l.useBackends(r.backends) // the policy depends on them, and on the features
	l.features = r.firewall.features
	l.newEngine(cone.New(l.policy(l.cfg)), r.served)
	d.auditor.Use(cfg.AuditPeers)
	l.engine.Model.Observe(d.observe)
	l.engine.Model.AdoptZones(r.firewall.zones)
	l.topology = r.network.Topology().Compile()
	r.uplinks.remember(r.network)
	r.network = r.network.Lean()
	l.network = r.network
	l.engine.Model.SetTopology(0, l.topology)
	l.engine.Model.SetLinkLookup(l.network.Way())
	l.engine.Model.SetForwards(0, leads(r.forwarded, r.hidden), r.forwardsKnown)
	l.engine.Model.Revoked(0, d.denied)
	if r.backends.expect != nil {
		l.setRoom(r.space)
	}
	l.engine.Model.SetAdopting(l.rest != nil)
	for _, a := range adopted {
		now := d.now()
		l.engine.Model.Adopt(now, a.Permission, a.By, now+a.Left)
	}
	l.engine.Apply(0) // revokes what the configuration does not allow
	d.failures.Note(requestNoteRevoked, 1, d.conntrack.Notes.WriteRevoked(nil))
	d.failures.Note(requestNoteUnsure, 1, d.conntrack.Notes.WriteUnsure(nil, nil))
}

// decide says what carries the permissions of each subnet, before the loop runs.
func (d *Daemon) decide() {
	l, r := d.loop, d.reconcile
	l.decisions = r.firewall.decide(l.cfg, r.network)
	r.firewall.decisions = l.decisions
}

// goOnServing lets "auto" enable the subnets of hosts with adopted permissions, even while
// there is no outside link. It ignores permissions of the gateway's own addresses, which may
// be on an uplink.
func (d *Daemon) goOnServing(adopted []expect.Adopted) (err error) {
	l, r := d.loop, d.reconcile
	hosts := make(map[netip.Addr]struct{})
	for _, a := range adopted {
		hosts[a.Int.Addr.Netip()] = struct{}{}
	}
	for _, a := range r.network.Addrs {
		delete(hosts, a.Prefix.Addr())
	}
	if !r.wanted.AutoSubnets || len(hosts) == 0 {
		return nil
	}
	r.hosts = slices.Collect(maps.Keys(hosts))
	if l.cfg.Subnets, err = r.firewall.subnets(r.wanted, r.network, nil, r.hosts); err != nil {
		return err
	}
	d.decide()
	_, err = r.firewall.set(l.cfg, r.network.OutsideLinks())
	return err
}

// filterings translates the configuration's kinds of filtering into the model's.
var filterings = map[config.Filtering]cone.Filtering{
	config.EndpointIndependent:     cone.EndpointIndependent,
	config.AddressAndPortDependent: cone.AddressAndPortDependent,
}

// Run runs the daemon until ctx ends, then removes everything it made from the kernel,
// unless on_stop is "keep" or HandOver was called. It calls ready once existing flows have
// their permissions. If it fails before ctx ends, permissions stay for the next daemon, as
// after a crash.
func (d *Daemon) Run(ctx context.Context, ready func()) error {
	l, r := d.loop, d.reconcile
	stop := ctx
	ln, err := control.Listen(d.given.Socket)
	if err != nil {
		return errors.Join(err, d.Close())
	}
	d.greet()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return control.Serve(ctx, ln, source{d.shared}, d.log) })
	g.Go(func() error { return d.site.serve(ctx, d.shared) })
	every := l.cfg.Reconcile // a reload writes l.cfg
	g.Go(func() error {
		return r.run(ctx, every, func() {
			close(d.ready)
			ready()
		})
	})
	rest := l.rest
	g.Go(func() error { return d.adoptRest(ctx, rest) })
	g.Go(func() error { return d.watchLinks(ctx) })
	g.Go(func() error { return l.run(ctx) })
	err = g.Wait()

	failed := err != nil && stop.Err() == nil
	if failed {
		d.log.Error("conenatd ends because of an error; permissions stay for the next one", "err", err)
	}
	keep := failed || d.handsOver.Load() || l.cfg.OnStop == config.OnStopKeep
	d.leave = keep && l.holds()
	if !d.leave || l.backends.revoked == nil { // no set in the kernel tells the next daemon
		d.failures.Note(requestNoteRevoked, 1, d.conntrack.Notes.WriteRevoked(l.engine.Model.AllRevoked(d.now())))
	}
	if !d.leave {
		d.failures.Note(requestNoteUnsure, 1, d.noteUnsure())
		err = errors.Join(err, d.revokeAll())
	}
	return errors.Join(err, d.Close())
}

// greet logs what a newcomer has to know: which subnets are enabled, what carries their
// permissions and whether the firewall lets it work, and where to look next; then what is wrong.
// Scripts wait for the words of the first message.
func (d *Daemon) greet() {
	l, r := d.loop, d.reconcile
	d.log.Info("conenatd runs", "version", d.given.Version, "subnets", prefixes(l.cfg.Subnets),
		"outside", r.network.OutsideLinks(), "backend", r.backends.String(), "helper", l.helper(false),
		"lifetime", l.cfg.Lifetime, "most_permissions", l.limit())
	l.tellCarriers(d.log, l.cfg.Subnets)
	d.log.Info("'conenatd status' says whether it works, 'conenatd list' who may send to whom, 'conenatd doctor' how to repair what is wrong")
	if left := r.network.PassedOver(); l.cfg.AutoSubnets && len(left) > 0 {
		d.log.Info("subnet auto leaves out networks: name what you want to serve", "networks", left)
	}
	if left := r.network.Candidates(gateway.IPv6, nil, nil); l.cfg.AutoSubnets && !l.cfg.AutoRouted && len(left) > 0 {
		d.log.Info("subnet auto leaves out IPv6: set routed = true beside it to serve these networks", "networks", left)
	}
	l.warned.Tell(d.now(), l.warnings())
}
