package cone

import (
	"net/netip"
	"slices"
)

const (
	// mostStrays bounds the flows that wait for a call of Strays.
	mostStrays = 64
	// mostStrayPeers bounds the peers that are remembered as returned.
	mostStrayPeers = 4096
)

// strays are translated flows to peers on the Internet that are not behind an outside link,
// or whose outside address belongs to no outside link. Each may show another outside link.
type strays struct {
	flows []Flow
	peers map[Addr]struct{} // peers of flows that were returned since the topology changed
}

// Strays returns the strays since the last call: one for each peer, until the topology
// changes.
func (m *Model) Strays() []Flow {
	flows := m.strays.flows
	m.strays.flows = nil
	return flows
}

// HasStrays reports whether Strays would return a flow.
func (m *Model) HasStrays() bool { return len(m.strays.flows) > 0 }

// StrayLinks returns the links by which the flows that Strays would return leave, as far as SetLinkLookup
// knows them.
func (m *Model) StrayLinks() (links []string) {
	if m.skips.linkTo == nil {
		return nil
	}
	for i := range m.strays.flows {
		if link, ok := m.skips.linkTo(m.strays.flows[i].ReplySrc.Addr.Netip()); ok && !slices.Contains(links, link) {
			links = append(links, link)
		}
	}
	return links
}

// stray notes a flow of an enabled host that may show an outside link.
func (m *Model) stray(f *Flow) {
	s := &m.strays
	peer := f.ReplySrc.Addr
	if _, told := s.peers[peer]; told || len(s.flows) == mostStrays || !mayStray(f) {
		return
	}
	if _, _, inside := m.policy.subnet(peer.Netip()); inside {
		return
	}
	if s.peers == nil || len(s.peers) == mostStrayPeers {
		s.peers = make(map[Addr]struct{})
	}
	s.peers[peer] = struct{}{}
	s.flows = append(s.flows, *f)
}

// IsStray reports whether f, a flow of any host, may show an outside link that t does not
// know. t must be compiled.
func IsStray(f *Flow, t Topology) bool {
	return mayStray(f) && (!t.outside.has(f.ReplySrc.Addr.Netip()) || t.Doubtful && !slices.Contains(t.Uplinks, f.ReplyDst.Addr.Netip()))
}

func mayStray(f *Flow) bool {
	peer := f.ReplySrc.Addr.Netip()
	return f.Status.Has(StatusSrcNAT) && !f.Status.Has(StatusDstNAT) && f.Src.Addr.Is4() && !IsAnchor(f.Src, f.Dst) && onInternet(peer)
}

// onInternet reports whether a is not an address that networks use inside.
func onInternet(a netip.Addr) bool {
	return unicast(a) && !a.IsPrivate() && !sharedAddresses.Contains(a)
}
