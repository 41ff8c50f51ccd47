package rules

import "net/netip"

// A LAN is a link that may lead to an inside network, with its IPv4 networks.
type LAN struct {
	Link
	Networks []netip.Prefix
}
