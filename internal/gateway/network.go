package gateway

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A Network is what the links of a network namespace looked like at one time. Its methods
// only read it.
type Network struct {
	Links  []Link         // by index
	Addrs  []Addr         // of all links
	Routes []Route        // unicast routes of all tables except table local
	Rules  []Rule         // for IPv4
	Rules6 []Rule         // for IPv6
	Ended  []netip.Prefix // IPv4 networks with a local or rejecting route

	routeTOS   []uint8 // types of service that IPv4 routes select by
	viaObjects bool    // for some routes the kernel names a nexthop object and no link

	Missing   []string       // names of outside links that do not exist, and may appear
	Unreached []netip.Prefix // enabled subnets to which only a default route leads

	places *places // of the subnets that Mark was called with

	print uint64 // hash of all routes, if Lean left some out
}

// A Link is a network interface.
type Link struct {
	Index int
	Name  string
	Kind  string // as in "ip -details link"; empty for most hardware
	Flags uint32 // IFF_UP and so on

	Lower     int  // index of the link below (IFLA_LINK), for veth of the other end; 0 if there is none
	Elsewhere bool // Lower is of another network namespace
	Master    int  // index of the bridge, bond or VRF that the link is in; 0 if there is none
	VLANs     bool // it is a bridge that filters VLANs

	// Outside are the families for which it is an outside link (Mark), and Cause is why.
	Outside Families
	Cause   Cause
	// Inside says that the link leads to an enabled subnet, or that the user names it as an
	// inside link. Unused are the families for which it is not an outside link although it
	// has a default route, in any table. Vouched says that the user names it.
	Inside  bool
	Vouched bool
	Unused  Families
	// Far says that only a default route of the link leads to an enabled subnet.
	Far bool
	// Partial says that it is an outside link only because of a rule or a flow, and that
	// all that is behind it has routes in the main table: packets from other sources that
	// come by it are spoofed.
	Partial bool
}

// outsideFor reports whether the link is an outside link for the family of a prefix.
func (l Link) outsideFor(p netip.Prefix) bool { return l.Outside&FamilyOf(p.Addr()) != 0 }

// An Addr is an address of the gateway, with its connected prefix.
type Addr struct {
	Prefix netip.Prefix // not masked
	Link   int          // index
	Leased bool         // it has a lifetime, like an address from DHCP
	// Narrow and Alone are about what a masquerade takes (inet_select_addr). It does not take an
	// address with Narrow: its scope is not global, or it is a secondary one of its prefix. With
	// Alone there is no next hop in its prefix, so it takes it only if it is the link's first.
	Narrow, Alone bool
}

// A Route is one next hop of a route.
type Route struct {
	Prefix netip.Prefix
	Table  uint32
	Link   int  // index
	Shared bool // the route has several next hops (ECMP)
}

// ReadNetwork reads the network namespace behind the descriptor netns, or the calling
// thread's own if that is 0, and marks its links.
func ReadNetwork(netns int, s Sides) (Network, error) {
	c, err := dial(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return Network{}, err
	}
	defer func() { _ = c.Close() }()
	var r reader
	err = nfnl.Uninterrupted(func() error { // well below a millisecond on most gateways
		r = reader{}
		return r.read(c)
	})
	if err != nil {
		return Network{}, err
	}
	r.Mark(s)
	return r.Network, nil
}

func (r *reader) read(c *conn) error {
	dumps := []struct {
		what   string
		typ    uint16
		header int
		each   func([]byte) error
	}{
		{"links", unix.RTM_GETLINK, unix.SizeofIfInfomsg, r.link},
		{"addresses", unix.RTM_GETADDR, unix.SizeofIfAddrmsg, r.addr},
		{"routes", unix.RTM_GETROUTE, unix.SizeofRtMsg, r.route},
		{"routing rules", unix.RTM_GETRULE, unix.SizeofRtMsg, r.rule},
		{"nexthops", unix.RTM_GETNEXTHOP, unix.SizeofNhmsg, r.nexthop},
	}
	for _, d := range dumps {
		if d.typ == unix.RTM_GETNEXTHOP && len(r.byNexthop) == 0 {
			continue // not known before Linux 5.3
		}
		c.begin(d.typ, unix.NLM_F_DUMP, d.header)
		err := c.exchange(d.each)
		if d.typ == unix.RTM_GETRULE && errors.Is(err, unix.EOPNOTSUPP) {
			continue // a kernel without CONFIG_IP_MULTIPLE_TABLES
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", d.what, err)
		}
	}
	r.resolve()
	slices.SortFunc(r.Links, func(a, b Link) int { return a.Index - b.Index })
	return nil
}

func (l Link) is(flags uint32) bool { return l.Flags&flags == flags }

// Runs reports whether the link is up and can carry packets.
func (l Link) Runs() bool { return l.is(unix.IFF_UP | unix.IFF_RUNNING) }

// OutsideLinks returns the names of the outside links.
func (n Network) OutsideLinks() []string {
	return n.names(func(l Link) bool { return l.Outside != 0 })
}

// OutsideLinks4 returns the names of the outside links for IPv4.
func (n Network) OutsideLinks4() []string {
	return n.names(func(l Link) bool { return l.Outside&IPv4 != 0 })
}

// OutsideLinksIPv6Only returns the names of the outside links for IPv6 alone.
func (n Network) OutsideLinksIPv6Only() []string {
	return n.names(func(l Link) bool { return l.Outside == IPv6 })
}

// Has4 reports whether a link has an IPv4 address, or an IPv4 route.
func (n Network) Has4(link string) bool {
	links := n.links()
	of := func(p netip.Prefix, index int) bool { return p.Addr().Is4() && links[index].Name == link }
	return slices.ContainsFunc(n.Addrs, func(a Addr) bool { return of(a.Prefix, a.Link) }) ||
		slices.ContainsFunc(n.Routes, func(r Route) bool { return of(r.Prefix, r.Link) })
}

// LinkNames returns the names of all links.
func (n Network) LinkNames() []string { return n.names(func(Link) bool { return true }) }

// names returns the names of the links for which is returns true, in the order of their
// indexes.
func (n Network) names(is func(Link) bool) (names []string) {
	for _, l := range n.Links {
		if is(l) {
			names = append(names, l.Name)
		}
	}
	return names
}

// OutsideAddrs returns the addresses on outside links.
func (n Network) OutsideAddrs() []Addr {
	links := n.links()
	return slices.DeleteFunc(slices.Clone(n.Addrs), func(a Addr) bool { return links[a.Link].Outside == 0 })
}

// links returns the links by index.
func (n Network) links() map[int]Link {
	m := make(map[int]Link, len(n.Links))
	for _, l := range n.Links {
		m[l.Index] = l
	}
	return m
}

var global6 = netip.MustParsePrefix("2000::/3") // all of the IPv6 Internet

// isDefault reports whether p is a default route, or one of the parts with which some VPN
// programs cover it (OpenVPN's redirect-gateway: 0.0.0.0/1, 128.0.0.0/1, 2000::/4,
// 3000::/4).
func isDefault(p netip.Prefix) bool {
	return p.Bits() <= 1 || p.Bits() <= 4 && p.Overlaps(global6)
}
