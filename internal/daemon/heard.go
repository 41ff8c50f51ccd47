package daemon

import (
	"slices"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
)

// filterEvents leaves out the events of flows that the daemon does not need. Where the guard
// stands, early packets from outside make no flows except to local sockets; the next
// reconcile finds a flow that outlives its socket. Flows that the user's forwards lead inside
// do not matter if all his rules are known. All events pass without the guard, and with a
// VRF, whose links the guard does not know.
func (r *reconciler) filterEvents(cfg config.Config) error {
	r.unheard = r.firewall.taken
	if !r.guarded(cfg) {
		return r.events.SetSources(ctwatch.Sources{})
	}
	s := ctwatch.Sources{Prefixes: slices.Concat(prefixes(cfg.Subnets), r.ownAddresses(cfg)), Labelled: r.firewall.labels() && r.firewall.forwardsKnown}
	for p := range r.firewall.taken.Parts() {
		if !p.Addrs.First.Is4() {
			continue
		}
		led := ctwatch.Range{FirstAddr: p.Addrs.First, LastAddr: p.Addrs.Last, FirstPort: p.Ports.First, LastPort: p.Ports.Last}
		if p.Sources == nil {
			s.Forwarded = append(s.Forwarded, led)
		}
		for _, from := range p.Sources {
			if led.FirstSource, led.LastSource = from.First, from.Last; from.First.Is4() {
				s.Forwarded = append(s.Forwarded, led)
			}
		}
	}
	return r.events.SetSources(s)
}
