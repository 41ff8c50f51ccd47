package daemon

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
)

// filterEvents leaves out the events of flows that the daemon does not need. Where the guard
// stands, early packets from outside make no flows except to local sockets; the next
// reconcile finds a flow that outlives its socket. Without the guard, early flows to other ports
// are reported when they begin. Flows that the user's forwards lead inside
// do not matter if all his rules are known: where a rule may forward a packet, no permission
// stands except for the host to which it leads. All events pass with a
// VRF, whose links the guard does not know.
func (r *reconciler) filterEvents(cfg config.Config) error {
	r.unheard, r.unheardServed = r.firewall.understood, nil
	if r.hasVRF() {
		return r.events.SetSources(ctwatch.Sources{})
	}
	s := ctwatch.Sources{Prefixes: slices.Concat(prefixes(cfg.Subnets), r.ownAddresses(cfg)), Labelled: r.firewall.labels() && r.firewall.forwardsKnown}
	if s.Early = !r.guarded(cfg); s.Early {
		r.unheardServed = r.servedRanges()
		s.Served = r.unheardServed
	}
	for p := range r.firewall.understood.Parts() {
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

// hearServed filters events again if the filter depends on the gateway's sockets and they have
// changed.
func (r *reconciler) hearServed(cfg config.Config) error {
	if r.hasVRF() || r.guarded(cfg) || slices.Equal(r.servedRanges(), r.unheardServed) {
		return nil
	}
	return r.filterEvents(cfg)
}

// servedRanges returns what lasting sockets of the gateway receive over IPv4, the lowest ports first.
func (r *reconciler) servedRanges() (all []ctwatch.Range) {
	everybody, last := netip.IPv4Unspecified(), netip.AddrFrom4([4]byte{255, 255, 255, 255})
	for e := range r.served.All() {
		switch a := e.Addr.Netip(); {
		case !a.Is4() || e.Port == 0:
		case a == everybody:
			all = append(all, ctwatch.Range{FirstAddr: a, LastAddr: last, FirstPort: e.Port, LastPort: e.Port})
		default:
			all = append(all, ctwatch.Range{FirstAddr: a, LastAddr: a, FirstPort: e.Port, LastPort: e.Port})
		}
	}
	slices.SortFunc(all, func(a, b ctwatch.Range) int {
		return cmp.Or(cmp.Compare(a.FirstPort, b.FirstPort), a.FirstAddr.Compare(b.FirstAddr))
	})
	return all
}
