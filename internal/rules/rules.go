package rules

import (
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"time"
)

// DefaultName is the name of our tables.
const DefaultName = "conenat"

// Config tells Open where to work.
type Config struct {
	// NetNS is a file descriptor of the network namespace, 0 for the current.
	NetNS int
	// Name is the name of both tables, DefaultName when it is empty.
	Name string
}

// Desired is what the tables shall do.
type Desired struct {
	// OutsideLinks are the names of links, which need not exist. Packets from
	// other links do not meet the guard, nor do they get in by a permission.
	OutsideLinks []string
	// Not4 and Not6 are those of OutsideLinks that are none for IPv4 and for IPv6.
	Not4, Not6 []string
	// Subnets are those that are enabled. A family without any is left alone.
	Subnets []netip.Prefix
	// Guard drops new UDP packets to the gateway that no socket waits for.
	Guard bool
	// Spoofed drops UDP packets from outside that are not for the gateway, and have a
	// source in Subnets that is not reached by an outside link. It must not be set where
	// the way back depends on what only the answers have.
	Spoofed bool
	// Partial are those of OutsideLinks behind which there are only peers to whom they are
	// the way: others that come by them are faked.
	Partial []string
	// OneArmed are those of OutsideLinks by which hosts of Subnets come, too: what comes by
	// them with a source in Subnets is from inside if they are the way back to it.
	OneArmed []string
	// Far are those of OneArmed that only a default route makes the way back to hosts of
	// Subnets: of two such links either may be it, and a host may come by the other one.
	Far []string
	// InsideLinks are links of which the user says that a source in Subnets is not spoofed,
	// whatever link is the way back to it. None of them is an outside link.
	InsideLinks []string
	// Uppers are links that share the network of another one, each with the name of
	// that: a packet may come by either, and the way back to its source be either.
	Uppers map[string]string
	// ZonedAddrs are outside addresses of flows where conntrack zones are given to the
	// original direction alone, so that all outside endpoints are of the default zone.
	// Without any, what has a zone is left alone.
	ZonedAddrs []netip.Addr
	// Bridges are links of which the gateway is no host. With a firewall there the forward
	// hook sees the packets that stay on one, too, and cannot tell where they came from.
	Bridges []string
	// Helpers are the names of the conntrack helpers on anchors. Without any there are
	// no expectations. With them, packets that match an anchor are dropped, and so are
	// first packets of expected flows that came by no outside link.
	Helpers []string
	// Self lets expectations be for sockets of the gateway itself, too: their children are
	// judged in the input hook, and nobody else may send with an address of the gateway.
	Self bool
	// MaxChildren is how many flows at a time one peer may have to one outside
	// endpoint by way of an expectation; 0 means no cap.
	MaxChildren int
	// Map admits what is in the map of permissions. Without it there is no map.
	Map *MapConfig
	// Mapping keeps one outside endpoint for each inside endpoint. Without it
	// that is left to the user's rules and the kernel.
	Mapping *MappingConfig
	// UplinkMarks keeps flows of Subnets, and their children, on their uplink. Without it
	// marks are the user's alone.
	UplinkMarks *UplinkMarks

	noIPsec      bool // the kernel has none
	noFib        bool // nor a look-up of routes
	noWayBack    bool // nor one in the chain way_back
	noForwardFib bool // nor one in the forward hook
}

// A MappingConfig says how UDP flows over IPv4 get their outside endpoints
// (RFC 4787: endpoint-independent mapping, no port overloading). What has no
// mapping yet is translated by the user's own rules, from which mappings are
// learned: only what they translate gets one.
type MappingConfig struct {
	// Subnets are the inside subnets with mappings; those of IPv6 do not matter.
	Subnets []netip.Prefix
	// Exempt are destinations to which no flow gets a mapping. All that the
	// user's rules leave untranslated, though it leaves by an outside link, has
	// to be among them, but not what IPsec takes.
	Exempt []netip.Prefix
	// Pools have the outside ports for newcomers whose own port another one owns, or the
	// gateway serves. A host of none is left to the user's rules.
	Pools []Pool
	// Choosers are the hosts for which the user's rules choose outside ports themselves,
	// by outside link. They are left to these rules.
	Choosers map[string][]netip.Prefix
	// Lifetime is how long a mapping stands after the last packet of a flow of
	// its that is not answered yet, or after the last Keep.
	Lifetime time.Duration
	// Size is how many mappings there can be. Without room for one more, a flow
	// is left to the user's rules. Another size ends all mappings.
	Size int
	// TakenFor is how long an outside port is in use towards a remote endpoint after the
	// last packet of a flow without a mapping that is not answered. It must not be
	// less than nf_conntrack_udp_timeout, nor than the time until the next Take, by
	// which the daemon says for another KeptFor that the flow lives. A minute and three
	// are the least values, and the default.
	TakenFor, KeptFor time.Duration
	// Served are outside ports that local sockets hold, or that the user's rules
	// forward. They get no mapping; one that stands already goes on.
	Served []uint16
	// Hairpin are the subnets between whose hosts there is hairpinning; without
	// any there is none.
	Hairpin []netip.Prefix

	// Links are outside links that have mappings though they may be away: else these
	// end as soon as OutsideLinks lacks the link.
	Links []string

	noIPsec bool // the kernel has none
}

// UplinkMarks say how the marks of flows, and of their packets from inside, tell by which
// uplink they leave, for rules of policy routing.
type UplinkMarks struct {
	// Mask has the bits of the marks that tell it, side by side. No other bit changes.
	Mask uint32
	// Links are the uplinks: in these bits the first has the value 1, the second 2.
	Links []string
}

// Mark returns the mark of Links[i].
func (m *UplinkMarks) Mark(i int) uint32 { return uint32(i+1) << bits.TrailingZeros32(m.Mask) }

// A Pool has the outside ports for hosts of some of the subnets with mappings. No two
// pools have a subnet in common, and no port is 0.
type Pool struct {
	Subnets []netip.Prefix
	Ports   []PortRange
}

// A PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// A MapConfig says how permissions come into the map by which IPv4 packets from
// outside are admitted, beside those that are granted.
type MapConfig struct {
	// Size is how many permissions the map can hold. Another one empties it.
	Size int
	// Lifetime is how long a permission that the kernel learned stands.
	Lifetime time.Duration
	// MaxChildren is how many flows one peer may make to one outside endpoint in
	// 30 s by way of the map, once it made as many at one time; 0 means no cap.
	MaxChildren int
	// Learn lets the kernel itself add a permission when the first packet of a
	// flow leaves: one from an enabled subnet that came in by no outside link,
	// was source-NATed and leaves by an outside link, none of the exclusions.
	Learn bool
	// LearnRate is how many permissions the kernel learns from one inside
	// address in a second. It may learn five times as many at once.
	LearnRate int
	// Subnets are the enabled subnets; those of IPv6 do not matter here.
	Subnets []netip.Prefix
	// OpenSubnets are those of Subnets whose permissions are for everybody, and
	// PeerGroups the prefixes inside which a contact with one address permits all.
	OpenSubnets []netip.Prefix
	PeerGroups  []netip.Prefix
	// ExcludePeers, ExcludePeerPorts and ExcludePorts (of the outside endpoint)
	// give the kernel nothing to learn.
	ExcludePeers     []netip.Prefix
	ExcludePeerPorts []uint16
	ExcludePorts     []uint16

	noLabels bool // the kernel has none
}

// Counters count packets since the tables were made.
type Counters struct {
	// SpoofedDrops are those with an inside source from outside, and those with a
	// peer's source from elsewhere. PortZeroDrops are those that match an anchor, and
	// ICMP errors about one.
	GuardDrops, SpoofedDrops, ChildDrops, PortZeroDrops uint64
	// Unsure are the flows that began by a link that is not the way back to their
	// source. Nothing is learned from them.
	Unsure uint64
	// Admitted are the first packets of flows that the map admitted. The user's
	// firewall may have dropped them afterwards.
	Admitted uint64
	// Expected are those of flows that expectations on anchors let in.
	Expected uint64
	// Zoned are packets from outside to one of Desired.ZonedAddrs that neither the map nor an
	// expectation admitted and that came in a conntrack zone.
	Zoned uint64
	// Learned and LearnLimited are the packets from which the kernel learned a
	// permission, and those from which it did not because of the rate.
	Learned, LearnLimited uint64
	// Moved are the newcomers that got a port of the pool, PoolUsedUp those that
	// found none. LeftToRules are the flows that could not have their mapping
	// because something else uses the outside port towards that remote endpoint.
	// Hairpinned are flows from inside to an outside endpoint.
	Moved, PoolUsedUp, LeftToRules, Hairpinned uint64
	// PortShared are the flows to which the user's rules gave the outside endpoint of
	// another one's mapping.
	PortShared uint64
}

// A Feature is something that a kernel may lack.
type Feature string

// The features. Without FeatureTable there is nothing at all.
const (
	FeatureTable       Feature = "nftables"
	FeatureGuard       Feature = "guard"
	FeatureSpoofed     Feature = "drop of inside sources that come from outside"
	FeatureWayBack     Feature = "doubt about inside sources that come by another link"
	FeaturePartial     Feature = "children by links that lead to a part of the Internet"
	FeatureMaxChildren Feature = "cap on children"
	FeatureMap         Feature = "map of permissions"
	FeatureLearn       Feature = "learning in the kernel, with a cap on children of the map"
	FeatureLabels      Feature = "label of children of the map"
	FeatureMapping     Feature = "endpoint-independent mapping"
	FeatureUplinkMarks Feature = "marks of uplinks"
)

// An UnsupportedError says that the kernel, or this build, lacks a Feature.
type UnsupportedError struct {
	Feature Feature
	Mend    string // what would mend it
	Err     error  // what the kernel said; may be nil
}

func (e *UnsupportedError) Error() string {
	s := fmt.Sprintf("%s not supported: %s", e.Feature, e.Mend)
	if e.Err != nil {
		s += fmt.Sprintf(" (%v)", e.Err)
	}
	return s
}

// Unwrap returns what the kernel said.
func (e *UnsupportedError) Unwrap() error { return e.Err }

// ErrForeignTable says that a table of our name is there that conenatd did not
// make. It was not touched.
var ErrForeignTable = errors.New("it exists and conenatd did not make it: choose another name")

// ErrOwned says that another process, which lives, owns our table.
var ErrOwned = errors.New("another process owns it: is a second conenatd running?")
