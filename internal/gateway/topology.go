package gateway

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// Topology returns what the model must know. It leaves out loopback and link-local
// addresses and routes: no peer has such an address.
func (n Network) Topology() cone.Topology {
	var t cone.Topology
	for _, a := range n.Addrs {
		if ip := a.Prefix.Addr(); !local(ip) {
			t.Local = append(t.Local, ip)
		}
	}
	links := n.links()
	t.Doubtful = slices.ContainsFunc(n.Links, func(l Link) bool { return l.Unused&IPv4 != 0 })
	if t.Doubtful {
		for _, a := range n.Addrs {
			if links[a.Link].outsideFor(a.Prefix) {
				t.Uplinks = append(t.Uplinks, a.Prefix.Addr())
			}
		}
	}
	for _, r := range n.Routes {
		l, known := links[r.Link]
		// A default route by a link that is not an outside link says nothing about any
		// peer.
		if !known || l.is(unix.IFF_LOOPBACK) || r.Prefix.Addr().IsLinkLocalUnicast() || isDefault(r.Prefix) && !l.outsideFor(r.Prefix) {
			continue
		}
		t.Routes = append(t.Routes, cone.Route{Prefix: r.Prefix, Outside: l.outsideFor(r.Prefix)})
	}
	t.Local, t.Uplinks = unique(t.Local), unique(t.Uplinks)
	return t
}

// Covered reports whether one of the prefixes holds all of p.
func Covered(p netip.Prefix, by []netip.Prefix) bool {
	return slices.ContainsFunc(by, func(b netip.Prefix) bool {
		return b.Bits() <= p.Bits() && b.Contains(p.Addr())
	})
}

// unique sorts s and removes duplicates.
func unique[T interface {
	comparable
	Compare(T) int
}](s []T) []T {
	slices.SortFunc(s, T.Compare)
	return slices.Compact(s)
}
