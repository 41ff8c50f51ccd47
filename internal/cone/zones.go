package cone

import (
	"net/netip"
	"slices"
)

// Zones says which conntrack zones flows have had since the daemon started.
type Zones struct {
	// Original says that some flow had a zone in its original direction only.
	Original bool
	// Both says that some translated flow had a zone in its reply direction. It may be a
	// flow of another network, with the outside endpoints of flows in zone 0.
	Both bool
	// Several are the enabled subnets with translated flows in more than one zone of the
	// original direction: hosts of two networks may have the same addresses.
	Several []netip.Prefix
	// Replies are the enabled subnets with translated flows that have a zone in their reply
	// direction. Only expectations stand there.
	Replies []netip.Prefix
	// Outside are outside addresses of enabled hosts, in zone 0, at most mostOutside of each family.
	Outside []netip.Addr
}

const mostOutside = 16

// OneDirection reports whether zones are given to the original direction only, and the
// hosts of each enabled subnet are in a single zone.
func (z Zones) OneDirection() bool { return z.Original && !z.Both && len(z.Several) == 0 }

// Zones returns the zones that flows had. The caller must not change the slices.
func (m *Model) Zones() Zones { return m.zones }

// AdoptZones sets what an earlier daemon knew of zones.
func (m *Model) AdoptZones(z Zones) { m.zones = z }

// noteZones notes the zones of any flow.
func (m *Model) noteZones(f *Flow) {
	switch {
	case f.ReplyZone == 0:
		m.zones.Original = m.zones.Original || f.OrigZone != 0
	case f.Status.Has(StatusSrcNAT) || f.Status.Has(StatusDstNAT):
		m.zones.Both = true
	}
}

// noteSubnetZone notes the zone of f, a translated flow of s. The gateway's own flows are of no
// subnet.
func (m *Model) noteSubnetZone(f *Flow, s Subnet) {
	z := &m.zones
	switch {
	case !s.Prefix.IsValid():
		return
	case f.ReplyZone != 0:
		if !slices.Contains(z.Replies, s.Prefix) {
			z.Replies = append(slices.Clip(z.Replies), s.Prefix)
		}
		return
	}
	if zone, known := m.inZone[s.Prefix]; !known {
		if m.inZone == nil {
			m.inZone = make(map[netip.Prefix]uint16)
		}
		m.inZone[s.Prefix] = f.OrigZone
	} else if zone != f.OrigZone && !slices.Contains(z.Several, s.Prefix) {
		z.Several = append(slices.Clip(z.Several), s.Prefix)
	}
	n, a := 0, f.ReplyDst.Addr.Netip()
	for _, o := range z.Outside {
		if o.Is4() == a.Is4() {
			n++
		}
	}
	if n < mostOutside && !slices.Contains(z.Outside, a) {
		z.Outside = append(slices.Clip(z.Outside), a)
	}
}

// A SecondZone is a conntrack zone that has flows of a subnet untranslated while another
// zone has them translated, as for a host behind a bridge with its own firewall.
type SecondZone struct {
	Subnet netip.Prefix
	Zone   uint16
}

// mostInZones bounds the untranslated flows in zones that are remembered.
const mostInZones = 64

// ends are the endpoints of a flow before translation.
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

// noteUntranslated remembers f, which is untranslated, if it is not in zone 0.
func (m *Model) noteUntranslated(f *Flow) {
	if f.ReplyZone == 0 {
		return
	}
	for _, in := range []*map[ends]uint16{&m.skips.inZones, &m.snap.inZones} {
		if *in == nil || len(*in) >= mostInZones {
			*in = make(map[ends]uint16)
		}
		(*in)[ends{f.Src, f.Dst}] = f.ReplyZone
	}
}

// noteSecondZone notes the second zone of s if f, a translated flow of s, is untranslated in
// another zone.
func (m *Model) noteSecondZone(f *Flow, s Subnet) {
	zone, is := m.skips.inZones[ends{f.Src, f.Dst}]
	if !is || zone == f.ReplyZone {
		return
	}
	for _, second := range []*map[netip.Prefix]uint16{&m.skips.second, &m.snap.second} {
		if *second == nil {
			*second = make(map[netip.Prefix]uint16)
		}
		(*second)[s.Prefix] = zone
	}
}
