package daemon

import (
	"log/slog"

	"github.com/conenatd/conenatd/internal/budget"
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
)

// strands returns nil if it cannot be known which address is wrong.
func (r *reconciler) strands(cfg config.Config, network gateway.Network) *flows.Strands {
	f := r.firewall
	if f.user == nil || f.unread != nil {
		return nil
	}
	return &flows.Strands{
		Rules: f.user, Routes: f.router(cfg, network), Fixed: f.fixedFlows(cfg), Shares: r.rerouted.shared, Had: f.known,
		Former:      f.given(f.mappingConfig(cfg), network).Former,
		Permissions: r.permissions,
		Rerouted: func(has func(cone.Permission) bool) {
			r.ask(func(l *loop) { l.engine.Model.SetRerouted(r.now(), has) })
		},
	}
}

// permissions shows all permissions of the model, some at a time.
func (r *reconciler) permissions(see func(cone.View)) error {
	for at := 0; at >= 0; {
		if !r.ask(func(l *loop) { at = l.engine.Model.Walk(at, flowsAtOnce, see) }) {
			return errEnded
		}
	}
	return nil
}

// beginStranded begins a look for children with a wrong address, which needs to see all flows, with
// or without a permission now. It returns nil if it cannot be known which address is wrong, and soon
// after a look that took long.
func (r *reconciler) beginStranded(cfg config.Config, network gateway.Network) (*flows.Strands, error) {
	s := r.strands(cfg, network)
	if s == nil || r.now() < r.rerouted.next {
		return nil, nil
	}
	return s, s.Begin(network)
}

// endStranded ends the children with a wrong address among the flows that s saw, and the permissions
// that would admit them again.
func (r *reconciler) endStranded(s *flows.Strands, q *ctwatch.Queries) error {
	if len(r.rerouted.stale) == 0 {
		r.rerouted.rules = r.firewall.user
	}
	var n int
	var err error
	took := budget.ThreadTime(func() { n, err = s.End(q, r.rerouted.stale) })
	r.rerouted.next = r.now() + rerouteShare*took
	r.noted.Note(slog.LevelInfo, "stranded", "children and flows with mappings had an outside address that their hosts' packets no longer get; they ended", uint64(n))
	return err
}

// lookForStranded looks at all flows for children with a wrong address, and ends them.
func (r *reconciler) lookForStranded(cfg config.Config, network gateway.Network) error {
	s, err := r.beginStranded(cfg, network)
	if s == nil || err != nil {
		return err
	}
	if err := r.reads.Dump(s.See); err != nil {
		return err
	}
	return r.endStranded(s, r.reads)
}

// strandsAny reports whether one of these new children has a wrong address.
func (r *reconciler) strandsAny(cfg config.Config, children []cone.Flow) (bool, error) {
	s := r.strands(cfg, r.network)
	if s == nil {
		return false, nil
	}
	return s.Any(r.network, children)
}

// forgetStale lets flows give permissions again that ended because their addresses were wrong:
// routes or rules changed since.
func (r *reconciler) forgetStale() {
	if len(r.rerouted.stale) == 0 {
		return
	}
	r.rerouted.stale, r.rerouted.strands = make(flows.Stale), true
	r.ask(func(l *loop) { l.engine.Model.SetRerouted(r.now(), nil) })
	r.wantReconcile()
}

// forgetStaleByRules does so if the user's source NAT changed.
func (r *reconciler) forgetStaleByRules() {
	if !r.firewall.user.SameSources(r.rerouted.rules) {
		r.forgetStale()
	}
}
