package cone

import "net/netip"

// Zones says which conntrack zones translated flows of enabled hosts have.
type Zones struct {
	Original bool // some of the original direction alone: their outside endpoints are of zone 0
	Both     bool // some of both directions
}

// Zones returns what the flows had that the last snapshot showed, and those since then.
func (m *Model) Zones() Zones { return m.zones }

// noteZone notes the zones of a translated flow.
func (m *Model) noteZone(f *Flow) {
	m.snap.translated = true
	for _, z := range []*Zones{&m.zones, &m.snap.zones} {
		z.Both = z.Both || f.ReplyZone != 0
		z.Original = z.Original || f.ReplyZone == 0 && f.OrigZone != 0
	}
}

// A SecondZone is a conntrack zone in which flows of a subnet are untranslated that another
// zone has translated, as of a host behind a bridge with a firewall of its own.
type SecondZone struct {
	Subnet netip.Prefix
	Zone   uint16
}

// mostInZones bounds the untranslated flows in zones that are remembered.
const mostInZones = 64

// ends are those of a flow before it was translated.
type ends struct{ in, peer Endpoint }

// SecondZones returns the second zone of each subnet that has one and is not routed.
func (m *Model) SecondZones() (all []SecondZone) {
	for _, s := range m.policy.Subnets {
		if zone, has := m.skips.second[s.Prefix]; has && !s.Routed {
			all = append(all, SecondZone{s.Prefix, zone})
		}
	}
	return all
}

// plainInZone remembers f, which is untranslated, if it is in a zone.
func (m *Model) plainInZone(f *Flow) {
	if f.ReplyZone == 0 {
		return
	}
	if m.skips.inZones == nil || len(m.skips.inZones) >= mostInZones {
		m.skips.inZones = make(map[ends]uint16)
	}
	m.skips.inZones[ends{f.Src, f.Dst}] = f.ReplyZone
}

// translatedToo looks whether f, a translated flow of s, is untranslated in another zone.
func (m *Model) translatedToo(f *Flow, s Subnet) {
	zone, is := m.skips.inZones[ends{f.Src, f.Dst}]
	if !is || zone == f.ReplyZone {
		return
	}
	if m.skips.second == nil {
		m.skips.second = make(map[netip.Prefix]uint16)
	}
	m.skips.second[s.Prefix] = zone
}
