package gateway

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Families are address families.
type Families uint8

// The families.
const (
	IPv4 Families = 1 << iota
	IPv6

	bothFamilies = IPv4 | IPv6
)

// FamilyOf returns the family of an address.
func FamilyOf(a netip.Addr) Families {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

func (f Families) String() string {
	return [...]string{0: "none", IPv4: "IPv4", IPv6: "IPv6", bothFamilies: "IPv4 and IPv6"}[f&bothFamilies]
}

// A Cause is why a link is an outside link.
type Cause uint8

// The causes. The first one that holds counts.
const (
	NoCause      Cause = iota
	Named              // the user names it
	DefaultRoute       // a default route uses it
	RuledNAT           // a rule translates the source of packets that leave by it
	SeenNAT            // a translated flow to a peer on the Internet left by it
	SharedLink         // it is another MAC or IP address of an outside link
)

func (c Cause) String() string {
	return [...]string{
		NoCause: "", Named: "the configuration names it", DefaultRoute: "a default route uses it",
		RuledNAT: "a rule of yours translates what leaves by it", SeenNAT: "translated flows left by it",
		SharedLink: "it shares the network of an outside link",
	}[c]
}

// Sides tells, besides routes, which links lead outside.
type Sides struct {
	Outside, Inside []string       // links that the user names
	Subnets         []netip.Prefix // the enabled subnets
	RuledNAT        []string       // links by which rules of the user's translate
	SeenNAT         []string       // links by which translated flows left
}

// Mark decides which links are outside links, and which lead inside.
//
// A link that leads to an enabled subnet may get a default route, for instance by a router
// advertisement. That does not make it an outside link while another link leads outside, or
// no subnet of that family is enabled. Otherwise it is both: the gateway is one-armed.
func (n *Network) Mark(s Sides) {
	n.Missing = nil
	if p := n.places; p == nil || !slices.Equal(p.subnets, s.Subnets) {
		n.places = n.place(s.Subnets)
	}
	n.Unreached = n.places.unreached
	defaults := n.places.defaults
	var enabled, others Families
	for _, p := range s.Subnets {
		enabled |= FamilyOf(p.Addr())
	}
	for i := range n.Links {
		l := &n.Links[i]
		l.Outside, l.Cause, l.Unused, l.Inside = 0, NoCause, 0, len(n.SubnetsOf(*l)) > 0
		l.Far, l.Partial, l.Vouched = n.places.far[l.Index], false, false
		by := defaults[l.Index]
		if l.is(unix.IFF_LOOPBACK) {
			by = 0
		}
		switch {
		case slices.Contains(s.Inside, l.Name):
			l.Inside, l.Vouched, l.Unused = true, true, by
			continue
		case slices.Contains(s.Outside, l.Name):
			l.Outside, l.Cause = bothFamilies, Named
		case by != 0 && !l.Inside:
			l.Outside, l.Cause = by, DefaultRoute
		}
		if nat := n.natCause(s, *l); nat != NoCause {
			l.Outside |= IPv4
			switch {
			case l.Cause != NoCause:
			case by&IPv4 != 0:
				l.Cause = DefaultRoute
			default:
				l.Cause, l.Partial = nat, n.ledByMain(*l)
			}
		}
		others |= l.Outside
		l.Unused = by &^ l.Outside
	}
	for _, name := range s.Outside {
		if !slices.Contains(n.LinkNames(), name) {
			n.Missing, others = append(n.Missing, name), bothFamilies
		}
	}
	for i := range n.Links {
		if l := &n.Links[i]; !slices.Contains(s.Inside, l.Name) {
			arm := l.Unused & enabled &^ others
			if l.Unused &^= arm; arm != 0 {
				l.Outside |= arm
				l.Cause = DefaultRoute
			}
		}
	}
	for i := range n.Links {
		// If IPv4 leaves by a link, its IPv6 routes to a few destinations lead outside too.
		if l := &n.Links[i]; l.Cause == DefaultRoute && l.Outside&IPv4 != 0 && !l.Inside {
			l.Outside = bothFamilies
		}
	}
	n.markUppers(s)
}

// natCause returns RuledNAT or SeenNAT if rules translate what leaves by the link, or
// translated flows left by it, and an IPv4 route by it leads beyond its own networks; for
// SeenNAT, to addresses on the Internet.
func (n Network) natCause(s Sides, l Link) Cause {
	switch {
	case slices.Contains(s.RuledNAT, l.Name) && n.Leads(l):
		return RuledNAT
	case slices.Contains(s.SeenNAT, l.Name) && n.LeadsToInternet(l):
		return SeenNAT
	}
	return NoCause
}

// Leads reports whether an IPv4 route by the link leads beyond its own networks.
func (n Network) Leads(l Link) bool { return slices.ContainsFunc(n.Routes, n.leadsBy(l)) }

// LeadsToInternet reports whether such a route leads to addresses on the Internet.
func (n Network) LeadsToInternet(l Link) bool {
	leads := n.leadsBy(l)
	return slices.ContainsFunc(n.Routes, func(r Route) bool { return leads(r) && !notPublic(r.Prefix) })
}

// ledByMain reports whether all such routes are in the main table.
func (n Network) ledByMain(l Link) bool {
	leads := n.leadsBy(l)
	return !slices.ContainsFunc(n.Routes, func(r Route) bool { return leads(r) && r.Table != unix.RT_TABLE_MAIN })
}

func (n Network) leadsBy(l Link) func(Route) bool {
	return func(r Route) bool {
		return r.Link == l.Index && r.Prefix.Addr().Is4() && !slices.ContainsFunc(n.Addrs, func(own Addr) bool {
			return own.Link == l.Index && Covered(r.Prefix, []netip.Prefix{own.Prefix.Masked()})
		})
	}
}

// markUppers makes links that share the network of an outside link outside links: packets
// from outside come by them (VRRP with a MAC address of its own), whatever link other
// packets leave by.
func (n *Network) markUppers(s Sides) {
	links := n.links()
	for i := range n.Links {
		l := &n.Links[i]
		below, ok := l.below(links)
		if !ok || below.Outside == 0 || l.Inside || l.Outside != 0 || !l.sharesLower() || slices.Contains(s.Inside, l.Name) {
			continue
		}
		l.Outside, l.Cause = below.Outside, SharedLink
	}
}

// sharesLower reports whether the link is another MAC or IP address of the one below.
func (l Link) sharesLower() bool {
	return slices.Contains([]string{"macvlan", "macvtap", "ipvlan"}, l.Kind)
}

// OnlyReceives reports whether IPv4 packets come by the link of this name, but leave by the one
// below it: the two share a network, and no route leads beyond it by the upper one.
func (n Network) OnlyReceives(name string) bool {
	return slices.ContainsFunc(n.Links, func(l Link) bool { return l.Name == name && l.sharesLower() && !n.Leads(l) })
}

// places are where enabled subnets are.
type places struct {
	subnets []netip.Prefix

	// behind has the subnets to which a link leads, by its index: it has a network of its
	// own in the subnet, or the longest route to the whole subnet, except default routes,
	// is by it.
	behind map[int][]netip.Prefix
	// far has the links with a default route that is the only way to a subnet, as in a
	// cloud.
	far map[int]bool
	// unreached are the subnets that no route leads to, not even to a part, except default
	// routes.
	unreached []netip.Prefix
	defaults  map[int]Families // default routes by link
}

// place finds the subnets by the addresses and routes of links.
func (n *Network) place(subnets []netip.Prefix) *places {
	type way struct {
		longest int
		links   []int
		partly  bool
	}
	ways := make([]way, len(subnets))
	p := &places{
		subnets: slices.Clone(subnets),
		behind:  make(map[int][]netip.Prefix), far: make(map[int]bool), defaults: make(map[int]Families),
	}
	for _, r := range n.Routes {
		if isDefault(r.Prefix) {
			p.defaults[r.Link] |= FamilyOf(r.Prefix.Addr())
			continue
		}
		for i, s := range subnets {
			w := &ways[i]
			switch bits := r.Prefix.Bits(); {
			case !r.Prefix.Overlaps(s):
			case bits > s.Bits():
				w.partly = true
			case bits > w.longest:
				w.longest, w.links = bits, []int{r.Link}
			case bits == w.longest:
				w.links = append(w.links, r.Link)
			}
		}
	}
	for i, s := range subnets {
		w := &ways[i]
		for _, a := range n.Addrs {
			if own := a.Prefix; !own.IsSingleIP() && s.Bits() <= own.Bits() && s.Contains(own.Addr()) {
				w.links = append(w.links, a.Link)
			}
		}
		for _, link := range w.links {
			if !slices.Contains(p.behind[link], s) {
				p.behind[link] = append(p.behind[link], s)
			}
		}
		if len(w.links) > 0 {
			continue
		}
		if !w.partly {
			p.unreached = append(p.unreached, s)
		}
		for link, families := range p.defaults {
			// A link without a private address is an uplink: then the way to the subnet (a
			// tunnel) is just not there yet.
			if families&FamilyOf(s.Addr()) != 0 && n.hasPrivate(link) {
				p.far[link] = true
			}
		}
	}
	return p
}

func (n *Network) hasPrivate(link int) bool {
	return slices.ContainsFunc(n.Addrs, func(a Addr) bool {
		return a.Link == link && a.Prefix.Addr().Is4() && notPublic(netip.PrefixFrom(a.Prefix.Addr(), 32))
	})
}

// Hidden reports whether there may be an outside link that only flows can show: a link that
// is not an outside link has a default route, or a route to addresses on the Internet
// beyond its own networks.
func (n Network) Hidden() bool {
	links := n.links()
	if slices.ContainsFunc(n.Links, func(l Link) bool { return l.Unused&IPv4 != 0 }) {
		return true
	}
	return slices.ContainsFunc(n.Routes, func(r Route) bool {
		l, there := links[r.Link]
		return there && l.Outside&IPv4 == 0 && !l.is(unix.IFF_LOOPBACK) && !notPublic(r.Prefix) && n.leadsBy(l)(r)
	})
}

// ShowsOutside reports whether a translated flow to a peer shows that the link it left by
// is an outside link. The peer must be on the Internet, and not in a network of the link
// itself, for a rule may masquerade on all links. On a link that leads inside, the flow
// must take a default route: another route may lead to a further inside network.
func (n Network) ShowsOutside(l Link, peer netip.Addr) bool {
	host := netip.PrefixFrom(peer, peer.BitLen())
	if l.is(unix.IFF_LOOPBACK) || notPublic(host) || n.connected(l.Index, peer) {
		return false
	}
	return !l.Inside || !slices.ContainsFunc(n.Routes, func(r Route) bool {
		return r.Link == l.Index && !isDefault(r.Prefix) && r.Prefix.Contains(peer)
	})
}

// connected reports whether a is in a network of which the link has an address.
func (n Network) connected(link int, a netip.Addr) bool {
	return slices.ContainsFunc(n.Addrs, func(own Addr) bool { return own.Link == link && own.Prefix.Contains(a) })
}

var sharedAddresses = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598

// notPublic reports whether no address of p is on the Internet.
func notPublic(p netip.Prefix) bool {
	return Covered(p, private) || Covered(p, []netip.Prefix{sharedAddresses, linkLocal4}) || p.Addr().IsLoopback() || p.Addr().IsMulticast()
}

var linkLocal4 = netip.MustParsePrefix("169.254.0.0/16")

// Doubtful returns the links that the user's rules may show to be outside links: they have
// an IPv4 address or route, do not lead inside, and are not outside links for IPv4 by name,
// default route or shared network.
func (n Network) Doubtful() (links []Link) {
	used := make(map[int]bool)
	for _, r := range n.Routes {
		used[r.Link] = used[r.Link] || r.Prefix.Addr().Is4()
	}
	for _, a := range n.Addrs {
		used[a.Link] = used[a.Link] || a.Prefix.Addr().Is4()
	}
	for _, l := range n.Links { // routes by outside links may have been left out (Lean)
		used[l.Index] = used[l.Index] || l.Outside&IPv4 != 0
	}
	for _, l := range n.Links {
		byRoute := l.Cause == Named || l.Cause == DefaultRoute
		if used[l.Index] && !l.Inside && !l.is(unix.IFF_LOOPBACK) && (!byRoute || l.Outside&IPv4 == 0) && l.Cause != SharedLink {
			links = append(links, l)
		}
	}
	return links
}

// SubnetsOf returns the enabled subnets to which the link leads.
func (n Network) SubnetsOf(l Link) []netip.Prefix {
	if n.places == nil {
		return nil
	}
	return n.places.behind[l.Index]
}

// Connected returns the connected networks of the link with this name, without link-local
// ones, in order.
func (n Network) Connected(link string) (prefixes []netip.Prefix) {
	for _, l := range n.Links {
		for _, a := range n.Addrs {
			if p := a.Prefix; l.Name == link && a.Link == l.Index && !local(p.Addr()) && !p.IsSingleIP() {
				prefixes = append(prefixes, p.Masked())
			}
		}
	}
	return unique(prefixes)
}

// OneArmed returns the names of the outside links by which hosts of enabled subnets come
// too. far are those of them that only a default route makes the way to these hosts.
func (n Network) OneArmed() (names, far []string) {
	return n.names(func(l Link) bool { return (l.Inside || l.Far) && l.Outside != 0 }),
		n.names(func(l Link) bool { return l.Far && !l.Inside && l.Outside != 0 })
}

// Partial returns the names of the outside links that are partial (Link.Partial).
func (n Network) Partial() []string { return n.names(func(l Link) bool { return l.Partial }) }

// Without returns the names of the outside links that are not outside links for f.
func (n Network) Without(f Families) []string {
	return n.names(func(l Link) bool { return l.Outside != 0 && l.Outside&f == 0 })
}
