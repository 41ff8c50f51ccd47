package gateway

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// Topology returns what the model must know. It searches its routes one by one,
// so of the routes by outside links, which may be those of the whole Internet,
// only those are in it that change an answer: the default routes, what no
// default route covers, and what lies within a route by another link.
//
// Loopback and link-local addresses and routes are left out: no peer has one.
func (n Network) Topology() cone.Topology {
	var t cone.Topology
	for _, a := range n.Addrs {
		if ip := a.Prefix.Addr(); !ip.IsLoopback() && !ip.IsLinkLocalUnicast() {
			t.Local = append(t.Local, ip)
		}
	}
	var defaults, inside, beyond []netip.Prefix
	links := n.links()
	for _, r := range n.Routes {
		l, known := links[r.Link]
		switch {
		case !known, l.is(unix.IFF_LOOPBACK), r.Prefix.Addr().IsLinkLocalUnicast():
		case !l.Outside:
			inside = append(inside, r.Prefix)
		case isDefault(r.Prefix):
			defaults = append(defaults, r.Prefix)
		default:
			beyond = append(beyond, r.Prefix)
		}
	}
	inside, defaults = unique(inside), unique(defaults)
	beyond = slices.DeleteFunc(unique(beyond), func(p netip.Prefix) bool {
		return covered(p, defaults) && !covered(p, inside)
	})
	for _, p := range inside {
		t.Routes = append(t.Routes, cone.Route{Prefix: p})
	}
	for _, p := range append(defaults, beyond...) {
		t.Routes = append(t.Routes, cone.Route{Prefix: p, Outside: true})
	}
	slices.SortStableFunc(t.Routes, func(a, b cone.Route) int { return a.Prefix.Compare(b.Prefix) })
	t.Local = unique(t.Local)
	return t
}

// covered reports whether one of the prefixes holds all of p.
func covered(p netip.Prefix, by []netip.Prefix) bool {
	return slices.ContainsFunc(by, func(b netip.Prefix) bool {
		return b.Bits() <= p.Bits() && b.Contains(p.Addr())
	})
}

// unique sorts s and takes out what is in it twice.
func unique[T interface {
	comparable
	Compare(T) int
}](s []T) []T {
	slices.SortFunc(s, T.Compare)
	return slices.Compact(s)
}
