package daemon

import (
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
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
		Rules: f.user, Routes: f.router(cfg, network), Fixed: f.fixedFlows(cfg), Shares: r.rerouted.shared,
		Orphans:     !f.dumped, // an earlier daemon may have left children without permissions
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

// endStranded ends children with a wrong address, and the permissions that would admit them again.
func (r *reconciler) endStranded(cfg config.Config, network gateway.Network) (ended int, err error) {
	s := r.strands(cfg, network)
	if s == nil {
		return 0, nil
	}
	if len(r.rerouted.stale) == 0 {
		r.rerouted.rules = r.firewall.user
	}
	return s.End(network, r.rerouted.stale)
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
