package userrules

import (
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Forward is what one of the user's rules translates to another destination, or hands to a
// transparent proxy, for UDP packets from outside links. It never says less than the rule does. What
// earlier rules accept or return is not part of it, if one of ports, addresses, sources and links can
// say that. It is too wide if the rule, or an earlier one that lets packets pass, has conditions that
// are not evaluated.
type Forward struct {
	// Ports are the outside ports; nil when All is set.
	Ports cone.PortRanges
	// All says that the rule has no condition on the port. With such a
	// catch-all forward (DMZ host) every port is forwarded.
	All bool
	// Most is All, or says that the rule is for more than half of all ports, or that nothing but earlier
	// rules, which let packets to some ports pass, keeps it from being All.
	Most bool
	// Addrs are the destination addresses; nil stands for any.
	Addrs cone.AddrRanges
	// Sources are the sources of the packets, sorted and disjoint, if known; nil stands for any, or
	// if Partial is set for unknown ones. A named set of sources is read only if it is an interval
	// set and not very long.
	Sources cone.AddrRanges
	// To is the endpoint to which the rule sends the packets, if there is only one; the
	// zero value means that it is not known. Port 0 stands for the packet's own port.
	To netip.AddrPort
	// ToPrefix has the addresses to which the rule sends the packets, each to the one that has the low
	// bits of the outside address, and to the packet's own port ("dnat prefix to", NETMAP). To is
	// not known then.
	ToPrefix netip.Prefix
	// Unknown says that a condition on the port was not understood. Ports, or All, then say
	// what the rule forwards at most.
	Unknown bool
	// Unread says that the Forward is Unknown because something could not be read that is
	// known in another way: a chain, whose last readable contents are in the answer, too,
	// or a table of iptables-legacy, whose forwards show in flows.
	Unread bool
	// Partial says that the rule may not forward all packets that match: it has conditions
	// other than on ports, addresses, sources and links, it is for some of the links that packets
	// to Addrs may come by, or an earlier rule may let some of the packets pass.
	Partial bool
	// Proxied says that the rule hands packets to a transparent proxy, which takes none while it
	// does not listen.
	Proxied bool
	// Astray says that the rule is for some of the outside links alone, and that packets to Addrs
	// come by others (Link.Addrs): it gets only what a router sends to another link. Partial is set,
	// too.
	Astray bool
	// Text names the rule: family, table, chain and handle as nft does, or for
	// iptables-legacy program, table, chain and number; and its comment, if any.
	Text string
}

// Certain reports whether the rule takes all packets that match.
func (f Forward) Certain() bool { return !f.Partial && !f.Unknown && !f.Proxied }

// A Link is a network interface.
type Link struct {
	Index int
	Name  string
	// Masquerade is the IPv4 address that a masquerade gives to packets that leave by the link,
	// if that is certain.
	Masquerade netip.Addr
	// Addrs are addresses, of an outside link, whose packets come from outside by no other link.
	Addrs []netip.Addr
}

// Equal reports whether two links are the same in all that answers depend on.
func (l Link) Equal(o Link) bool {
	return l.Index == o.Index && l.Name == o.Name && l.Masquerade == o.Masquerade && slices.Equal(l.Addrs, o.Addrs)
}

// A LAN is a link that may lead to an inside network, with its IPv4 networks.
type LAN struct {
	Link
	Networks []netip.Prefix
}

// Covers reports whether the rule may forward a packet to ext.
func (f Forward) Covers(ext cone.Endpoint) bool {
	return (f.All || f.Ports.Has(ext.Port)) && (f.Addrs == nil || f.Addrs.Has(ext.Addr.Netip()))
}
