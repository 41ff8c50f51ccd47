package daemon

import "net/netip"

// thisNetwork has no sources (ipv4_is_zeronet).
var thisNetwork = netip.MustParsePrefix("0.0.0.0/8")

// martian reports whether the kernel drops the packet for its source alone: one that nobody may have
// (ip_route_input_slow, ip6_rcv_core), or that this gateway has itself (__fib_validate_source, which
// is for IPv4).
func (c *packetCase) martian() bool {
	a := c.peer.Addr()
	switch {
	case a.IsUnspecified(), a.IsLoopback(), a.IsMulticast():
		return true
	case a.Is4():
		return thisNetwork.Contains(a) || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || c.local(a)
	}
	return false
}
