package gateway

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// known holds the part of a Network that tells which messages change one of its answers.
type known struct {
	links map[int]Link
	used  map[int]bool // links with an address or a route
	addrs map[Addr]bool
	named []string

	noted    map[int]Link        // links as the last message about each says
	segments map[string][]string // of noted
	bridges  []string            // of noted

	subnets    []netip.Prefix // enabled subnets
	viaObjects bool           // the kernel names no links in routes by nexthop objects

	inside   map[Route]bool        // routes by links that are not outside links
	covered  map[netip.Prefix]bool // prefixes of inside
	defaults [2]bool               // whether an outside link has a default route, for IPv4 and IPv6
	ways     bool                  // it matters by which outside link packets leave
}

func newKnown(n Network, named []string, ways bool) *known {
	k := &known{
		ways:       ways && len(n.OutsideLinks()) > 1,
		viaObjects: n.viaObjects, noted: n.links(), segments: n.Segments(), bridges: n.Bridges(),
		links: n.links(), used: n.used(), addrs: map[Addr]bool{}, inside: map[Route]bool{}, covered: map[netip.Prefix]bool{}, named: slices.Clone(named),
	}
	if n.places != nil {
		k.subnets = n.places.subnets
	}
	for _, a := range n.Addrs {
		if !local(a.Prefix.Addr()) {
			k.addrs[a] = true
		}
	}
	for _, r := range n.Routes {
		if local(r.Prefix.Addr()) {
			continue
		}
		switch l := k.links[r.Link]; {
		case !l.outsideFor(r.Prefix):
			k.inside[r], k.covered[r.Prefix.Masked()] = true, true
		case r.Prefix.Bits() == 0:
			k.defaults[familyIndex(r.Prefix)] = true
		}
	}
	return k
}

// local reports whether a is an address that no peer has.
func local(a netip.Addr) bool { return a.IsLoopback() || a.IsLinkLocalUnicast() }

func familyIndex(p netip.Prefix) int {
	if p.Addr().Is4() {
		return 0
	}
	return 1
}

// matters reports whether a message may change an answer; in doubt it returns true.
func (k *known) matters(m netlink.Message) bool {
	var r reader
	var err error
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if len(m.Data) > 0 && m.Data[0] == unix.AF_BRIDGE { // about a port; what changes here has another message
			return false
		}
		err = r.link(m.Data)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		err = r.addr(m.Data)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		err = r.route(m.Data)
	case unix.RTM_NEWNEXTHOP: // a route that names links has a message of its own
		return k.viaObjects
	default: // a routing rule, or a nexthop that is gone, and its IPv4 routes with it
		return true
	}
	gone := m.Header.Type == unix.RTM_DELLINK || m.Header.Type == unix.RTM_DELADDR || m.Header.Type == unix.RTM_DELROUTE
	return err != nil || len(r.byNexthop) > 0 ||
		slices.ContainsFunc(r.Links, func(l Link) bool { return k.linkMatters(l, gone) }) ||
		slices.ContainsFunc(r.Addrs, func(a Addr) bool { return !local(a.Prefix.Addr()) && (gone || !k.addrs[a]) }) ||
		slices.ContainsFunc(r.Routes, func(r Route) bool { return k.routeMatters(r, gone) })
}

// segmentsChange notes the link, and reports whether Segments or Bridges changed.
func (k *known) segmentsChange(l Link, gone bool) bool {
	old, there := k.noted[l.Index]
	switch {
	case gone:
		delete(k.noted, l.Index)
	case there && old.sameSegment(l): // as most messages
		return false
	default:
		k.noted[l.Index] = l
	}
	return !maps.EqualFunc(k.segments, segments(k.noted, k.used), slices.Equal) || !slices.Equal(k.bridges, bridges(k.noted, k.used))
}

// linkMatters is matters for a link. Its addresses and routes have messages of their own,
// except the IPv4 routes that end with the link, or because it goes down.
func (k *known) linkMatters(l Link, gone bool) bool {
	old, there := k.links[l.Index]
	switch {
	case k.segmentsChange(l, gone):
		return true
	case slices.Contains(k.named, l.Name) || there && slices.Contains(k.named, old.Name):
		return !there || gone || old.Name != l.Name || (old.Flags^l.Flags)&(unix.IFF_UP|unix.IFF_RUNNING) != 0
	case !there || old.Outside == 0 && !k.used[l.Index]:
		return false
	}
	flags := uint32(unix.IFF_UP | unix.IFF_LOOPBACK)
	if k.ways || old.Outside != 0 || old.Inside { // status tells whether these run
		flags |= unix.IFF_RUNNING
	}
	return gone || old.Name != l.Name || (old.Flags^l.Flags)&flags != 0
}

// routeMatters is matters for a route. If an outside link has a default route, and the ways
// do not matter, a further route by an outside link matters only if it lies within a route
// by another link, if it is a reason why the link is an outside link (RuledNAT, SeenNAT),
// or if it leads to an enabled subnet.
func (k *known) routeMatters(r Route, gone bool) bool {
	l, there := k.links[r.Link]
	switch {
	case local(r.Prefix.Addr()), there && l.is(unix.IFF_LOOPBACK):
		return false
	case !there, isDefault(r.Prefix):
		return true
	case !l.outsideFor(r.Prefix):
		return gone || !k.inside[r]
	case k.ways, !k.defaults[familyIndex(r.Prefix)], l.Cause == RuledNAT, l.Cause == SeenNAT, slices.ContainsFunc(k.subnets, r.Prefix.Overlaps):
		return true
	}
	for bits := 0; bits <= r.Prefix.Bits(); bits++ {
		if k.covered[netip.PrefixFrom(r.Prefix.Addr(), bits).Masked()] {
			return true
		}
	}
	return false
}
