package rules

import (
	"net/netip"

	"github.com/google/nftables"
)

// Diverted are ports of peers from which no child gets in: rules of the user's redirect what
// inside hosts send there, or give it a conntrack helper. All that a host sends to the peer's
// port of a child belongs to the child's flow, so that these rules would not see it.
type Diverted struct {
	Ports     []uint16 // of any peer
	Peers     []netip.Prefix
	PeerPorts []uint16 // of Peers alone
}

// Names of sets.
const (
	divertedPortsSet     = "diverted_ports"
	divertedPeersSet     = "diverted_peers_" // and the family
	divertedPeerPortsSet = "diverted_peer_ports"
)

// diverted adds rules to c that end with verdict for the first packets of such children.
func (l *layout) diverted(c *nftables.Chain, d *Diverted, families []*ipFamily, verdict exprs) {
	const comment = "your rules take what hosts send to that port"
	if len(d.Ports) > 0 {
		l.rule(c, comment, udpSport.in(l.portSet(divertedPortsSet, d.Ports)), isUDP, verdict)
	}
	for _, f := range families {
		es := f.intervals(d.Peers)
		if len(es) == 0 || len(d.PeerPorts) == 0 {
			continue
		}
		peers := l.named(divertedPeersSet + f.name)
		if peers == nil {
			peers = l.set(divertedPeersSet+f.name, f.addr)
			peers.Interval, peers.elements = true, es
		}
		is := f.is
		if l.table.Family == nftables.TableFamilyIPv4 {
			is = nil
		}
		l.rule(c, comment, is, f.saddr.in(peers), udpSport.in(l.portSet(divertedPeerPortsSet, d.PeerPorts)), isUDP, verdict)
	}
}

// portSet returns the set with that name, which has the ports.
func (l *layout) portSet(name string, ports []uint16) *set {
	s := l.named(name)
	if s == nil {
		s = l.set(name, nftables.TypeInetService)
		s.setPorts(ports)
	}
	return s
}
