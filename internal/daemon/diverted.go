package daemon

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

// divert reads which ports of peers rules of the user's take from inside hosts, and reports
// whether the tables must change for it. What was read before holds if rules cannot be read.
func (f *firewall) divert(network gateway.Network) (changed bool) {
	if f.unread != nil || f.user == nil {
		return false
	}
	next := rules.Diverted{}
	own, inside := network.Topology().Local, insideLinks(network)
	if len(inside) == 0 {
		inside = []userrules.Link{{}} // no rule is for it by its name
	}
	for _, d := range f.diverter.Diversions(f.user, inside, outsideLinks(network)) {
		ports := &next.Ports
		if d.Peers != nil {
			// The gateway's own addresses are no peers.
			peers := slices.DeleteFunc(slices.Clone(d.Peers), func(p netip.Prefix) bool { return p.IsSingleIP() && slices.Contains(own, p.Addr()) })
			if len(peers) == 0 {
				continue
			}
			next.Peers, ports = append(next.Peers, peers...), &next.PeerPorts
		}
		for _, r := range d.Ports {
			for port := int(r.First); port <= int(r.Last); port++ {
				*ports = append(*ports, uint16(port))
			}
		}
	}
	changed = !reflect.DeepEqual(next, f.diverted)
	f.diverted = next
	return changed
}

// insideLinks returns the links that lead to enabled subnets.
func insideLinks(network gateway.Network) (links []userrules.Link) {
	for _, l := range network.Links {
		if l.Inside {
			links = append(links, userrules.Link{Index: l.Index, Name: l.Name})
		}
	}
	return links
}

// readDiversions brings the tables up to date about what rules of the user's take from inside
// hosts, and ends the children that would keep packets from these rules.
func (r *reconciler) readDiversions(cfg config.Config, network gateway.Network) error {
	if !r.firewall.divert(network) {
		return nil
	}
	_, err := r.firewall.set(cfg, network.OutsideLinks())
	_, failed := r.firewall.fixedFlows(cfg).end(func(sent *cone.Flow) bool {
		return sent.IsChild() && takes(&r.firewall.diverted, sent.ReplySrc.Netip())
	})
	return errors.Join(err, failed)
}

// takes reports whether no child gets in from a peer's port.
func takes(d *rules.Diverted, peer netip.AddrPort) bool {
	return slices.Contains(d.Ports, peer.Port()) || slices.Contains(d.PeerPorts, peer.Port()) &&
		slices.ContainsFunc(d.Peers, func(p netip.Prefix) bool { return p.Contains(peer.Addr()) })
}
