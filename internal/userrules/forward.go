package userrules

import (
	"net/netip"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Forward is what a rule of the user's translates to another destination, as
// far as UDP packets from outside links are concerned. It never says less than
// the rule does: conditions that are not looked at, or an earlier rule that accepts, make
// it too wide.
type Forward struct {
	// Ports are the outside ports; nil when All is set.
	Ports []PortRange
	// All says that the rule has no condition on the port. With such a
	// catch-all forward (DMZ host) every port is forwarded.
	All bool
	// Addrs are the destination addresses; nil stands for any.
	Addrs []AddrRange
	// Sources are those of the packets, where that is known; nil stands for any. A named
	// set of sources is read if it is one of intervals that is not long.
	Sources []AddrRange
	// To is where the rule leads the packets, if that is one endpoint; the zero value says
	// that it is not known. Port 0 stands for the port that the packet had.
	To netip.AddrPort
	// Unknown says that the rule has a condition on the port that was not
	// understood. Ports, or All, then say what it forwards at most.
	Unknown bool
	// Unread says that it is Unknown because something could not be read that is known in
	// another way: a chain, of which the answer has what was read before, or a table of
	// iptables-legacy, of which flows tell.
	Unread bool
	// Partial says that the rule may leave packets alone that it seems to forward: it
	// asks for more than ports, addresses and links, or an earlier rule may be in its way.
	Partial bool
	// Text names the rule: family, table, chain and handle, as nft has them, or
	// program, table, chain and number where it is of iptables-legacy; and its
	// comment, if any.
	Text string
}

// A PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// An AddrRange is a range of addresses of one family, both ends included.
type AddrRange struct{ First, Last netip.Addr }

// A Link is a network interface.
type Link struct {
	Index int
	Name  string
}

// A LAN is a link that may lead to an inside network, with its IPv4 networks.
type LAN struct {
	Link
	Networks []netip.Prefix
}

// Covers reports whether a packet to ext may be forwarded by the rule.
func (f Forward) Covers(ext cone.Endpoint) bool {
	return (f.All || covers(f.Ports, ext.Port)) && (f.Addrs == nil || coversAddr(f.Addrs, ext.Addr.Netip()))
}

func covers(ranges []PortRange, port uint16) bool {
	for _, r := range ranges {
		if r.First <= port && port <= r.Last {
			return true
		}
	}
	return false
}

func coversAddr(ranges []AddrRange, a netip.Addr) bool {
	for _, r := range ranges {
		if r.First.BitLen() == a.BitLen() && r.First.Compare(a) <= 0 && a.Compare(r.Last) <= 0 {
			return true
		}
	}
	return false
}
