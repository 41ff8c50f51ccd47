package daemon

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/conenatd/conenatd/internal/budget"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/flows"
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
	// mostBorn is how many new children wait for a look.
	mostBorn = 64
)

// rerouted is the search for flows that leave by another link than the one of their address.
type rerouted struct {
	looks   int             // looks still to come, since routes changed
	strands bool            // a look at children and their permissions alone is to come
	next    time.Duration   // earliest time of the next look
	outside map[string]bool // names of current and former outside links
	shared  bool            // a route to outside links has several next hops

	stale flows.Stale
	rules *userrules.Ruleset // when the first of stale ended
}

// due reports whether there is a look to come.
func (r *rerouted) due() bool { return r.looks > 0 || r.strands }

// endRerouted ends the flows of hosts with mappings that, after routes changed, leave by
// another link than the one that has their address, and the children whose hosts' packets do.
// The kernel does so for a masquerade, packet by packet, and these must recover as well.
func (r *reconciler) endRerouted(cfg config.Config, network gateway.Network) error {
	for _, l := range network.Links {
		if l.Outside&gateway.IPv4 != 0 && l.Cause != gateway.SharedLink {
			r.rerouted.outside[l.Name] = true
		}
	}
	if !r.rerouted.due() || r.now() < r.rerouted.next {
		return nil
	}
	var n, doubtful int
	var errs [2]error
	took := budget.ThreadTime(func() {
		if errs[1] = r.lookForStranded(cfg, network); r.rerouted.looks == 0 {
			return
		}
		fixed, unknown := r.firewall.fixedSources()
		n, doubtful, errs[0] = r.firewall.fixedFlows(cfg).EndWrongLinks(network, r.firewall.router(cfg, network), r.rerouted.outside, fixed, unknown)
	})
	err := errors.Join(errs[:]...)
	r.log.Debug("looked for flows that leave by another link than the one of their address", "ended", n)
	r.rerouted.looks = max(0, r.rerouted.looks-1)
	r.rerouted.strands = errs[1] != nil
	if doubtful == 0 && err == nil {
		r.rerouted.looks = 0
	}
	r.rerouted.next = r.now() + rerouteShare*took
	if doubtful > 0 || err != nil {
		r.rerouted.next = max(r.rerouted.next, r.now()+time.Second)
	}
	r.noted.Note(slog.LevelInfo, "rerouted", "flows with mappings left by another link than the one of their address; they ended", uint64(n))
	return err
}

// lookAtFlows runs the looks at the outside addresses of flows that are due.
func (r *reconciler) lookAtFlows(ctx context.Context) {
	r.budget.Also(func() {
		if err := r.endReroutedLater(); ctx.Err() == nil {
			r.failures.Note(requestLookAtRoutes, 1, err)
		}
		if err := r.lookForBroken(); ctx.Err() == nil {
			r.failures.Note(requestLookForBroken, 1, err)
		}
	})
}

// endReroutedLater does what endRerouted put off, and looks at children that began since. If one
// of these has a wrong address, it looks at all flows.
func (r *reconciler) endReroutedLater() error {
	if !r.rerouted.due() && len(r.born) == 0 || r.now() < r.rerouted.next {
		return nil
	}
	var cfg config.Config
	if !r.ask(func(l *loop) { cfg = l.cfg }) {
		return nil
	}
	var err error
	if children := received(r.born); !r.rerouted.due() {
		took := budget.ThreadTime(func() { r.rerouted.strands, err = r.strandsAny(cfg, children) })
		r.rerouted.strands = r.rerouted.strands || len(children) == mostBorn // there were more, perhaps
		r.rerouted.next = r.now() + rerouteShare*took
	}
	return errors.Join(err, r.endRerouted(cfg, r.network))
}

// received returns what waits in a channel.
func received[T any](c <-chan T) (all []T) {
	for range len(c) {
		all = append(all, <-c)
	}
	return all
}
