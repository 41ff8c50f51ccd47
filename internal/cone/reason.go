package cone

// A Reason says why a permission does not stand, why it ended, or why a flow
// gives none.
type Reason uint8

// The reasons. Their order has no meaning and may change.
const (
	ReasonNone Reason = iota

	// The flow gives no permission.
	ReasonPortZero
	ReasonNotUnicast
	ReasonPeerInside // in an enabled subnet, or reached by a link that leads to one
	ReasonNotOutside // reached by a link that is not an outside link
	ReasonNoRoute
	ReasonUntranslated // the flow went outside without source NAT
	ReasonExcludedPeer
	ReasonExcludedPeerPort
	ReasonExcludedPort
	ReasonFiltering // the subnet asks for no permissions

	// The permission is wanted and does not stand.
	ReasonConflict      // another inside endpoint owns this outside endpoint and peer
	ReasonForwarded     // a rule of the user's forwards the outside port
	ReasonForwardedHere // such a rule leads to the permission's own endpoint
	ReasonLocalSocket   // the gateway itself serves the outside port
	ReasonNoSocket      // the gateway's own, but none of its sockets receives from other ports of the peer
	ReasonPeersOnPort   // too many peers on one outside port for the expectation table
	ReasonTableFull     // the kernel's table is full
	ReasonNoRoom        // the conntrack table has no room for its anchor
	ReasonTaken         // an entry of another program is in the way
	ReasonHelper        // a conntrack helper of the user's wants its own expectation
	ReasonKernel        // the kernel refused for another reason
	ReasonNoBackend     // no backend in use can carry it
	ReasonHostLimit     // the inside host has reached its limit
	ReasonSubnetLimit   // the subnet has reached its limit
	ReasonLimit         // the total limit is reached
	ReasonRevoked       // the user revoked it
	ReasonIdle          // only packets from outside keep its flow alive

	// The permission stands.
	ReasonDropped   // the user's firewall drops what it admits
	ReasonOtherZone // packets from outside come in a conntrack zone in which it has no expectation

	// The permission ended.
	ReasonExpired
	ReasonPolicy      // the configuration no longer allows it
	ReasonAddressGone // the gateway lost the outside address
	ReasonRerouted    // packets to the peer leave by another link than that of the outside address
	ReasonEvicted     // it was idle, and ended to make room under a limit
	ReasonYielded     // it was idle, and ended for another claim of its Key or outside port
	ReasonStopped

	reasons
)

// Reasons is the number of reasons, for arrays indexed by Reason.
const Reasons = int(reasons)

var reasonNames = [reasons]string{
	ReasonNone:             "",
	ReasonPortZero:         "port_zero",
	ReasonNotUnicast:       "not_unicast",
	ReasonPeerInside:       "peer_inside",
	ReasonNotOutside:       "not_outside",
	ReasonNoRoute:          "no_route",
	ReasonUntranslated:     "untranslated",
	ReasonExcludedPeer:     "excluded_peer",
	ReasonExcludedPeerPort: "excluded_peer_port",
	ReasonExcludedPort:     "excluded_port",
	ReasonFiltering:        "filtering",
	ReasonConflict:         "conflict",
	ReasonForwarded:        "forwarded",
	ReasonForwardedHere:    "forwarded_here",
	ReasonLocalSocket:      "local_socket",
	ReasonNoSocket:         "no_socket",
	ReasonPeersOnPort:      "peers_on_port",
	ReasonTableFull:        "table_full",
	ReasonNoRoom:           "no_room",
	ReasonTaken:            "taken",
	ReasonHelper:           "helper",
	ReasonKernel:           "kernel",
	ReasonNoBackend:        "no_backend",
	ReasonHostLimit:        "host_limit",
	ReasonSubnetLimit:      "subnet_limit",
	ReasonLimit:            "total_limit",
	ReasonRevoked:          "revoked",
	ReasonIdle:             "idle",
	ReasonDropped:          "dropped",
	ReasonOtherZone:        "other_zone",
	ReasonExpired:          "expired",
	ReasonPolicy:           "policy",
	ReasonAddressGone:      "address_gone",
	ReasonRerouted:         "rerouted",
	ReasonEvicted:          "evicted",
	ReasonYielded:          "yielded",
	ReasonStopped:          "stopped",
}

// TooMany reports whether r is a limit.
func (r Reason) TooMany() bool {
	return r == ReasonHostLimit || r == ReasonSubnetLimit || r == ReasonLimit
}

// isForward reports whether a forward of the user's is in the way of an expectation.
func (r Reason) isForward() bool { return r == ReasonForwarded || r == ReasonForwardedHere }

// denies reports whether a permission refused for r must be denied, so that the kernel does
// not learn it either. If the kernel itself refused, there is nothing to deny.
func (r Reason) denies() bool {
	switch r {
	case ReasonLocalSocket, ReasonRevoked:
		return true
	}
	return r.TooMany()
}

// String returns the identifier of r. It never changes: programs may rely on it
// (docs/control.md).
func (r Reason) String() string {
	if r < reasons {
		return reasonNames[r]
	}
	return "unknown"
}
