package lab

import (
	"fmt"
	"net/netip"
)

// The networks of the lab. The gateway has the first address of each.
var (
	InsideNet   = netip.MustParsePrefix("10.47.11.0/24")
	InsideNet6  = netip.MustParsePrefix("2001:db8:47::/64")
	GuestNet    = netip.MustParsePrefix("10.47.12.0/24")
	GuestNet6   = netip.MustParsePrefix("2001:db8:48::/64")
	OutsideNet  = netip.MustParsePrefix("198.51.100.0/24")
	OutsideNet6 = netip.MustParsePrefix("2001:db8:ffff::/64")
)

// Some of the peers, all in [Lab.Outside]. PeerA and PeerB are neighbours, PeerC is
// in another prefix. Every other address of 203.0.113.0/24, 192.0.2.0/24 and, with
// IPv6, 2001:db8:5::/64 can be bound there as well.
var (
	PeerA  = netip.MustParseAddr("203.0.113.5")
	PeerB  = netip.MustParseAddr("203.0.113.6")
	PeerC  = netip.MustParseAddr("192.0.2.77")
	Peer6A = netip.MustParseAddr("2001:db8:5::5")
	Peer6B = netip.MustParseAddr("2001:db8:5::6")
)

// segment is a link of the gateway and its prefixes, IPv4 first.
type segment struct {
	link     string
	prefixes [2]netip.Prefix
}

var (
	insideSegment  = segment{"lan0", [2]netip.Prefix{InsideNet, InsideNet6}}
	guestSegment   = segment{"guest0", [2]netip.Prefix{GuestNet, GuestNet6}}
	outsideSegment = segment{"wan0", [2]netip.Prefix{OutsideNet, OutsideNet6}}
)

// gateway returns the gateway's address of family f (0 is IPv4).
func (s segment) gateway(f int) netip.Addr { return s.prefixes[f].Addr().Next() }

func (s segment) mac() string { return mac(s.gateway(0)) }

// mac derives a link address from an IPv4 address. Both ends of a link know it
// without ARP, so the first packet is as quick as the second.
func mac(addr netip.Addr) string {
	a := addr.As4()
	return fmt.Sprintf("02:47:%02x:%02x:%02x:%02x", a[0], a[1], a[2], a[3])
}

// The hosts' addresses on their segments, and the peers.
var (
	outsideHost  = [2]netip.Addr{netip.MustParseAddr("198.51.100.254"), netip.MustParseAddr("2001:db8:ffff::fe")}
	guestHost    = [2]netip.Addr{netip.MustParseAddr("10.47.12.20"), netip.MustParseAddr("2001:db8:48::20")}
	peerPrefixes = [2][]string{{"203.0.113.0/24", "192.0.2.0/24"}, {"2001:db8:5::/64"}}
	peers        = [2][]netip.Addr{{PeerA, PeerB, PeerC}, {Peer6A, Peer6B}}
)

// insideHost returns the addresses of inside host i: .109 and ::109 and up.
func insideHost(i int) [2]netip.Addr {
	return [2]netip.Addr{
		netip.MustParseAddr(fmt.Sprintf("10.47.11.%d", 109+i)),
		netip.MustParseAddr(fmt.Sprintf("2001:db8:47::%d", 109+i)),
	}
}
