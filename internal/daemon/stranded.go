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

// endStranded ends the children that hosts answer with an address which the rules would surely
// not give their own flows now, because these leave by another link, and the permissions that
// would admit more of them. It ends nothing of a trip on which the host's own flows are right.
// A route with several next hops leads each flow by another link, and hosts never answered there
// by the link of the address alone, so nothing ends while there is one.
func (r *reconciler) endStranded(cfg config.Config, network gateway.Network) (ended int, err error) {
	if r.firewall.user == nil || r.firewall.unread != nil || r.rerouted.shared || network.HidesWays() {
		return 0, nil
	}
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return 0, err
	}
	defer q.Close()
	s := &strands{r: r, sources: newSources(network, nil), routes: &router{network: network}, trips: make(map[trip]*tripFlows)}
	if err := s.collect(q, cfg); err != nil {
		return 0, err
	}
	var children []cone.Flow
	stale, before := &r.rerouted.stale, len(r.rerouted.stale.exact)
	for t, x := range s.trips {
		if wrong, ok := s.wrong(x); ok {
			stale.put(t)
			children = append(children, wrong...)
		}
	}
	errs := []error{deleteFlows(q, children)}
	if len(stale.exact) > before {
		has := stale.clone().has
		r.ask(func(l *loop) { l.engine.Model.SetRerouted(r.now(), has) })
	}
	if err := s.routes.close(); err != nil {
		errs = append(errs, fmt.Errorf("find children that are answered by another link: %w", err))
	}
	return len(children), errors.Join(errs...)
}

// strands are the trips with an address that may be wrong.
type strands struct {
	r       *reconciler
	sources *sources
	routes  *router
	trips   map[trip]*tripFlows
}

// A trip goes from a host to a peer, with an outside address.
type trip struct{ host, ext, peer cone.Addr }

func tripOf(sent *cone.Flow) trip { return trip{sent.Src.Addr, sent.ReplyDst.Addr, sent.ReplySrc.Addr} }

// tripFlows are the flows of a trip, and its permission if it is for one peer.
type tripFlows struct {
	children   []child
	own        []cone.Flow // of the host
	permission *cone.Permission
	elsewhere  cone.Endpoint // of the peer, in a flow of the host with another outside address
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
	wrong = len(children) > 0 || sends && s.broken(sent) || len(x.own) > 0
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
	for at := 0; at >= 0; {
		ok := s.r.ask(func(l *loop) {
			at = l.engine.Model.Walk(at, flowsAtOnce, func(v cone.View) {
				if v.Routed() || !s.sources.another(v.Ext.Addr) {
					return
				}
				none = false
				if v.Wild > 0 {
					return
				}
				if x := note(trip{v.Int.Addr, v.Ext.Addr, v.Peer}); x != nil {
					x.permission = &v.Permission
				}
			})
		})
		if !ok {
			return errEnded
		}
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
	if err != nil || len(s.trips) == 0 {
		return err
	}
	return q.Dump(func(f *cone.Flow) {
		if f.IsChild() || !f.Status.Has(cone.StatusSrcNAT) || f.Status.Has(cone.StatusDstNAT) || !hosts.Holds(f.Src.Addr) {
			return
		}
		t := tripOf(f)
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

// another reports whether an address is on a link that is not the only outside one.
func (s *sources) another(a cone.Addr) bool {
	_, own := s.own[a]
	return own && a.Is4() && (s.only == 0 || !slices.ContainsFunc(s.byLink[s.only], func(o ownAddr) bool { return o.addr == a.Netip() }))
}

// stalePermissions are for trips that leave by another link than the one that has the outside
// address. wide has the peers by host and outside address, for permissions of several peers.
type stalePermissions struct {
	exact map[trip]struct{}
	wide  map[[2]cone.Addr][]cone.Addr
}

// put adds a trip.
func (s *stalePermissions) put(t trip) {
	if s.exact == nil {
		s.exact, s.wide = make(map[trip]struct{}), make(map[[2]cone.Addr][]cone.Addr)
	}
	if _, known := s.exact[t]; !known {
		s.exact[t] = struct{}{}
		ends := [2]cone.Addr{t.host, t.ext}
		s.wide[ends] = append(s.wide[ends], t.peer)
	}
}

// clone returns a copy that later calls of put leave alone.
func (s *stalePermissions) clone() *stalePermissions {
	return &stalePermissions{maps.Clone(s.exact), maps.Clone(s.wide)}
}

func (s *stalePermissions) has(p cone.Permission) bool {
	if p.Wild == 0 {
		_, stale := s.exact[trip{p.Int.Addr, p.Ext.Addr, p.Peer}]
		return stale
	}
	return slices.ContainsFunc(s.wide[[2]cone.Addr{p.Int.Addr, p.Ext.Addr}], func(peer cone.Addr) bool { return p.Peers().Contains(peer.Netip()) })
}
