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

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
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

// A Daemon runs once.
type Daemon struct {
	cfg   Config
	log   *slog.Logger
	start time.Time

	lock       *control.Lock
	conntrack  sysctls
	events     *ctwatch.Watcher
	queries    *ctwatch.Queries    // of the loop
	reads      *ctwatch.Queries    // of the reconcile
	statistics *ctwatch.Statistics // of the reconcile
	sockets    *gateway.Sockets    // of the loop
	ports      *gateway.Sockets    // of the reconcile
	links      *gateway.Watcher
	firewall   *firewall // of the reconcile
	made       bool      // this daemon took over the tables of an earlier one, or made them
	leave      bool      // permissions and tables stay in the kernel when this daemon ends
	failures   *failures
	noted      *episodes // of other abnormal conditions

	// The reconcile's own.
	wanted    config.Config      // as the user gave it; d.cfg also has the subnets found by "auto"
	hosts     []netip.Addr       // inside hosts of the permissions adopted at the start
	size      int                // of the conntrack table; the limits of d.cfg are for this size
	counts    ctwatch.Counts     // conntrack statistics, as last read
	space     space              // as last told to the model
	held      *gateway.PortSet   // sockets at the last look
	looked    time.Duration      // time of that look
	settled   bool               // the last two looks found the same sockets
	forwarded *userrules.Covered // what the user's rules forward, as last told to the model
	whole     bool               // forwarded is complete
	unheard   *userrules.Covered // forwards whose flows the event filter leaves out
	budget    budget             // of CPU time for looks at changes by neighbours
	comparer  engine.Comparer
	changed   changes // by neighbours, still to be looked at
	uplinks   uplinks // outside links that no default route shows
	broken    brokenFlows
	rerouted  struct { // routes changed: flows may leave by other links now
		looks   int             // looks still to come
		next    time.Duration   // earliest time of the next look
		outside map[string]bool // current and former outside links
	}

	// The loop's own.
	backends       backends
	missing        string     // which backend is missing and why
	denied         []cone.Key // what the user revoked under an earlier daemon
	engine         *engine.Engine
	network        gateway.Network
	topology       cone.Topology      // of network
	ruleWarnings   warnings           // about the user's forwards
	hidden         *userrules.Covered // forwarded by the user's rules: no packet reaches the map
	portWarnings   warnings           // about port_pool
	overtaken      bool               // a chain of the user's translates all mapped traffic before ours
	decisions      map[netip.Prefix]decision
	room           cone.Room         // for expectations
	entries        ctwatch.Table     // of conntrack, when room was computed
	late           time.Duration     // how long changes by neighbours wait
	look           time.Duration     // CPU time of one look at such changes
	tables         control.Tables    // as last read
	kernel         control.Conntrack // as last read
	served         *gateway.PortSet  // ports held at both of the last two looks, or at the only one
	sure           bool              // there were two looks
	latency        histogram
	applied        applied               // mappings, at the last reconcile
	brokenNow      []control.BrokenFlows // found by the last whole walk
	healed         uint64                // broken flows that the daemon ended
	warned         *warner
	behind         bool
	reported       cone.Stats
	reportedEvents ctwatch.Stats

	inbox    chan func()
	pings    chan chan struct{} // of Alive
	hurry    chan struct{}      // a reconcile is wanted
	moved    chan struct{}      // links, addresses or routes changed
	strays   chan struct{}      // translated flows left by links that are not outside links
	jobs     chan func()        // run by the reconcile when it is idle
	looks    chan func()        // run by the reconcile, even in the middle of its work
	reloads  atomic.Uint64      // number of reloads begun
	reloaded struct {
		sync.Mutex
		last uint64 // number of the latest reload that is done
		err  error  // its result
	}
	ended chan struct{} // closed when the loop ended
}

// New opens everything that the daemon needs in the kernel, and fails if something is
// missing. It takes over what an earlier daemon left, and revokes permissions that the
// configuration no longer allows. The caller must call Run or Close.
func New(cfg Config) (d *Daemon, err error) {
	d = &Daemon{
		cfg: cfg, log: cfg.Log,
		start:  time.Now(),
		inbox:  make(chan func(), 64),
		pings:  make(chan chan struct{}, 1),
		hurry:  make(chan struct{}, 1),
		moved:  make(chan struct{}, 1),
		strays: make(chan struct{}, 1),
		jobs:   make(chan func()),
		looks:  make(chan func()),
		ended:  make(chan struct{}),
	}
	d.rerouted.outside = make(map[string]bool)
	d.comparer = engine.Comparer{
		InLoop:  func(f func(*engine.Engine)) bool { return d.ask(func() { f(d.engine) }) },
		Between: d.lookBetween,
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
			d = nil
		}
	}()
	d.warned, d.noted = newWarner(d.log), newEpisodes(d.log, d.now, cfg.Reconcile)
	d.failures = newFailures(d.log, d.now, cfg.Reconcile)

	if d.lock, err = control.Acquire(cfg.Socket); err != nil {
		return d, err
	}
	if d.conntrack, err = openSysctls(); err != nil {
		return d, err
	}
	d.wanted = cfg.Config
	if d.firewall, err = openFirewall(cfg.Table); err != nil {
		return d, err
	}
	if d.firewall.zones, err = d.firewall.leftZones(); err != nil {
		return d, err
	}
	d.firewall.look()
	if d.network, err = d.readNetwork(cfg.Config); err != nil {
		return d, err
	}
	if d.cfg.Subnets, err = d.firewall.subnets(cfg.Config, d.network, nil, nil); err != nil {
		return d, err
	}
	if len(d.cfg.Subnets) > len(cfg.Subnets) { // links to the added subnets lead inside
		if d.network, err = d.readNetwork(d.cfg.Config); err != nil {
			return d, err
		}
	}
	// Subscribe before the first dump, so that no flow is missed in between.
	d.events, err = ctwatch.Dial(ctwatch.Config{ReadBuffer: cfg.EventBuffer})
	if err != nil {
		return d, err
	}
	if d.queries, err = ctwatch.DialQueries(ctwatch.Config{}); err != nil {
		return d, err
	}
	if d.reads, err = ctwatch.DialQueries(ctwatch.Config{}); err != nil {
		return d, err
	}
	d.seeFlowsBefore()
	if d.statistics, err = ctwatch.DialStatistics(ctwatch.Config{}); err != nil {
		return d, err
	}
	if d.kernel, err = d.readConntrack(); err != nil {
		return d, err
	}
	d.size = d.kernel.Max
	d.cfg.Config = d.cfg.Sized(d.size)
	if d.sockets, err = gateway.DialSockets(0); err != nil {
		return d, err
	}
	if d.ports, err = gateway.DialSockets(0); err != nil {
		return d, err
	}
	if d.links, err = gateway.Watch(0); err != nil {
		return d, err
	}
	d.sockets.SetNetwork(d.network)
	d.ports.SetNetwork(d.network)
	if d.held, err = d.ports.Ports(); err != nil {
		return d, err
	}
	d.served, d.looked = d.held, d.now()
	d.firewall.setSides(d.network)
	// The model must know the forwards before the first grant.
	d.forwarded, d.ruleWarnings = d.firewall.forwards(d.network)
	d.whole = d.firewall.whole
	more, _, _ := d.firewall.sourceNAT(d.cfg.Config, d.network) // the first reconcile tries again
	d.ruleWarnings, d.hidden = slices.Concat(d.ruleWarnings, more), d.firewall.hidden
	d.firewall.ports, d.portWarnings, err = d.firewall.choosePorts(d.cfg.Config, d.network, d.served, false, d.firewall.understood.Covers)
	if err != nil {
		return d, err
	}
	d.decide()
	adopted, err := d.openBackends()
	if err != nil {
		return d, err
	}
	d.decide() // again: the warnings depend on the backends in use
	// Only now is it known which of the user's chains are older than our own chain.
	d.ruleWarnings = slices.DeleteFunc(d.ruleWarnings, func(w warning) bool { return w.id == warnRivalChain })
	d.ruleWarnings = append(d.ruleWarnings, d.firewall.rivals(d.cfg.Config, d.network)...)
	d.overtaken = d.firewall.overtaken
	if err := d.goOnServing(adopted); err != nil {
		return d, err
	}
	if err := d.filterEvents(d.cfg.Config); err != nil {
		return d, err
	}
	// Turn on accounting last, when nothing can fail any more: Close restores it only if
	// there is a model. The reconcile does not repeat this, so the user can turn it off.
	_, _, err = d.conntrack.raise(acct)
	d.failures.note(requestTurnOnAccounting, 1, err)
	d.newEngine(cone.New(d.policy(d.cfg.Config)))
	d.engine.Model.AdoptZones(d.firewall.zones)
	d.topology = d.network.Topology().Compile()
	d.uplinks.remember(d.network)
	d.network = d.network.Lean()
	d.engine.Model.SetTopology(0, d.topology)
	d.engine.Model.SetWay(d.network.Way())
	d.engine.Model.SetForwards(0, d.forwarded.Bars, d.whole)
	d.engine.Model.Revoked(0, d.denied)
	if d.backends.expect != nil {
		d.setRoom(d.space)
	}
	for _, a := range adopted {
		now := d.now()
		d.engine.Model.Adopt(now, a.Permission, a.By, now+a.Left)
	}
	d.engine.Apply(0) // revokes what the configuration does not allow
	return d, nil
}

// decide says what carries the permissions of each subnet, before the loop runs.
func (d *Daemon) decide() {
	d.decisions = d.firewall.decide(d.cfg.Config, d.network)
	d.firewall.decisions = d.decisions
}

// goOnServing lets "auto" enable the subnets of hosts with adopted permissions, even while
// there is no outside link. It ignores permissions of the gateway's own addresses, which may
// be on an uplink.
func (d *Daemon) goOnServing(adopted []expect.Adopted) (err error) {
	hosts := make(map[netip.Addr]struct{})
	for _, a := range adopted {
		hosts[a.Int.Addr.Netip()] = struct{}{}
	}
	for _, a := range d.network.Addrs {
		delete(hosts, a.Prefix.Addr())
	}
	if !d.wanted.AutoSubnets || len(hosts) == 0 {
		return nil
	}
	d.hosts = slices.Collect(maps.Keys(hosts))
	if d.cfg.Subnets, err = d.firewall.subnets(d.wanted, d.network, nil, d.hosts); err != nil {
		return err
	}
	d.decide()
	_, err = d.firewall.set(d.cfg.Config, d.network.OutsideLinks())
	return err
}

// anyIPv6 reports whether a subnet is IPv6, or a named link may get an IPv6 subnet.
func anyIPv6(cfg config.Config) bool {
	return slices.ContainsFunc(cfg.Subnets, func(s config.Subnet) bool { return s.Prefix.Addr().Is6() }) ||
		slices.ContainsFunc(cfg.LinkSubnets, func(l config.LinkSubnet) bool { return l.Like.Routed })
}

// policy returns the policy of a configuration, with the backends in use.
func (d *Daemon) policy(cfg config.Config) cone.Policy {
	p := cone.Policy{
		Expected: d.backends.expect != nil && wantsExpect(cfg),
		Mapped:   d.backends.nft != nil && wantsMap(cfg),
		Labels:   d.firewall.labels(),
		Learned:  wantsMap(cfg) && d.firewall.learns(cfg),
		Limits: cone.Limits{
			Total: cfg.MaxPermissions, PerSubnet: cfg.MaxPermissionsPerSubnet,
			PerHost: cfg.MaxPermissionsPerHost, Children: cfg.MaxChildren,
		},
		Lifetime:         cfg.Lifetime,
		Retry:            cfg.Reconcile,
		PeerGroups:       cfg.PeerGroups,
		ExcludePeers:     cfg.ExcludePeers,
		ExcludePeerPorts: cfg.ExcludePeerPorts,
		ExcludePorts:     cfg.ExcludePorts,
	}
	p.Self4, p.Self6 = d.self(cfg)
	for _, s := range cfg.Subnets {
		p.Subnets = append(p.Subnets, cone.Subnet{
			Prefix: s.Prefix, Routed: s.Routed, Filtering: filterings[s.Filtering], Choice: d.decisions[s.Prefix].Choice,
			Mapping: s.Mapping == config.EndpointIndependentMapping && d.firewall.maps(),
		})
	}
	return p
}

// filterEvents leaves out the events of flows that the daemon does not need. Where the guard
// stands, early packets from outside make no flows except to local sockets; the next
// reconcile finds a flow that outlives its socket. Flows that the user's forwards lead inside
// do not matter if all his rules are known. All events pass without the guard, and with a
// VRF, whose links the guard does not know.
func (d *Daemon) filterEvents(cfg config.Config) error {
	d.unheard = d.firewall.hidden
	inVRF := slices.ContainsFunc(d.network.Links, func(l gateway.Link) bool { return l.Kind == "vrf" })
	if !cfg.Guard || d.firewall.tables == nil || d.firewall.tables.Lacks(rules.FeatureGuard) || inVRF {
		return d.events.SetSources(ctwatch.Sources{})
	}
	s := ctwatch.Sources{Prefixes: slices.Concat(prefixes(cfg.Subnets), d.ownAddresses(cfg)), Labelled: d.firewall.labels() && d.firewall.whole}
	for a, p := range d.firewall.hidden.Ranges() {
		if a.First.Is4() {
			s.Forwarded = append(s.Forwarded, ctwatch.Range{FirstAddr: a.First, LastAddr: a.Last, FirstPort: p.First, LastPort: p.Last})
		}
	}
	return d.events.SetSources(s)
}

// filterings translates the configuration's kinds of filtering into the model's.
var filterings = map[config.Filtering]cone.Filtering{
	config.EndpointIndependent:     cone.EndpointIndependent,
	config.AddressAndPortDependent: cone.AddressAndPortDependent,
}

// Close closes what New opened, and removes our tables unless permissions are to stay. Run
// calls it; call it for a Daemon that did not Run.
func (d *Daemon) Close() error {
	var errs []error
	if d.events != nil {
		errs = append(errs, d.events.Close())
	}
	if d.queries != nil {
		errs = append(errs, d.queries.Close())
	}
	if d.reads != nil {
		errs = append(errs, d.reads.Close())
	}
	if d.statistics != nil {
		errs = append(errs, d.statistics.Close())
	}
	if d.sockets != nil {
		errs = append(errs, d.sockets.Close())
	}
	if d.ports != nil {
		errs = append(errs, d.ports.Close())
	}
	if d.links != nil {
		errs = append(errs, d.links.Close())
	}
	leave := d.leave
	if e := d.backends.expect; e != nil {
		leave = leave || e.Standing() > 0 // some expectations could not be revoked
		errs = append(errs, e.Close())
	}
	if d.firewall != nil {
		if d.made && !leave {
			errs = append(errs, d.firewall.remove())
		}
		errs = append(errs, d.firewall.close())
	}
	if d.engine != nil && !leave { // permissions that stay need the settings
		errs = append(errs, d.conntrack.restoreAll())
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	return errors.Join(errs...)
}

// Run runs the daemon until ctx ends, then removes everything it made from the kernel,
// unless on_stop is "keep". It calls ready once existing flows have their permissions. If it
// fails before ctx ends, permissions stay for the next daemon, as after a crash.
func (d *Daemon) Run(ctx context.Context, ready func()) error {
	stop := ctx
	ln, err := control.Listen(d.cfg.Socket)
	if err != nil {
		return errors.Join(err, d.Close())
	}
	d.greet()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return control.Serve(ctx, ln, source{d}, d.log) })
	every := d.cfg.Reconcile // a reload writes d.cfg
	g.Go(func() error { return d.reconcile(ctx, every, ready) })
	g.Go(func() error { return d.watchLinks(ctx) })
	g.Go(func() error { return d.loop(ctx) })
	err = g.Wait()

	failed := err != nil && stop.Err() == nil
	if failed {
		d.log.Error("conenatd ends because of an error; permissions stay for the next one", "err", err)
	}
	if d.leave = (failed || d.cfg.OnStop == config.OnStopKeep) && d.holds(); !d.leave {
		err = errors.Join(err, d.revokeAll())
	}
	return errors.Join(err, d.Close())
}

// holds reports whether the kernel holds something for the next daemon: standing
// permissions, or the user's revocations.
func (d *Daemon) holds() bool {
	return d.engine.Model.Stats().Standing > 0 || d.backends.revoked != nil && d.backends.revoked.Any()
}

// revokeAll removes every permission from the kernel. It removes the whole map first,
// so that the kernel learns nothing meanwhile.
func (d *Daemon) revokeAll() error {
	var errs []error
	if d.backends.nft != nil {
		errs = append(errs, d.firewall.remove())
		d.backends.nft = nil
		d.useBackends()
	}
	d.engine.Model.RevokeAll()
	d.engine.Apply(0)
	// Also delete children that came too late for their events to be read.
	_, err := dropUnanswered()
	return errors.Join(append(errs, err)...)
}

func (d *Daemon) greet() {
	d.log.Info("conenatd runs", "version", d.cfg.Version, "subnets", prefixes(d.cfg.Subnets),
		"outside", d.network.OutsideLinks(), "backend", d.backends.String(), "helper", d.helper(false),
		"lifetime", d.cfg.Lifetime, "most_permissions", d.limit())
	d.warned.tell(d.now(), d.warnings())
}
