package gateway

import (
	"fmt"
	"hash/maphash"
	"math"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Router asks the kernel by which link it sends packets of inside hosts. It is not safe
// for concurrent use.
type Router struct {
	conn    *conn
	v4, v6  choices
	inside  map[cone.Addr]uint32 // the link of the way back to each host
	vouched []uint32             // links by which any host may come
}

// choices are what routing rules and routes of one address family select by.
type choices struct {
	arriving []uint32 // marks with which packets may come in, including 0
	marks    []uint32 // all that packets may have when they are routed
	toses    []uint8  // types of service that packets may have
}

func newChoices(rules []Rule, toses []uint8) choices {
	c := choices{[]uint32{0}, []uint32{0}, toses}
	for _, rule := range rules {
		if !slices.Contains(c.marks, rule.Mark) {
			c.marks = append(c.marks, rule.Mark)
		}
		if !rule.invert && !slices.Contains(c.arriving, rule.Mark) {
			c.arriving = append(c.arriving, rule.Mark)
		}
	}
	return c
}

// A Marking says which marks a packet may have when it is routed, if it came in by a link, given by
// its index, with one of some marks. known is false if it may have any other.
type Marking func(link int, arriving []uint32) (marks []uint32, known bool)

// DialRouter opens the connection to the network namespace behind the descriptor netns, or
// to the calling thread's own if that is 0. The Router tries the marks and types of service
// that routing rules and routes of n select by.
func DialRouter(netns int, n Network) (*Router, error) {
	c, err := dial(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return nil, err
	}
	r := &Router{
		conn: c, v4: newChoices(n.Rules, n.toses()), v6: newChoices(n.Rules6, []uint8{0}), inside: make(map[cone.Addr]uint32),
	}
	for _, l := range n.Links {
		if l.Vouched {
			r.vouched = append(r.vouched, uint32(l.Index))
		}
	}
	return r, nil
}

// Close ends the connection.
func (r *Router) Close() error { return r.conn.Close() }

// Links returns the indexes of the links by which an inside host's packet from src to dst
// may leave. Which type of service programs ask for is unknown: Links tries all that DialRouter
// found. all is false if the packet does not leave with one of these. Both endpoints are of one
// address family.
//
// Of the marks that routing rules select by, the packet may come in with each: traffic control may
// mark packets, for instance. That of an inverted rule ("not fwmark", as wg-quick has one for its own
// packets) does not count. Links tries those that the packet has then by mark, and where mark
// does not know, all marks of routing rules.
//
// The packet may come in by the link of the way back to its source, or by one that the user names
// inside, if it leaves from there.
func (r *Router) Links(src, dst cone.Endpoint, mark Marking) (links []int, all bool, err error) {
	from, known := r.inside[src.Addr]
	if !known { // find the link by which its packets come in
		link, err := r.lookup(cone.Endpoint{}, src, 0, 0, 0)
		if err != nil {
			return nil, false, err
		}
		from = uint32(link)
		r.inside[src.Addr] = from
	}
	if from == 0 {
		return nil, false, nil
	}
	all = true
	c := &r.v4
	if !src.Addr.Is4() {
		c = &r.v6
	}
	for _, in := range append([]uint32{from}, r.vouched...) {
		for _, mark := range c.marksOf(int(in), mark) {
			for _, tos := range c.toses {
				link, err := r.lookup(src, dst, in, mark, tos)
				if err != nil {
					return nil, false, err
				}
				if link == 0 {
					all = all && in != from
				} else if !slices.Contains(links, link) {
					links = append(links, link)
				}
			}
		}
	}
	return links, all, nil
}

// marksOf returns the marks to try for a packet that comes in by a link.
func (c *choices) marksOf(from int, mark Marking) []uint32 {
	if len(c.marks) == 1 {
		return c.marks // no rule selects by one
	}
	if marks, known := mark(from, c.arriving); known {
		return marks
	}
	return c.marks
}

// lookup returns the link by which a packet leaves that came in by link from; from is 0 for
// packets of the gateway's own kernel. It returns 0 if the packet does not leave.
func (r *Router) lookup(src, dst cone.Endpoint, from, mark uint32, tos uint8) (link int, err error) {
	h, e := r.conn.begin(unix.RTM_GETROUTE, 0, unix.SizeofRtMsg), &r.conn.enc
	family, source, dest := uint8(unix.AF_INET), src.Addr[12:], dst.Addr[12:]
	if !dst.Addr.Is4() {
		family, source, dest = unix.AF_INET6, src.Addr[:], dst.Addr[:]
	}
	h[0], h[1], h[3] = family, uint8(8*len(dest)), tos
	if from != 0 {
		h[2] = uint8(8 * len(source)) // there is a source
	}
	e.Bytes(unix.RTA_DST, dest)
	e.NE32(unix.RTA_UID, forwarded)
	if from != 0 {
		e.Bytes(unix.RTA_SRC, source)
		e.NE32(unix.RTA_IIF, from)
		e.NE32(unix.RTA_MARK, mark)
		e.U8(unix.RTA_IP_PROTO, unix.IPPROTO_UDP)
		e.BE16(unix.RTA_SPORT, src.Port)
		e.BE16(unix.RTA_DPORT, dst.Port)
	}
	switch link, err = r.conn.routeLink(); {
	case err != nil:
		return 0, fmt.Errorf("look up route: %w", err)
	case link == ownAddress:
		return 0, nil
	}
	return link, nil
}

// Shares reports whether a route to outside links has several next hops (ECMP). A Lean
// network does not know.
func (n Network) Shares() bool {
	links := n.links()
	return slices.ContainsFunc(n.Routes, func(r Route) bool { return r.Shared && links[r.Link].outsideFor(r.Prefix) })
}

// HidesWays reports whether packets of a family may take other ways than a Router finds, because a
// routing rule selects by part of the DSCP, or by something that we do not know. For IPv6 a Router
// tries no traffic class.
func (n Network) HidesWays(f Families) bool {
	return f&IPv4 != 0 && slices.ContainsFunc(n.Rules, func(r Rule) bool { return r.hidden }) ||
		f&IPv6 != 0 && slices.ContainsFunc(n.Rules6, func(r Rule) bool { return r.hidden || r.byTOS })
}

// toses returns the types of service with which packets may take different ways: each one
// that a routing rule or route selects by, after one that none selects by, which is 0
// unless a rule selects by 0.
func (n Network) toses() []uint8 {
	asked := slices.Clone(n.routeTOS)
	for _, r := range n.Rules {
		if r.byTOS && !slices.Contains(asked, r.tos) {
			asked = append(asked, r.tos)
		}
	}
	const next = 1 << 2 // the lower bits are not part of the DSCP
	for tos := 0; tos <= math.MaxUint8; tos += next {
		if !slices.Contains(asked, uint8(tos)) {
			return slices.Insert(asked, 0, uint8(tos))
		}
	}
	return asked
}

// SameRoutes reports whether packets take the same ways in n and o.
func (n Network) SameRoutes(o Network) bool {
	up := func(n Network) (is []int) {
		for _, l := range n.Links {
			if l.Runs() {
				is = append(is, l.Index)
			}
		}
		return is
	}
	return n.routesPrint() == o.routesPrint() && slices.Equal(n.routeTOS, o.routeTOS) && slices.Equal(n.Rules, o.Rules) && slices.Equal(n.Rules6, o.Rules6) && slices.Equal(up(n), up(o))
}

// Lean returns n without the routes by outside links, of which there may be very many;
// SameRoutes uses a hash in their place. Topology and Watcher.Know need a Network that has
// them.
func (n Network) Lean() Network {
	links := n.links()
	n.print = n.routesPrint()
	n.Routes = slices.Clip(slices.DeleteFunc(slices.Clone(n.Routes), func(r Route) bool { return links[r.Link].outsideFor(r.Prefix) }))
	return n
}

var printSeed = maphash.MakeSeed()

// routesPrint returns a hash of the routes, other than 0.
func (n *Network) routesPrint() uint64 {
	if n.print != 0 {
		return n.print
	}
	var h maphash.Hash
	h.SetSeed(printSeed)
	for _, r := range n.Routes {
		maphash.WriteComparable(&h, r)
	}
	return h.Sum64() | 1
}

// Owned returns a test for IPv4 addresses whose packets end at the gateway: a link has the
// address, or it is in a local or rejecting route. People use rejecting routes for
// addresses that they translate to and no link has.
func (n Network) Owned() func(cone.Addr) bool {
	owned := make(map[netip.Prefix]struct{})
	for _, a := range n.Addrs {
		owned[netip.PrefixFrom(a.Prefix.Addr(), a.Prefix.Addr().BitLen())] = struct{}{}
	}
	for _, p := range n.Ended {
		owned[p.Masked()] = struct{}{}
	}
	return func(a cone.Addr) bool {
		for bits := leastEnded; a.Is4() && bits <= 32; bits++ {
			if _, ok := owned[netip.PrefixFrom(a.Netip(), bits).Masked()]; ok {
				return true
			}
		}
		return false
	}
}
