package daemon

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/gateway"
)

// Reload reads the configuration again and puts it in force. Permissions that
// it still allows are not touched. If it returns an error, nothing has changed. A read that
// hangs delays neither a stop nor a later Reload, and does not undo that later Reload when
// it returns at last.
func (s *shared) Reload() error {
	n := s.reloads.Add(1)
	type result struct {
		cfg config.Config
		err error
	}
	read := make(chan result, 1)
	go func() {
		cfg, err := s.given.Reload()
		read <- result{cfg, err}
	}()
	var r result
	select {
	case r = <-read:
	case <-s.ended:
		return errEnded
	}
	s.reloaded.Lock() // one reload at a time
	defer s.reloaded.Unlock()
	if n < s.reloaded.last {
		return s.reloaded.err
	}
	s.reloaded.last, s.reloaded.err = n, s.reload(r.cfg, r.err)
	return s.reloaded.err
}

// reload puts in force what was read.
func (s *shared) reload(cfg config.Config, err error) error {
	if err != nil {
		return s.keepOld(err)
	}
	return s.job(func(r *reconciler) error {
		if err := r.adopt(cfg); err != nil {
			return s.keepOld(err)
		}
		s.wantReconcile() // to find the flows that give a permission only now
		return nil
	})
}

// adopt puts a new configuration in force. It finds everything that can be wrong before it
// changes anything.
func (r *reconciler) adopt(wanted config.Config) error {
	var old config.Config
	if !r.do(func(l *loop) { old = l.cfg }) {
		return errEnded
	}
	marked := wanted
	if wanted.AutoSubnets { // subnets found by "auto" stay inside, whatever routes their links got
		marked.Subnets = slices.Concat(wanted.Subnets, old.Subnets)
	}
	r.firewall.look()
	r.changed.rules = true // lookAround must follow what look found, even if adopt fails
	network, err := r.readNetwork(marked)
	if err != nil {
		return err
	}
	cfg, err := r.resolve(wanted, network)
	if err != nil {
		return err
	}
	if err := unchangeable(old, cfg); err != nil {
		return err
	}
	if err := r.auditor.Open(cfg.AuditLog); err != nil {
		return err
	}
	if err := r.change(cfg); err != nil {
		return errors.Join(err, r.auditor.Discard())
	}
	r.auditor.Use(cfg.AuditPeers)
	r.wanted = wanted
	if r.given.Level != nil {
		r.given.Level.Set(cfg.LogLevel)
	}
	r.log.Info("configuration reloaded", "backend", cfg.Backend, "subnets", prefixes(cfg.Subnets), "lifetime", cfg.Lifetime)
	return nil
}

// resolve returns the wanted configuration with the subnets of links filled in, and limits
// that suit the conntrack table. A former outside link does not become an inside one when it
// loses its default route.
func (r *reconciler) resolve(wanted config.Config, network gateway.Network) (config.Config, error) {
	var err error
	wanted.Subnets, err = r.firewall.subnets(wanted, network, r.uplinks.routed, r.hosts)
	return wanted.Sized(r.size), err
}

// follow enables the subnets that links have now, with the limits that suit the
// conntrack table now. It reports whether these differ from cfg, the configuration in
// force.
func (r *reconciler) follow(cfg config.Config, network gateway.Network) (changed bool, err error) {
	next, err := r.resolve(r.wanted, network)
	if err != nil {
		return false, err
	}
	sameSubnets := slices.Equal(next.Subnets, cfg.Subnets)
	sameLimits := next.MaxPermissionsPerHost == cfg.MaxPermissionsPerHost && next.MaxChildren == cfg.MaxChildren
	if sameSubnets && sameLimits {
		return false, nil
	}
	if err := r.change(next); err != nil {
		return false, fmt.Errorf("enable the subnets %v: %w", prefixes(next.Subnets), err)
	}
	if !sameSubnets {
		r.log.Info("links or rules changed, and with them the subnets of links", "subnets", prefixes(next.Subnets))
	}
	if !sameLimits {
		r.log.Info("the conntrack table has another size, and so have limits", "entries", r.size,
			"max_permissions_per_host", next.MaxPermissionsPerHost, "max_children", next.MaxChildren)
	}
	r.ask(func(l *loop) { l.warned.Tell(r.now(), l.warnings()) })
	r.wantReconcile() // links to other subnets lead inside now
	return true, nil
}

func (s *shared) keepOld(err error) error {
	s.log.Error("configuration not reloaded, the old one stays in force", "err", err)
	return err
}

// unchangeable returns an error that names each change that needs a restart.
func unchangeable(old, next config.Config) error {
	var errs []error
	for _, key := range config.NeedsRestart(&old, &next) {
		errs = append(errs, fmt.Errorf("%s: a change needs a restart", key))
	}
	if anyIPv6(next) && !anyIPv6(old) {
		errs = append(errs, errors.New("subnet: the first IPv6 subnet needs a restart"))
	}
	if next.Self && !old.Self && wantsExpect(old) && !anyIPv6(old) {
		errs = append(errs, errors.New("self: to turn it on needs a restart where no IPv6 subnet is enabled"))
	}
	if size := mapConfig(old).Size; size != mapConfig(next).Size && wantsMap(old) && wantsMap(next) {
		errs = append(errs, fmt.Errorf("max_permissions: the map of permissions has %d places for as long as it is in use; "+
			"more than %d, and less again, needs a restart", size, leastMapSize))
	}
	if next.EnablesNone() {
		errs = append(errs, errors.New("subnet: none is enabled"))
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

// Revoke ends the permissions that match all words (control.Source).
func (s *shared) Revoke(words []control.Word) (n int, err error) {
	if len(words) == 0 {
		return 0, errors.New("revoke: expected an address or an endpoint") // none would match all
	}
	n, err = s.revoke(func(p *cone.Permission) bool {
		return !slices.ContainsFunc(words, func(w control.Word) bool { return !matches(w, p) })
	})
	if err == nil {
		s.log.Info("permissions revoked by command", "words", words, "count", n)
	}
	return n, err
}

// Flush ends all permissions (control.Source).
func (s *shared) Flush() (int, error) {
	n, err := s.revoke(func(*cone.Permission) bool { return true })
	if err == nil {
		s.log.Info("all permissions revoked by command", "count", n)
	}
	return n, err
}

// revoke ends the permissions that fits selects, and returns how many stood.
func (s *shared) revoke(fits func(*cone.Permission) bool) (n int, err error) {
	if err := s.showAll(0); err != nil {
		return 0, err
	}
	if err := s.allAdopted(); err != nil {
		return 0, err
	}
	ok := s.do(func(l *loop) {
		n = l.engine.Model.Revoke(s.now(), func(p cone.Permission) bool { return fits(&p) })
		l.engine.Apply(0) // now: the caller may kill the daemon as soon as it is answered
	})
	if !ok {
		return 0, errEnded
	}
	return n, nil
}

// matches reports whether a word selects p: an address (inside, outside or peer), a prefix of such
// addresses, or an endpoint (inside or outside). Permissions for anybody are
// those of no peer.
func matches(w control.Word, p *cone.Permission) bool {
	peers := p.Peers()
	switch {
	case !w.Addrs.IsValid():
		e := cone.EndpointFrom(w.Endpoint)
		return p.Int == e || p.Ext == e
	case w.Addrs.Contains(p.Int.Addr.Netip()) || w.Addrs.Contains(p.Ext.Addr.Netip()):
		return true
	case w.Addrs.IsSingleIP():
		return peers.Bits() > 0 && peers.Contains(w.Addrs.Addr())
	}
	return w.Addrs.Bits() <= peers.Bits() && w.Addrs.Contains(peers.Addr())
}

func prefixes(subnets []config.Subnet) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range subnets {
		out = append(out, s.Prefix)
	}
	return out
}
