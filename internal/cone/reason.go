package cone

// A Reason says why a permission does not stand, why it ended, or why a flow
// gives none.
type Reason uint8

// The reasons. The order is of no meaning and may change.
const (
	ReasonNone Reason = iota

	// The flow gives no permission.
	ReasonPortZero
	ReasonNotUnicast
	ReasonPeerInside // in an enabled subnet, or by a link that leads to one
	ReasonNotOutside // behind a link that is no outside link
	ReasonNoRoute
	ReasonUntranslated // it went outside without source NAT
	ReasonExcludedPeer
	ReasonExcludedPeerPort
	ReasonExcludedPort
	ReasonFiltering // the subnet asks for no permissions

	// The permission is wanted and does not stand.
	ReasonConflict    // another inside endpoint owns this outside endpoint and peer
	ReasonForwarded   // a rule of the user's forwards the outside port
	ReasonLocalSocket // the gateway itself serves the outside port
	ReasonNoSocket    // of the gateway itself, and no socket gets what the peer sends from other ports
	ReasonPeersOnPort // too many peers on one outside port for the expectation table
	ReasonTableFull   // the kernel's table is full
	ReasonNoRoom      // the conntrack table has no room for its anchor
	ReasonTaken       // an entry of somebody else's is in the way
	ReasonHelper      // a conntrack helper of the user's wants its own expectation
	ReasonKernel      // the kernel refused for another reason
	ReasonNoBackend   // no backend in use can carry it
	ReasonHostLimit   // the inside host has all the permissions it may have
	ReasonSubnetLimit // the subnet has
	ReasonLimit       // all together have
	ReasonRevoked     // the user took it away
	ReasonIdle        // its flow lives by packets from outside alone

	// The permission ended.
	ReasonExpired
	ReasonPolicy      // the configuration does not allow it any more
	ReasonAddressGone // the gateway lost the outside address
	ReasonEvicted     // it lingered and made room under a limit
	ReasonYielded     // a lingering owner made way for one with a live flow
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
	ReasonExpired:          "expired",
	ReasonPolicy:           "policy",
	ReasonAddressGone:      "address_gone",
	ReasonEvicted:          "evicted",
	ReasonYielded:          "yielded",
	ReasonStopped:          "stopped",
}

// TooMany reports whether r is a limit.
func (r Reason) TooMany() bool {
	return r == ReasonHostLimit || r == ReasonSubnetLimit || r == ReasonLimit
}

// denies reports whether a permission that is refused for r must not stand, by
// whatever means. Where the kernel refused, there is nothing to forbid.
func (r Reason) denies() bool {
	switch r {
	case ReasonLocalSocket, ReasonRevoked:
		return true
	}
	return r.TooMany()
}

// String returns the identifier of r, which programs may rely on (docs/control.md): it does
// not change.
func (r Reason) String() string {
	if r < reasons {
		return reasonNames[r]
	}
	return "unknown"
}
