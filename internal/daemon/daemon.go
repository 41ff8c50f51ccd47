package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/gateway"
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
	// Level is what Log listens to; a reload sets it. It may be nil.
	Level *slog.LevelVar
}

// A Daemon runs once.
type Daemon struct {
	cfg   Config
	log   *slog.Logger
	start time.Time

	lock     *control.Lock
	events   *ctwatch.Watcher
	queries  *ctwatch.Queries // of the loop
	sockets  *gateway.Sockets // of the loop
	ports    *gateway.Sockets // of the reconcile
	links    *gateway.Watcher
	backend  Backend
	firewall *firewall // of the reconcile
	helper4  string
	helper6  string

	// The loop's own.
	model             *cone.Model
	network           gateway.Network
	ruleWarnings      []string         // about the user's forwards
	guard             control.Guard    // as last read
	served            *gateway.PortSet // at the last reconcile
	latency           histogram
	repaired          uint64
	behind            bool
	perms             []cone.Permission
	bad               []bool
	onLost            func(i int)
	onRefused         func(i int, r cone.Reason, err error)
	refusal           [cone.Reasons]error // first kernel error since the last report
	reported          cone.Stats
	reportedEvents    ctwatch.Stats
	reportedMalformed time.Duration

	inbox     chan func()
	hurry     chan struct{} // a reconcile is wanted
	moved     chan struct{} // links, addresses or routes changed
	reloading sync.Mutex
	ended     chan struct{} // closed when the loop ended
}

// New opens everything that the daemon needs in the kernel, and fails if
// something is missing. Nothing is granted yet. The caller must Run or Close.
func New(cfg Config) (d *Daemon, err error) {
	d = &Daemon{
		cfg: cfg, log: cfg.Log,
		start: time.Now(),
		inbox: make(chan func(), 64),
		hurry: make(chan struct{}, 1),
		moved: make(chan struct{}, 1),
		ended: make(chan struct{}),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
			d = nil
		}
	}()
	d.onRefused = func(i int, r cone.Reason, err error) {
		d.bad[i] = true
		d.refused(d.perms[i], r, err)
	}
	d.onLost = func(i int) { d.onLostPermission(d.perms[i]) }

	if d.lock, err = control.Acquire(); err != nil {
		return d, err
	}
	if d.network, err = gateway.ReadNetwork(0, cfg.Outside); err != nil {
		return d, err
	}
	d.cfg.Subnets = subnets(cfg.Config, d.network.Candidates())
	if len(d.cfg.Subnets) == 0 {
		return d, errors.New("no subnet is enabled and none looks like an inside network: name one with --subnet")
	}
	if err = outsideOwn(d.cfg.Subnets, d.network); err != nil {
		return d, err
	}
	// Subscribed before the first dump, so that no flow is missed in between.
	d.events, err = ctwatch.Dial(ctwatch.Config{ReadBuffer: cfg.EventBuffer})
	if err != nil {
		return d, err
	}
	if d.queries, err = ctwatch.DialQueries(ctwatch.Config{}); err != nil {
		return d, err
	}
	if d.sockets, err = gateway.DialSockets(0); err != nil {
		return d, err
	}
	if d.ports, err = gateway.DialSockets(0); err != nil {
		return d, err
	}
	if d.links, err = gateway.Watch(0); err != nil {
		return d, err
	}
	if d.served, err = d.ports.Ports(); err != nil {
		return d, err
	}
	if d.firewall, err = openFirewall(cfg.Table); err != nil {
		return d, err
	}
	b, err := expect.Open(expect.Config{Lifetime: cfg.Lifetime, IPv6: anyIPv6(d.cfg.Subnets)})
	if err != nil {
		return d, err
	}
	d.backend = b
	table, err := settings(cfg.Socket).raise()
	if err != nil {
		return d, err
	}
	b.SetTableSize(table)
	d.helper4, d.helper6 = b.Helpers()

	d.model = cone.New(policy(d.cfg.Config))
	d.model.SetTopology(0, d.network.Topology())
	// Known before the first grant.
	if err := d.firewall.set(d.cfg.Config, d.network.OutsideLinks()); err != nil {
		return d, err
	}
	forwarded, warnings, err := d.firewall.forwards(d.network)
	if err != nil {
		return d, err
	}
	d.ruleWarnings = warnings
	d.model.SetForwards(0, forwarded)
	for _, a := range b.Adopted() {
		now := d.now()
		d.model.Adopt(now, a.Permission, now+a.Left)
	}
	return d, nil
}

// subnets returns the enabled subnets, the candidates among them if these are
// asked for and do not overlap what is named.
func subnets(cfg config.Config, candidates []netip.Prefix) []config.Subnet {
	enabled := slices.Clone(cfg.Subnets)
	if !cfg.AutoSubnets {
		return enabled
	}
	for _, c := range candidates {
		free := true
		for _, s := range cfg.Subnets {
			free = free && !s.Prefix.Overlaps(c)
		}
		if free {
			enabled = append(enabled, config.Subnet{Prefix: c})
		}
	}
	return enabled
}

// outsideOwn returns an error for each subnet that holds an outside link's own
// network, whose hosts are peers. One within a wide outside network is fine.
func outsideOwn(subnets []config.Subnet, network gateway.Network) error {
	var errs []error
	for _, l := range network.Links {
		for _, a := range network.Addrs {
			for _, s := range subnets {
				if l.Outside && a.Link == l.Index && s.Prefix.Bits() <= a.Prefix.Bits() && s.Prefix.Overlaps(a.Prefix) {
					errs = append(errs, fmt.Errorf("subnet %v: it holds the network of the outside link %s (%v), "+
						"whose hosts are peers; name an inside network", s.Prefix, l.Name, a.Prefix))
				}
			}
		}
	}
	return errors.Join(errs...)
}

func anyIPv6(subnets []config.Subnet) bool {
	for _, s := range subnets {
		if s.Prefix.Addr().Is6() {
			return true
		}
	}
	return false
}

func policy(cfg config.Config) cone.Policy {
	p := cone.Policy{
		Limits: cone.Limits{
			Total: cfg.MaxPermissions, PerSubnet: cfg.MaxPermissionsPerSubnet,
			PerHost: cfg.MaxPermissionsPerHost, Children: cfg.MaxChildren,
		},
		Lifetime:         cfg.Lifetime,
		Retry:            cfg.Reconcile,
		ExcludePeers:     cfg.ExcludePeers,
		ExcludePeerPorts: cfg.ExcludePeerPorts,
		ExcludePorts:     cfg.ExcludePorts,
	}
	for _, s := range cfg.Subnets {
		p.Subnets = append(p.Subnets, cone.Subnet(s))
	}
	return p
}

// Close lets go of the kernel. It is for a Daemon that did not Run.
func (d *Daemon) Close() error {
	var errs []error
	if d.events != nil {
		errs = append(errs, d.events.Close())
	}
	if d.queries != nil {
		errs = append(errs, d.queries.Close())
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
	left := false
	if d.backend != nil {
		left = d.backend.Standing() > 0
		errs = append(errs, d.backend.Close())
	}
	if d.firewall != nil {
		errs = append(errs, d.firewall.close(left))
	}
	if d.model != nil && !left { // else the room is still needed
		errs = append(errs, settings(d.cfg.Socket).restore())
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	return errors.Join(errs...)
}

// Run works until ctx ends, then takes everything it made out of the kernel. It
// calls ready when the flows that were there before have their permissions.
func (d *Daemon) Run(ctx context.Context, ready func()) error {
	ln, err := control.Listen(d.cfg.Socket)
	if err != nil {
		return errors.Join(err, d.Close())
	}
	d.greet()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return control.Serve(ctx, ln, source{d}) })
	every := d.cfg.Reconcile // a reload writes d.cfg
	g.Go(func() error { return d.reconcile(ctx, every, ready) })
	g.Go(func() error { return d.watchLinks(ctx) })
	g.Go(func() error { return d.loop(ctx) })
	err = g.Wait()

	if d.cfg.OnStop == config.OnStopRevoke {
		d.model.RevokeAll()
		d.apply(0)
		// Children of the last moment, whose events were not read any more.
		_, late := dropUnanswered()
		err = errors.Join(err, late)
	}
	return errors.Join(err, d.Close())
}

func (d *Daemon) greet() {
	d.log.Info("conenatd runs", "version", d.cfg.Version, "subnets", prefixes(d.cfg.Subnets),
		"outside", d.network.OutsideLinks(), "helper", d.helper4, "lifetime", d.cfg.Lifetime,
		"most_permissions", d.backend.Max())
	for _, w := range d.warnings() {
		d.log.Warn(w)
	}
}

// warnings says what a user should know about his gateway.
func (d *Daemon) warnings() []string {
	out := slices.Concat(d.firewall.warnings, d.ruleWarnings)
	if n, err := settings(d.cfg.Socket).read(events); err == nil && n == 0 {
		out = append(out, "the kernel sends no conntrack events: permissions come late, at each reconcile; set net.netfilter.nf_conntrack_events = 2")
	}
	if len(d.network.OutsideLinks()) == 0 {
		out = append(out, `no outside link: none has a default route; name one with --outside`)
	}
	for _, s := range d.cfg.Subnets {
		if s.Prefix.Addr().Is6() && !s.Routed {
			out = append(out, fmt.Sprintf("subnet %v is not routed: only source-NATed IPv6 flows give permissions", s.Prefix))
		}
	}
	return out
}

func (d *Daemon) onLostPermission(p cone.Permission) {
	d.repaired++
	d.model.Lost(p)
}
