package elements

import (
	"fmt"
	"net/url"
	"strings"
	"time"
)

// Names of the sets and maps whose elements come and go.
const (
	// PermissionMap and PortMap have the inside address and the inside port of each
	// permission, MarksMap the connmarks. DeniedSet has the permissions that the kernel
	// must not learn, FullSet the inside hosts for which it must not learn any.
	PermissionMap = "permissions"
	PortMap       = "permission_ports"
	MarksMap      = "marks"
	DeniedSet     = "denied"
	FullSet       = "full_hosts"
	// OwnedSet has the outside endpoints of all mappings, OwnersMap and OwnerPortsMap the
	// inside endpoint of each. TakenSet has the ports that flows without a mapping use.
	OwnedSet      = "owned"
	OwnersMap     = "owners"
	OwnerPortsMap = "owner_ports"
	TakenSet      = "taken"
	// GoneSet has the outside addresses that were lost a moment ago. GatewaySet has the
	// IPv4 addresses of the gateway's links as the daemon last saw them; it outlives the
	// daemon, so that the next one sees which addresses were lost.
	GoneSet    = "gone"
	GatewaySet = "gateway_addresses"
	// MasqueradedSet has those of the gateway's addresses that no rule of the user's names: a
	// mapping to one ends in the kernel when no link has it.
	MasqueradedSet = "masqueraded_addresses"
	// FormerSet has the outside addresses that the user's rules no longer give to hosts with
	// flows that still have them.
	FormerSet = "former"
	// UnsureSet has the IPv4 flows whose source may be spoofed. Unsure6Set has those of
	// IPv6; it is in the table of family inet.
	UnsureSet  = "unsure"
	Unsure6Set = "unsure6"
	// LeanSet has UDP while the kernel does not report new flows whose permission it learned.
	LeanSet = "lean"
	// QuietSet has UDP and TCP while the kernel does not report new flows that can have no
	// permission.
	QuietSet = "quiet"
	// AliveSet has UDP while the daemon has given a sign of life lately.
	AliveSet = "alive"
	// RevokedSet has the permissions that the user revoked. It is in the table of family
	// inet, and no rule looks it up.
	RevokedSet = "revoked"
)

// LinkSets are the names of the sets for mappings of an outside link. They never clash with
// the name of another set.
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

// LinkOfSet returns the link of a set of mappings, Kept or Moved.
func LinkOfSet(set string) (link string, ok bool) {
	id, kept := strings.CutPrefix(set, "kept_")
	if !kept {
		if id, ok = strings.CutPrefix(set, "moved_"); !ok {
			return "", false
		}
	}
	link, err := url.PathUnescape(strings.ReplaceAll(id, "/", "%"))
	return link, err == nil && (set == SetsOfLink(link).Kept || set == SetsOfLink(link).Moved)
}

// Identifier returns the name of a link in a form that nft accepts as part of an
// identifier. It escapes with a slash, which names of links never contain.
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
	// DeniedSize limits the set of denials, and RevokedSet. A denial that is not repeated
	// lasts for deniedTimeout, which is longer than any interval between two reconciles.
	DeniedSize    = 1 << 16
	deniedTimeout = 2 * time.Hour
	// FullSize limits FullSet. The kernel learns again for a host after fullTimeout.
	FullSize    = 1 << 12
	fullTimeout = time.Minute
	// LeanTimeout is how long the kernel does not report flows after the last Hidden.On: not
	// for long if the daemon dies.
	LeanTimeout = 15 * time.Second
	// AliveTimeout is how long a sign of life lasts at least: long enough for an upgrade or a
	// repair, during which hosts go on as before, and short enough for tables that nobody
	// attends any more.
	AliveTimeout = time.Hour
	// OwnedLonger is how much longer an outside endpoint is owned than its mapping lasts.
	// If ownership ended first, two hosts could share the endpoint for a moment.
	OwnedLonger = time.Second
	// keptTimeout is the minimum of MappingsConfig.KeptFor.
	keptTimeout = 3 * time.Minute
	// AddressTimeout is how long the sets remember which of several outside addresses the
	// user's rules gave a host.
	AddressTimeout = time.Hour
	// goneTimeout is how long no mapping to a lost address is learned. Within that time the
	// flows with that address must end.
	goneTimeout = 10 * time.Second
)
