package gateway

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// A Network is what the links of a network namespace looked like at one time.
// Its methods only read it.
type Network struct {
	Links  []Link         // by index
	Addrs  []Addr         // of all links
	Routes []Route        // unicast routes of all tables, but those of table local
	Rules  []Rule         // for IPv4
	Ended  []netip.Prefix // IPv4 networks with a route that is local or rejects

	routeTOS []uint8 // types of service that IPv4 routes are for

	Missing   []string       // names of outside links that are not there, and may come
	Unreached []netip.Prefix // enabled subnets to which nothing but a default route leads

	places *places // of the subnets that it was marked for

	print uint64 // of all routes, where Lean left some out
}

// A Link is a network interface.
type Link struct {
	Index int
	Name  string
	Kind  string // as in "ip -details link"; empty for most hardware
	Flags uint32 // IFF_UP and so on
	Lower int    // index of the link below, 0 if there is none or elsewhere

	// Outside are the families for which it is an outside link (Mark), and Cause is why.
	Outside Families
	Cause   Cause
	// Inside says that the link leads to an enabled subnet, or is named as an inside
	// link. Unused are the families for which it is no outside link though it holds a
	// default route, in whatever table.
	Inside bool
	Unused Families
	// Far says that no route but a default route of the link leads to an enabled subnet.
	Far bool
	// Partial says that it is an outside link for a rule or a flow alone, and that routes of
	// the main table lead to all that is behind it: packets of others that come by it are
	// faked.
	Partial bool
}

// outsideFor reports whether the link is an outside link for the family of a prefix.
func (l Link) outsideFor(p netip.Prefix) bool { return l.Outside&familyOf(p) != 0 }

// An Addr is an own address, with the prefix that is connected by it.
type Addr struct {
	Prefix netip.Prefix // not masked
	Link   int          // index
	Leased bool         // it has a lifetime, as those have that DHCP gave
	Narrow bool         // its scope is not global: masquerade does not take it
}

// A Route is one next hop of a route.
type Route struct {
	Prefix netip.Prefix
	Table  uint32
	Link   int // index
}

// attempts is how often a network that changes under our eyes is read. One
// reading takes well below a millisecond on most gateways.
const attempts = 5

// ReadNetwork reads the network namespace behind the descriptor netns, or the
// calling thread's own when it is 0, and marks its links.
func ReadNetwork(netns int, s Sides) (Network, error) {
	c, err := dial(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return Network{}, err
	}
	defer func() { _ = c.close() }()
	var r reader
	for range attempts {
		r = reader{}
		if err = r.read(c); !errors.Is(err, errInterrupted) {
			break
		}
	}
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
		err := c.exchange(newRequest(d.typ, unix.NLM_F_DUMP, d.header), d.each)
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

// OutsideLinks4 returns the names of those that are outside links for IPv4.
func (n Network) OutsideLinks4() []string {
	return n.names(func(l Link) bool { return l.Outside&IPv4 != 0 })
}

// LinkNames returns the names of all links.
func (n Network) LinkNames() []string { return n.names(func(Link) bool { return true }) }

// names returns the names of those links of which is holds, in the order of their indexes.
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

// Uppers returns the links that are another MAC or IP address of the link below, as VRRP
// makes them, with the name of that: a packet may come by the one and go by the other.
func (n Network) Uppers() map[string]string {
	links, uppers := n.links(), map[string]string{}
	for _, l := range n.Links {
		if below, ok := links[l.Lower]; ok && l.sharesLower() {
			uppers[l.Name] = below.Name
		}
	}
	return uppers
}

// Bridges returns the names of the bridges of which the gateway is no host: it has no
// address there, and so routes nothing to or from them.
func (n Network) Bridges() []string {
	return n.names(func(l Link) bool {
		return l.Kind == "bridge" && !slices.ContainsFunc(n.Addrs, func(a Addr) bool { return a.Link == l.Index && !local(a.Prefix.Addr()) })
	})
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

// isDefault reports whether p is a default route, or one of the parts that some
// VPN programs lay over it (OpenVPN's redirect-gateway: 0.0.0.0/1, 128.0.0.0/1,
// 2000::/4, 3000::/4).
func isDefault(p netip.Prefix) bool {
	return p.Bits() <= 1 || p.Bits() <= 4 && p.Overlaps(global6)
}
