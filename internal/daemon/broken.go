package daemon

import (
	"fmt"
	"log/slog"

	"github.com/conenatd/conenatd/internal/budget"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/flows"
)

// lookForBroken looks for broken flows if something changed, and counts them. With heal_flows
// it ends them.
func (r *reconciler) lookForBroken() error {
	r.broken.SawRules(r.firewall.user)
	if !r.broken.Due(r.now()) {
		return nil
	}
	var cfg config.Config
	if !r.ask(func(l *loop) { cfg = l.cfg }) {
		return nil
	}
	ended, all, finished, err := r.broken.Look(r.viewOfFlows(cfg), budget.ThreadTime)
	if err != nil {
		return fmt.Errorf("look for flows with another source than rules give: %w", err)
	}
	r.noted.Note(slog.LevelInfo, "healed", "flows left with another source than your rules give now; they ended", uint64(ended))
	r.ask(func(l *loop) {
		if finished {
			l.brokenNow = brokenFlows(all)
		}
		l.healed += uint64(ended)
		l.warned.Tell(r.now(), l.warnings())
	})
	return nil
}

// viewOfFlows returns what flows are judged by.
func (r *reconciler) viewOfFlows(cfg config.Config) *flows.View {
	f := r.firewall
	v := &flows.View{
		Network: r.network, Routes: f.router(cfg, r.network),
		Now: r.now, Pause: r.lookBetween, Heal: cfg.HealFlows,
	}
	if f.unread == nil {
		v.Rules = f.user
	}
	for _, s := range cfg.Subnets {
		v.Subnets = append(v.Subnets, flows.Subnet{
			Prefix: s.Prefix, Routed: s.Routed, Mapped: f.mapping && s.Mapping == config.EndpointIndependentMapping,
		})
	}
	return v
}

// brokenFlows returns what status shows of broken flows.
func brokenFlows(all []flows.Broken) (shown []control.BrokenFlows) {
	for _, b := range all {
		shown = append(shown, control.BrokenFlows(b))
	}
	return shown
}

// warnBroken warns of flows that cannot work any more.
func (l *loop) warnBroken(out *warnings) {
	for _, b := range l.brokenNow {
		how, about := "untranslated", fmt.Sprint(b.Subnet, " ", b.Link)
		if b.Source.IsValid() {
			how = fmt.Sprintf("with the address %v", b.Source)
			about += " " + b.Source.String()
		}
		advice := "heal_flows = true ends such flows"
		switch {
		case b.CameBack:
			advice = "they came back as they were when heal_flows ended them, so something else than your rules translates them"
			about += " came back"
		case l.cfg.HealFlows:
			advice = "they are being ended"
		}
		out.add(warnBrokenFlows, about, "%s of %v left by %s %s, such as that of %v to %v, where your rules would give another source now: %s",
			control.Several(b.Flows, "flow"), b.Subnet, b.Link, how, b.Int, b.Peer, advice)
	}
}
