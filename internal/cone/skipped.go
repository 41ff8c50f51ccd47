package cone

import (
	"maps"
	"net/netip"
)

// A LinkLookup finds the link by which a peer that is not outside is reached. It knows only routes
// by links that are not outside links.
type LinkLookup func(peer netip.Addr) (link string, ok bool)

// Elsewhere counts flows of enabled hosts whose peer is behind a link that is not an
// outside link and does not lead to an enabled subnet.
type Elsewhere struct {
	Flows uint64
	// Translated counts those of them that were source-NATed, to a peer on the Internet.
	Translated uint64
}

// Untranslated counts the flows of a subnet that went outside without source NAT.
type Untranslated struct {
	Subnet netip.Prefix
	Flows  uint64
}

// mostLinks bounds the links that are counted one by one: links may come and go.
const mostLinks = 64

// skips holds details, beyond a Reason, of why flows gave no permission.
type skips struct {
	linkTo       LinkLookup // may be nil
	elsewhere    map[string]Elsewhere
	untranslated map[netip.Prefix]uint64   // untranslated flows, by subnet
	translated   map[netip.Prefix]struct{} // subnets that had a translated flow
	inZones      map[ends]uint16           // untranslated flows in zones
	second       map[netip.Prefix]uint16   // the second zone of subnets
}

// SetLinkLookup sets how peers that are not outside are reached. w belongs to the present
// Topology.
func (m *Model) SetLinkLookup(w LinkLookup) { m.skips.linkTo = w }

// Elsewhere returns the counts since the start, by link.
func (m *Model) Elsewhere() map[string]Elsewhere { return maps.Clone(m.skips.elsewhere) }

// Untranslated returns the enabled subnets that had flows outside without source NAT, and
// none with it.
func (m *Model) Untranslated() (all []Untranslated) {
	for _, s := range m.policy.Subnets {
		_, translated := m.skips.translated[s.Prefix]
		if n := m.skips.untranslated[s.Prefix]; n > 0 && !translated {
			all = append(all, Untranslated{s.Prefix, n})
		}
	}
	return all
}

// HasTraffic reports whether the model knows traffic of an enabled subnet with peers outside: a
// flow, translated or not, or a permission that stands.
func (m *Model) HasTraffic(subnet netip.Prefix) bool {
	for i, s := range m.policy.Subnets {
		if s.Prefix == subnet {
			_, translated := m.skips.translated[subnet]
			return translated || m.skips.untranslated[subnet] > 0 || m.subnets[i].standing > 0
		}
	}
	return false
}

// skip counts f, a flow of an enabled host that gives no permission because of r.
func (m *Model) skip(f *Flow, r Reason) {
	if m.snap.fromDump { // it was counted before
		return
	}
	if r == ReasonPeerInside {
		r = m.whyInside(f)
	}
	m.stats.Skipped[r]++
}

// whyInside returns a more precise reason for a peer that is not outside.
func (m *Model) whyInside(f *Flow) Reason {
	peer := f.ReplySrc.Addr.Netip()
	if _, _, inside := m.policy.subnet(peer); inside || m.skips.linkTo == nil {
		return ReasonPeerInside
	}
	link, ok := m.skips.linkTo(peer)
	switch {
	case !ok:
		return ReasonNoRoute
	case m.leadsInside(link, f.Src.Addr.Netip()):
		return ReasonPeerInside
	}
	s := &m.skips
	if _, known := s.elsewhere[link]; !known {
		if len(s.elsewhere) == mostLinks {
			return ReasonNotOutside
		}
		if s.elsewhere == nil {
			s.elsewhere = make(map[string]Elsewhere)
		}
	}
	n := s.elsewhere[link]
	n.Flows++
	if f.Status.Has(StatusSrcNAT) && onInternet(peer) {
		n.Translated++
	}
	s.elsewhere[link] = n
	return ReasonNotOutside
}

var sharedAddresses = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598

// leadsInside reports whether a link leads to host or to an enabled subnet.
func (m *Model) leadsInside(link string, host netip.Addr) bool {
	if l, ok := m.skips.linkTo(host); ok && l == link {
		return true
	}
	for _, s := range m.policy.Subnets {
		if l, ok := m.skips.linkTo(s.Prefix.Addr().Next()); ok && l == link {
			return true
		}
	}
	return false
}

// seeUntranslated handles a flow of an enabled host that was not source-NATed. It counts f if s is
// not routed and the peer is outside: such a packet waits for an answer in vain.
func (m *Model) seeUntranslated(f *Flow, s Subnet) {
	if s.Routed || !f.Src.Addr.Is4() || f.Status.Has(StatusDstNAT) {
		return
	}
	if _, local := m.topo.local[f.ReplySrc.Addr]; local || m.policy.refusesEndpoint(f.ReplyDst, f.ReplySrc, &m.topo) != ReasonNone {
		return
	}
	m.noteUntranslated(f) // in a snapshot too: there may be no event of f
	if m.snap.fromDump {
		return
	}
	m.stats.Skipped[ReasonUntranslated]++
	if m.skips.untranslated == nil {
		m.skips.untranslated = make(map[netip.Prefix]uint64)
	}
	m.skips.untranslated[s.Prefix]++
}

// seeTranslated handles f, a flow of s to a peer outside that was source-NATed. It costs next
// to nothing while all flows are.
func (m *Model) seeTranslated(f *Flow, s Subnet) {
	m.noteSecondZone(f, s)
	if len(m.skips.untranslated) == 0 {
		return
	}
	if m.skips.translated == nil {
		m.skips.translated = make(map[netip.Prefix]struct{})
	}
	m.skips.translated[s.Prefix] = struct{}{}
}
