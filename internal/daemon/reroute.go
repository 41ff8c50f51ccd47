package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

const (
	// rerouteShare bounds the CPU time of looks at flows to 1/rerouteShare of a CPU while
	// routes change all the time.
	rerouteShare = 50
	// rerouteLooks is how many looks follow one change: that an address is wrong on a link
	// may only show once another flow has left by that link.
	rerouteLooks = 10
)

// endRerouted ends, after routes changed, the flows that keep the address of one link and
// leave by another now, and the permissions that would admit more of them. The kernel does so
// for a masquerade, packet by packet. Flows with a mapping, and what a host sends to the peer
// of a child, must recover as well.
func (r *reconciler) endRerouted(cfg config.Config, network gateway.Network) error {
	for _, l := range network.Links {
		if l.Outside&gateway.IPv4 != 0 && l.Cause != gateway.SharedLink {
			r.rerouted.outside[l.Name] = true
		}
	}
	if r.rerouted.looks == 0 || r.now() < r.rerouted.next {
		return nil
	}
	var n int
	var err error
	ways := r.newWays(network)
	took := threadTime(func() { n, err = r.endWrongWays(cfg, ways) })
	r.rerouted.looks--
	if ways.doubtful == 0 && err == nil {
		r.rerouted.looks = 0
	}
	r.rerouted.next = r.now() + rerouteShare*took
	if ways.doubtful > 0 || err != nil {
		r.rerouted.next = max(r.rerouted.next, r.now()+time.Second)
	}
	r.noted.note(slog.LevelInfo, "rerouted", "children and flows with mappings left by another link than the one of their address; they ended", uint64(n))
	return err
}

// lookAtFlows runs the looks at the outside addresses of flows that are due.
func (r *reconciler) lookAtFlows(ctx context.Context) {
	if err := r.endReroutedLater(); ctx.Err() == nil {
		r.failures.note(requestLookAtRoutes, 1, err)
	}
	if err := r.lookForBroken(); ctx.Err() == nil {
		r.failures.note(requestLookForBroken, 1, err)
	}
}

// endReroutedLater does what endRerouted put off.
func (r *reconciler) endReroutedLater() error {
	if r.rerouted.looks == 0 || r.now() < r.rerouted.next {
		return nil
	}
	var cfg config.Config
	if !r.ask(func(l *loop) { cfg = l.cfg }) {
		return nil
	}
	return r.endRerouted(cfg, r.network)
}

// endWrongWays ends what takes a wrong way: flows, of which it returns the number, then
// permissions.
func (r *reconciler) endWrongWays(cfg config.Config, ways *ways) (ended int, err error) {
	if ways.routes.network.HidesWays() {
		return 0, nil
	}
	var errs []error
	stale, before := &r.rerouted.stale, len(r.rerouted.stale.exact)
	for _, last := range []bool{false, true} {
		if last && !ways.doubts() {
			break
		}
		ways.last = last
		flows, err := r.firewall.fixedFlows(cfg).end(ways.wrongFlow)
		ended += len(flows)
		errs = append(errs, err)
		for i := range flows {
			stale.put(tripOf(&flows[i]))
		}
	}
	errs = append(errs, r.findStale(ways, stale))
	if len(stale.exact) > before {
		has := stale.clone().has
		r.ask(func(l *loop) { l.engine.Model.SetRerouted(r.now(), has) })
	}
	if err := ways.routes.close(); err != nil {
		errs = append(errs, fmt.Errorf("find flows that leave by another link: %w", err))
	}
	return ended, errors.Join(errs...)
}

// ways finds the links by which packets of hosts leave. doubtful counts those of which it is not
// sure that their address is wrong.
type ways struct {
	links    map[cone.Addr]string // that have the gateway's addresses
	outside  map[string]bool      // current and former outside links
	only     string               // the only outside link now, if there is just one
	routes   *router
	fixed    []userrules.AddrRange // the addresses to which rules of the user's translate
	unknown  bool                  // there may be others
	right    map[way]bool          // the host has a flow there with the link's own address
	last     bool                  // all flows were seen: what is doubtful now stays so
	doubtful int
}

type way struct {
	host cone.Addr
	link string
}

func (r *reconciler) newWays(network gateway.Network) *ways {
	w := &ways{
		links: make(map[cone.Addr]string), outside: r.rerouted.outside,
		routes: &router{network: network}, right: make(map[way]bool),
	}
	w.fixed, w.unknown = r.firewall.fixedSources()
	names := make(map[int]string)
	var outside []string
	for _, l := range network.Links {
		names[l.Index] = l.Name
		if l.Outside&gateway.IPv4 != 0 {
			outside = append(outside, l.Name)
		}
	}
	for _, a := range network.Addrs {
		w.links[cone.AddrFrom(a.Prefix.Addr())] = names[a.Link]
	}
	if len(outside) == 1 {
		w.only = outside[0]
	}
	return w
}

func (w *ways) doubts() bool { return w.unknown || len(w.fixed) > 0 }

// wrongFlow is wrong for a flow. An address that packets of a flow with a mapping have may be that
// of an inside link, by a rule of the user's.
func (w *ways) wrongFlow(sent *cone.Flow) bool {
	return (sent.IsChild() || w.outside[w.links[sent.ReplyDst.Addr]]) && w.wrong(sent)
}

// wrong reports whether packets, from Src to ReplySrc, leave by another link than the one that
// has their outside address, in ReplyDst.
func (w *ways) wrong(sent *cone.Flow) bool {
	addr := sent.ReplyDst.Addr
	link, onLink := w.links[addr]
	if !onLink {
		return false
	}
	by, _ := w.routes.links(sent)
	if len(by) == 0 {
		return false
	}
	for _, l := range by {
		if l.Name == link {
			w.right[way{sent.Src.Addr, link}] = len(by) == 1 || w.right[way{sent.Src.Addr, link}]
			return false
		}
	}
	surely := !w.unknown && !slices.ContainsFunc(w.fixed, func(r userrules.AddrRange) bool { return r.Has(addr.Netip()) })
	if surely || w.right[way{sent.Src.Addr, by[0].Name}] {
		return true
	}
	if w.last {
		w.doubtful++
	}
	return false
}

// findStale adds the permissions of single peers whose hosts reach these by another link.
func (r *reconciler) findStale(ways *ways, stale *stalePermissions) error {
	permissions := make(map[trip]cone.Permission)
	for at := 0; at >= 0; {
		ok := r.ask(func(l *loop) {
			at = l.engine.Model.Walk(at, flowsAtOnce, func(v cone.View) {
				if link, onLink := ways.links[v.Ext.Addr]; onLink && link != ways.only && v.Wild == 0 && !v.Routed() {
					permissions[trip{v.Int.Addr, v.Ext.Addr, v.Peer}] = v.Permission
				}
			})
		})
		if !ok {
			return errEnded
		}
	}
	for t, p := range permissions {
		const anyPort = 1
		if ways.wrong(&cone.Flow{Src: p.Int, ReplySrc: cone.Endpoint{Addr: p.Peer, Port: anyPort}, ReplyDst: p.Ext}) {
			stale.put(t)
		}
	}
	return nil
}

// A trip goes from a host to a peer, with an outside address.
type trip struct{ host, ext, peer cone.Addr }

func tripOf(sent *cone.Flow) trip { return trip{sent.Src.Addr, sent.ReplyDst.Addr, sent.ReplySrc.Addr} }

func (t trip) ends() [2]cone.Addr { return [2]cone.Addr{t.host, t.ext} }

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
		s.wide[t.ends()] = append(s.wide[t.ends()], t.peer)
	}
}

// clone returns a copy that later calls of put leave alone.
func (s *stalePermissions) clone() *stalePermissions {
	return &stalePermissions{maps.Clone(s.exact), maps.Clone(s.wide)}
}

func (s *stalePermissions) has(p cone.Permission) bool {
	t := trip{p.Int.Addr, p.Ext.Addr, p.Peer}
	if p.Wild == 0 {
		_, stale := s.exact[t]
		return stale
	}
	return slices.ContainsFunc(s.wide[t.ends()], func(peer cone.Addr) bool { return p.Peers().Contains(peer.Netip()) })
}
