package elements

import (
	"fmt"
	"strings"
	"time"
)

// Names of the sets and maps whose elements come and go.
const (
	// PermissionMap and PortMap have the inside address and the inside port of each
	// permission, MarksMap the connmarks, and DeniedSet what the kernel must not learn.
	PermissionMap = "permissions"
	PortMap       = "permission_ports"
	MarksMap      = "marks"
	DeniedSet     = "denied"
	// OwnedSet has the outside endpoints of all mappings, OwnersMap and OwnerPortsMap the
	// inside endpoint of each, and TakenSet what is in use by flows without a mapping.
	OwnedSet      = "owned"
	OwnersMap     = "owners"
	OwnerPortsMap = "owner_ports"
	TakenSet      = "taken"
	// GoneSet has the outside addresses that went a moment ago. GatewaySet has the IPv4
	// addresses that links of the gateway have, as the daemon last saw them; it outlives
	// the daemon, so that the next one sees which of them went.
	GoneSet    = "gone"
	GatewaySet = "gateway_addresses"
	// UnsureSet has the IPv4 flows whose source may be spoofed, Unsure6Set, in the table of
	// family inet, those of IPv6.
	UnsureSet  = "unsure"
	Unsure6Set = "unsure6"
	// RevokedSet has the permissions that the user took away. It is in the table of family
	// inet, and no rule asks for it.
	RevokedSet = "revoked"
)

// LinkSets are the names of the sets that an outside link has for mappings. None of them
// is the name of another set.
type LinkSets struct {
	Link, Kept, Moved, Ports, Addresses, Translated, Several string
}

// SetsOfLink returns the names of the sets of a link.
func SetsOfLink(link string) *LinkSets {
	id := Identifier(link)
	return &LinkSets{
		Link: link, Kept: "kept_" + id, Moved: "moved_" + id, Ports: "ports_" + id,
		Addresses: "addresses_" + id, Translated: "translated_" + id, Several: "several_" + id,
	}
}

// Identifier returns the name of a link as a part of one that nft can read. A link's has
// no slash.
func Identifier(link string) string {
	var b strings.Builder
	for _, c := range []byte(link) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_', c == '-', c == '.':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "/%02x", c)
		}
	}
	return b.String()
}

const (
	// DeniedSize bounds the set of what the kernel must not learn, and RevokedSet. A denial lasts for
	// deniedTimeout if nobody says it again: longer than any time between two reconciles.
	DeniedSize    = 1 << 16
	deniedTimeout = 2 * time.Hour
	// OwnedLonger is how much longer an outside endpoint is owned than its mapping lasts.
	// The other way round two hosts could have it for a moment.
	OwnedLonger = time.Second
	// keptTimeout is the least value of MappingsConfig.KeptFor.
	keptTimeout = 3 * time.Minute
	// AddressTimeout is how long it is remembered which of several outside addresses the
	// user's rules gave a host.
	AddressTimeout = time.Hour
	// goneTimeout is how long no mapping is learned to an address that is gone, until
	// the flows that have it have ended.
	goneTimeout = 10 * time.Second
)
