package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/episodes"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/handover"
	"github.com/conenatd/conenatd/internal/rules"
)

// ErrUntried says that Examine could not try conntrack helpers, which takes CAP_SYS_ADMIN. A
// daemon needs CAP_NET_ADMIN alone, so it may well find one.
var ErrUntried = errors.New("conntrack helpers are tried in a network namespace of their own, which takes CAP_SYS_ADMIN")

// Examine returns the status that a daemon with this configuration would show when it
// starts on this gateway, with the findings that need no flows. With ErrUntried nothing is
// found that is not there with a helper, too. Another error is one with which the daemon would
// not start; the status then has what was found before.
//
// Examine changes nothing in this network namespace: it tries nftables with transactions
// that have to fail, and conntrack helpers in another namespace that ends with it. The
// kernel may load modules for both.
func Examine(cfg config.Config) (st control.Status, err error) {
	all := &shared{given: Config{Config: cfg}, log: slog.New(slog.DiscardHandler), start: time.Now()}
	all.noted, all.failures = episodes.New(all.log, all.now, cfg.Reconcile), episodes.NewFailures(all.log, all.now, cfg.Reconcile)
	x := &examination{loop: &loop{shared: all, cfg: cfg}, reconcile: &reconciler{shared: all, wanted: cfg, firewall: &firewall{name: cfg.Table}}}
	x.loop.newEngine(cone.New(cone.Policy{}), nil)
	defer func() {
		st = x.status()
		if e := x.loop.backends.expect; e != nil {
			err = errors.Join(err, e.Close())
		}
		err = errors.Join(err, x.reconcile.firewall.close())
	}()
	if all.conntrack, err = handover.Open(); err != nil {
		return st, err
	}
	f, err := openFirewall(cfg.Table)
	if err != nil {
		return st, err
	}
	x.reconcile.firewall, x.loop.features = f, f.features
	f.look()
	if x.loop.network, err = x.reconcile.firstNetwork(&x.loop.cfg); err != nil {
		return st, err
	}
	if err = x.readTable(); err != nil {
		return st, err
	}
	served, err := readPorts(x.loop.network)
	if err != nil {
		return st, err
	}
	if err = x.readRules(served); err != nil {
		return st, err
	}
	return st, x.untried
}

// An examination is the state of a daemon that does not run.
type examination struct {
	loop      *loop
	reconcile *reconciler
	untried   error // ErrUntried, if helpers were not tried
}

// readTable reads the size of the conntrack table.
func (x *examination) readTable() error {
	queries, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return err
	}
	table, err := queries.Table()
	x.loop.kernel.Entries, x.loop.kernel.Max = table.Entries, table.Max
	x.loop.cfg = x.loop.cfg.Sized(table.Max)
	return errors.Join(err, queries.Close())
}

// readRules asks what New asks of the user's rules and of the backends.
func (x *examination) readRules(served *gateway.PortSet) (err error) {
	l := x.loop
	if _, err = l.firstRules(x.reconcile.firewall, l.network, served, true); err != nil {
		return err
	}
	if err = x.tryBackends(); err != nil {
		return err
	}
	l.decisions = x.reconcile.firewall.decide(l.cfg, l.network)
	l.newEngine(cone.New(l.policy(l.cfg)), nil)
	l.engine.Model.SetTopology(0, l.network.Topology().Compile())
	l.engine.Model.SetLinkLookup(l.network.Way())
	return nil
}

// assumedHelper stands for a helper that was not tried.
const assumedHelper = "untried"

// tryBackends finds out which backends the kernel offers. That of expectations belongs to
// another network namespace: nothing is granted by it.
func (x *examination) tryBackends() error {
	l := x.loop
	cfg, f := l.cfg, x.reconcile.firewall
	if wantsMap(cfg) && f.noMap() == nil {
		f.withMap = true
		l.backends.nft = f.tables.NewMap(mapConfig(cfg))
	}
	if wantsMap(cfg) && f.noMap() != nil {
		l.missing = fmt.Sprintf("the nft backend is missing: %v", f.noMap())
	}
	if !wantsExpect(cfg) {
		return nil
	}
	err := inScratch(func() (err error) {
		l.backends.expect, err = expect.Open(expect.Config{Lifetime: cfg.Lifetime, IPv6: anyIPv6(cfg), MayIPv6: cfg.Self})
		return err
	})
	if errors.Is(err, ErrUntried) {
		x.untried, f.helpers = err, []string{assumedHelper}
		return nil
	}
	if err != nil {
		err = fmt.Errorf("the expect backend is missing: %w", err)
		if l.backends.nft == nil {
			return err
		}
		l.missing = err.Error()
	}
	f.helpers = onAnchors(l.backends.expect)
	return nil
}

// status is what a daemon would show.
func (x *examination) status() control.Status {
	l := x.loop
	st := control.Status{
		Backend: l.backends.String(), Lifetime: l.cfg.Lifetime.Seconds(), Conntrack: l.kernel,
		Outside: l.network.OutsideLinks(), OutsideIPv6Only: l.network.OutsideLinksIPv6Only(),
		PeerGroups: l.cfg.PeerGroups, ExcludePeerPorts: l.excludedPeerPorts(),
	}
	st.Helper.IPv4, st.Helper.IPv6 = l.helper(false), l.helper(true)
	for _, s := range l.cfg.Subnets {
		c := l.subnet(s)
		if l.features.maps() {
			c.Mapping = s.Mapping.String()
		}
		st.Subnets = append(st.Subnets, c)
	}
	all := l.warnings()
	if f, err := os.OpenFile(filepath.Join(handover.Dir, handover.Acct), os.O_WRONLY, 0); err == nil {
		_ = f.Close()
		all = slices.DeleteFunc(all, func(w control.Finding) bool { return w.ID == warnAccountingOff }) // a daemon turns it on
	}
	if x.untried != nil {
		all = slices.DeleteFunc(all, func(w control.Finding) bool { return w.ID == warnSelf })
	}
	st.Warnings, st.Findings = all.texts(), all
	return st
}

// Leftovers returns the names of our nftables tables, which a daemon that does not run any
// more left in the kernel.
func Leftovers() ([]string, error) {
	names, err := rules.Names(0)
	if missing := new(rules.UnsupportedError); errors.As(err, &missing) {
		return nil, nil
	}
	return names, err
}

// inScratch runs f in a network namespace that ends with it, and with what f opened there.
func inScratch(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with this goroutine. The main thread cannot end, and
		// /proc/net shows its namespace, so it must not be this one.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- inScratch(f)
			runtime.UnlockOSThread()
			return
		}
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			if errors.Is(err, unix.EPERM) {
				err = fmt.Errorf("%w: %w", ErrUntried, err)
			}
			done <- fmt.Errorf("make a network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}
