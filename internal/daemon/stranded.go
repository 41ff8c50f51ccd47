package daemon

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/gateway"
)

// mostTrips bounds the flows and permissions that one look at children asks routes about.
const mostTrips = 1 << 14

// endStranded ends children with a wrong address: their hosts' packets leave by another link now,
// and the rules would surely give them another address there. It also ends the permissions that
// would admit more such children. If a host has a flow of its own to the same peer, and that has
// the same address rightly, nothing ends. Nothing ends either while a route has several next
// hops: such a route leads each flow by a link of its own, whatever address the flow has.
func (r *reconciler) endStranded(cfg config.Config, network gateway.Network) (ended int, err error) {
	if r.firewall.user == nil || r.firewall.unread != nil || r.rerouted.shared || network.HidesWays() {
		return 0, nil
	}
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return 0, err
	}
	defer q.Close()
	s := &strands{
		r: r, sources: newSources(network, nil), routes: &router{network: network},
		trips: make(map[trip]*tripFlows), wide: make(map[claimant]*tripFlows), byHost: make(map[cone.Addr][]*tripFlows),
	}
	if err := s.collect(q, cfg); err != nil {
		return 0, err
	}
	var errs []error
	for _, withChildren := range []bool{true, false} { // to look at permissions takes longer
		var children []cone.Flow
		stale, before := &r.rerouted.stale, r.rerouted.stale.len()
		for t, x := range s.trips {
			if withChildren != (len(x.children) > 0) {
				continue
			}
			if wrong, ok := s.wrong(x); ok {
				stale.exact[t] = struct{}{}
				children = append(children, wrong...)
			}
		}
		if !withChildren {
			for c, x := range s.wide {
				if _, wrong := s.wrong(x); wrong {
					stale.wide[c] = struct{}{}
				}
			}
		}
		errs = append(errs, deleteFlows(q, children))
		ended += len(children)
		if stale.len() > before {
			has := stale.clone().has
			r.ask(func(l *loop) { l.engine.Model.SetRerouted(r.now(), has) })
		}
	}
	if err := s.routes.close(); err != nil {
		errs = append(errs, fmt.Errorf("find children that are answered by another link: %w", err))
	}
	return ended, errors.Join(errs...)
}

// strands are the trips with an address that may be wrong.
type strands struct {
	r       *reconciler
	sources *sources
	routes  *router
	trips   map[trip]*tripFlows
	wide    map[claimant]*tripFlows    // by permission for several peers
	byHost  map[cone.Addr][]*tripFlows // the same by inside address
}

// A claimant identifies a permission, whatever its mark.
type claimant struct {
	cone.Key
	in cone.Endpoint
}

func claimantOf(p *cone.Permission) claimant { return claimant{p.Key, p.Int} }

// A trip goes from a host to a peer, with an outside address.
type trip struct{ host, ext, peer cone.Addr }

func tripOf(sent *cone.Flow) trip { return trip{sent.Src.Addr, sent.ReplyDst.Addr, sent.ReplySrc.Addr} }

// tripFlows are the flows of a trip, or of all trips of a permission for several peers.
type tripFlows struct {
	permission *cone.Permission // nil if none is left
	children   []child          // none of a permission for several peers
	own        []cone.Flow      // of the host
	elsewhere  cone.Endpoint    // of a peer, in a flow of the host with another outside address
}

// A child, and how its host sends it.
type child struct {
	cone.Flow
	sent cone.Flow
}

// sample is a packet of the permission's inside endpoint to the peer, where the host sends to
// it with another outside address. ok is false if there is none.
func (x *tripFlows) sample() (sent cone.Flow, ok bool) {
	if x.permission == nil || x.elsewhere == (cone.Endpoint{}) {
		return sent, false
	}
	return cone.Flow{Src: x.permission.Int, ReplySrc: x.elsewhere, ReplyDst: x.permission.Ext}, true
}

// broken reports whether the rules would surely give a host's packet another address on the
// links by which it leaves now.
func (s *strands) broken(sent cone.Flow) bool {
	return s.sources.broken(s.r.firewall.user, s.routes, &brokenFlow{Flow: sent})
}

// wrong reports whether the address of a trip is wrong, and returns the children that are. A
// trip on which a flow of the host is right is not wrong.
func (s *strands) wrong(x *tripFlows) (children []cone.Flow, wrong bool) {
	for _, c := range x.children {
		if s.broken(c.sent) {
			children = append(children, c.Flow)
		}
	}
	sent, sends := x.sample()
	wrong = len(children) > 0 || len(x.own) > 0 || sends && s.broken(sent)
	return children, wrong && !slices.ContainsFunc(x.own, func(f cone.Flow) bool { return !s.broken(f) })
}

// collect notes the trips whose address is on another link than the only outside one.
func (s *strands) collect(q *ctwatch.Queries, cfg config.Config) error {
	peers := make(map[[2]cone.Addr][]*tripFlows) // by host and peer
	note := func(t trip) *tripFlows {
		x := s.trips[t]
		if x == nil && len(s.trips) < mostTrips {
			x = &tripFlows{}
			s.trips[t] = x
			peers[[2]cone.Addr{t.host, t.peer}] = append(peers[[2]cone.Addr{t.host, t.peer}], x)
		}
		return x
	}
	none := s.r.firewall.dumped // but an earlier daemon may have left children without permissions
	each := func(f func(v *cone.View)) bool {
		for at := 0; at >= 0; {
			ok := s.r.ask(func(l *loop) {
				at = l.engine.Model.Walk(at, flowsAtOnce, func(v cone.View) {
					if !v.Routed() && s.sources.another(v.Ext.Addr) {
						f(&v)
					}
				})
			})
			if !ok {
				return false
			}
		}
		return true
	}
	if !each(func(*cone.View) { none = false }) {
		return errEnded
	}
	if none {
		return nil
	}
	hosts := s.r.firewall.fixedFlows(cfg).translated
	err := q.Dump(func(f *cone.Flow) {
		if f.IsChild() && hosts.Holds(f.ReplySrc.Addr) && s.sources.another(f.Dst.Addr) {
			sent := f.Turned()
			if x := note(tripOf(&sent)); x != nil {
				x.children = append(x.children, child{*f, sent})
			}
		}
	})
	if err != nil {
		return err
	}
	ok := each(func(v *cone.View) {
		if v.Wild > 0 {
			x := &tripFlows{permission: &v.Permission}
			s.wide[claimantOf(&v.Permission)] = x
			s.byHost[v.Int.Addr] = append(s.byHost[v.Int.Addr], x)
		} else if x := note(trip{v.Int.Addr, v.Ext.Addr, v.Peer}); x != nil {
			x.permission = &v.Permission
		}
	})
	if !ok {
		return errEnded
	}
	return q.Dump(func(f *cone.Flow) {
		if f.IsChild() || !f.Status.Has(cone.StatusSrcNAT) || f.Status.Has(cone.StatusDstNAT) || !hosts.Holds(f.Src.Addr) {
			return
		}
		t := tripOf(f)
		s.noteWide(f)
		for _, x := range peers[[2]cone.Addr{t.host, t.peer}] {
			switch {
			case x == s.trips[t]:
				x.own = append(x.own, *f)
			case x.elsewhere == cone.Endpoint{}:
				x.elsewhere = f.ReplySrc
			}
		}
	})
}

// noteWide notes a flow of a host for its permissions for several peers.
func (s *strands) noteWide(f *cone.Flow) {
	for _, x := range s.byHost[f.Src.Addr] {
		switch p := x.permission; {
		case !p.Peers().Contains(f.ReplySrc.Addr.Netip()):
		case f.ReplyDst.Addr != p.Ext.Addr:
			x.elsewhere = f.ReplySrc
		case f.Src == p.Int && f.ReplyDst == p.Ext:
			x.own = append(x.own, *f)
		}
	}
}

// another reports whether an address is on a link that is not the only outside one.
func (s *sources) another(a cone.Addr) bool {
	_, own := s.own[a]
	return own && a.Is4() && (s.only == 0 || !slices.ContainsFunc(s.byLink[s.only], func(o ownAddr) bool { return o.addr == a.Netip() }))
}

// stalePermissions are for trips that leave by another link than the one that has the outside
// address. Those for several peers are stale if the address is wrong for all that their host
// sends to.
type stalePermissions struct {
	exact map[trip]struct{}
	wide  map[claimant]struct{}
}

func newStalePermissions() stalePermissions {
	return stalePermissions{make(map[trip]struct{}), make(map[claimant]struct{})}
}

func (s *stalePermissions) len() int { return len(s.exact) + len(s.wide) }

// clone returns a copy that later changes leave alone.
func (s *stalePermissions) clone() *stalePermissions {
	return &stalePermissions{maps.Clone(s.exact), maps.Clone(s.wide)}
}

func (s *stalePermissions) has(p cone.Permission) (stale bool) {
	if p.Wild > 0 {
		_, stale = s.wide[claimantOf(&p)]
	} else {
		_, stale = s.exact[trip{p.Int.Addr, p.Ext.Addr, p.Peer}]
	}
	return stale
}
