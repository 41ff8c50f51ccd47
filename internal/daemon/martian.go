package daemon

import (
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/gateway"
)

// thisNetwork has no sources (ipv4_is_zeronet).
var thisNetwork = netip.MustParsePrefix("0.0.0.0/8")

// martian reports whether the kernel drops the packet for its source alone: one that nobody may have
// (ip_route_input_slow, ip6_rcv_core), or that this gateway has itself (__fib_validate_source, which
// is for IPv4), unless accept_local lets it in.
func (c *packetCase) martian() bool {
	a := c.peer.Addr()
	switch {
	case a.IsUnspecified(), a.IsLoopback(), a.IsMulticast():
		return true
	case a.Is4():
		return thisNetwork.Contains(a) || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || c.local(a) && !c.acceptLocal
	}
	return false
}

// acceptsLocal reports whether IPv4 packets with addresses of this gateway may come in by an outside
// link (IN_DEV_ACCEPT_LOCAL).
func (l *loop) acceptsLocal() bool {
	on := func(link string) bool {
		n, err := l.conntrack.Read("../ipv4/conf/" + link + "/accept_local")
		return err == nil && n != 0
	}
	return on("all") || slices.ContainsFunc(l.network.Links, func(k gateway.Link) bool { return k.Outside&gateway.IPv4 != 0 && on(k.Name) })
}
