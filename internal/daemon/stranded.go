package daemon

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/gateway"
)

// mostSuspects bounds the children and the permissions that one look asks routes about.
const mostSuspects = 1 << 14

// endStranded ends children with a wrong address: their hosts' packets leave by another link now,
// and the rules would surely give them another address there. Before that it ends the permissions
// that would admit them again, if all that their hosts send by these is wrong. While a route has
// several next hops, which lead each flow by a link of its own, only an address whose link does
// not run is wrong.
func (r *reconciler) endStranded(cfg config.Config, network gateway.Network) (ended int, err error) {
	s := r.newStrands(cfg, network)
	if s == nil {
		return 0, nil
	}
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return 0, err
	}
	defer q.Close()
	if err := s.collect(q, cfg); err != nil {
		return 0, err
	}
	s.endPermissions(true)
	var wrong []cone.Flow
	for _, c := range s.children {
		if s.wrong(c) {
			wrong = append(wrong, c.Turned())
		}
	}
	err = deleteFlows(q, wrong)
	s.endPermissions(false) // that takes longer
	if failed := s.routes.close(); failed != nil {
		err = errors.Join(err, fmt.Errorf("find children that are answered by another link: %w", failed))
	}
	return len(wrong), err
}

// strandsAny reports whether one of these new children has a wrong address.
func (r *reconciler) strandsAny(cfg config.Config, children []cone.Flow) (bool, error) {
	s := r.newStrands(cfg, r.network)
	if s == nil {
		return false, nil
	}
	hosts := r.firewall.fixedFlows(cfg).translated
	found := slices.ContainsFunc(children, func(f cone.Flow) bool {
		sent := f.Turned()
		return hosts.Holds(sent.Src.Addr) && s.wrong(&sentFlow{Flow: sent})
	})
	return found, s.routes.close()
}

// newStrands returns nil if it cannot be known which address is wrong.
func (r *reconciler) newStrands(cfg config.Config, network gateway.Network) *strands {
	if r.firewall.user == nil || r.firewall.unread != nil {
		return nil
	}
	return &strands{
		r: r, sources: newSources(network, nil), routes: r.firewall.router(cfg, network),
		suspects: make(map[cone.Endpoint][]*suspect),
	}
}

// strands are what may have a wrong address.
type strands struct {
	r        *reconciler
	sources  *sources
	routes   *router
	children []*sentFlow                  // as their hosts send them
	suspects map[cone.Endpoint][]*suspect // by inside endpoint
	n        int                          // suspects
}

// A suspect is a permission whose address may be wrong.
type suspect struct {
	cone.Permission
	sent      []*sentFlow // what its host sends with it, to children as well
	children  bool        // children are among sent
	elsewhere *sentFlow   // what its host sends to a peer with another outside address
}

// A sentFlow is a flow as its host sends it.
type sentFlow struct {
	cone.Flow
	judged, broken bool
}

// wrong reports whether the rules would surely give the host's packet another address on the
// links by which it leaves now.
func (s *strands) wrong(f *sentFlow) bool {
	if !f.judged {
		runs := s.sources.own[f.ReplyDst.Addr].runs
		f.judged = true
		f.broken = !(runs && s.r.rerouted.shared) && s.sources.broken(s.r.firewall.user, s.routes, &brokenFlow{Flow: f.Flow})
	}
	return f.broken
}

// stale reports whether all is wrong that the host sends with the permission. Of a permission
// for several peers, whose ways may differ, that is known only while the host sends something.
func (s *strands) stale(x *suspect) bool {
	if len(x.sent) > 0 {
		return !slices.ContainsFunc(x.sent, func(f *sentFlow) bool { return !s.wrong(f) })
	}
	if x.Wild != 0 || x.elsewhere == nil {
		return false
	}
	f := x.elsewhere.Flow
	f.ReplyDst = x.Ext
	if !s.wrong(&sentFlow{Flow: f}) {
		return false
	}
	for _, port := range []uint16{1, math.MaxUint16} { // rules may lead one port alone by another link
		f := cone.Flow{Src: x.Int, ReplySrc: cone.Endpoint{Addr: f.ReplySrc.Addr, Port: port}, ReplyDst: x.Ext}
		if !s.wrong(&sentFlow{Flow: f}) {
			return false
		}
	}
	return true
}

// endPermissions ends the permissions that are stale, of those with or without children.
func (s *strands) endPermissions(withChildren bool) {
	stale := s.r.rerouted.stale
	before := len(stale)
	if before == 0 {
		s.r.rerouted.rules = s.r.firewall.user
	}
	for _, all := range s.suspects {
		for _, x := range all {
			if x.children == withChildren && s.stale(x) {
				stale[claimantOf(&x.Permission)] = struct{}{}
			}
		}
	}
	if len(stale) > before {
		has := maps.Clone(stale).has
		s.r.ask(func(l *loop) { l.engine.Model.SetRerouted(s.r.now(), has) })
	}
}

// collect notes children and permissions whose address is on another link than the only outside
// one.
func (s *strands) collect(q *ctwatch.Queries, cfg config.Config) error {
	for at := 0; at >= 0; {
		ok := s.r.ask(func(l *loop) {
			at = l.engine.Model.Walk(at, flowsAtOnce, func(v cone.View) {
				if !v.Routed() && s.sources.another(v.Ext.Addr) && s.n < mostSuspects {
					s.n++
					s.suspects[v.Int] = append(s.suspects[v.Int], &suspect{Permission: v.Permission})
				}
			})
		})
		if !ok {
			return errEnded
		}
	}
	if s.n == 0 && s.r.firewall.dumped { // an earlier daemon may have left children without permissions
		return nil
	}
	hosts := s.r.firewall.fixedFlows(cfg).translated
	return q.Dump(func(f *cone.Flow) {
		sent, child := *f, f.IsChild()
		switch {
		case child:
			sent = f.Turned()
		case !f.Status.Has(cone.StatusSrcNAT) || f.Status.Has(cone.StatusDstNAT):
			return
		}
		wanted := child && s.sources.another(sent.ReplyDst.Addr) && len(s.children) < mostSuspects
		if !wanted && len(s.suspects[sent.Src]) == 0 || !hosts.Holds(sent.Src.Addr) {
			return
		}
		noted := &sentFlow{Flow: sent}
		if wanted {
			s.children = append(s.children, noted)
		}
		for _, x := range s.suspects[sent.Src] {
			switch {
			case !x.Peers().Contains(sent.ReplySrc.Addr.Netip()):
			case sent.ReplyDst == x.Ext:
				x.sent, x.children = append(x.sent, noted), x.children || child
			case sent.ReplyDst.Addr != x.Ext.Addr:
				x.elsewhere = noted
			}
		}
	})
}

// forgetStale lets flows give permissions again that ended because their addresses were wrong:
// routes or rules changed since.
func (r *reconciler) forgetStale() {
	if len(r.rerouted.stale) == 0 {
		return
	}
	r.rerouted.stale, r.rerouted.strands = make(stalePermissions), true
	r.ask(func(l *loop) { l.engine.Model.SetRerouted(r.now(), nil) })
	r.wantReconcile()
}

// forgetStaleByRules does so if the user's source NAT changed.
func (r *reconciler) forgetStaleByRules() {
	if !r.firewall.user.SameSources(r.rerouted.rules) {
		r.forgetStale()
	}
}

// another reports whether an address is on a link that is not the only outside one of its family.
func (s *sources) another(a cone.Addr) bool {
	_, own := s.own[a]
	only := s.only[gateway.FamilyOf(a.Netip())]
	return own && (only == 0 || !slices.ContainsFunc(s.byLink[only], func(o ownAddr) bool { return o.addr == a.Netip() }))
}

// stalePermissions are permissions for packets that leave by another link than the one that has
// the outside address.
type stalePermissions map[claimant]struct{}

// A claimant identifies a permission, whatever its mark.
type claimant struct {
	cone.Key
	in cone.Endpoint
}

func claimantOf(p *cone.Permission) claimant { return claimant{p.Key, p.Int} }

func (s stalePermissions) has(p cone.Permission) bool {
	_, stale := s[claimantOf(&p)]
	return stale
}
