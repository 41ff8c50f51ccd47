package rules

import (
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// DefaultName is the name of our tables.
const DefaultName = "conenat"

// Config tells Open which tables in which network namespace to use.
type Config struct {
	// NetNS is a file descriptor of the network namespace, 0 for the current one.
	NetNS int
	// Name is the name of both tables, by default DefaultName.
	Name string
}

// Desired says what the tables must do.
type Desired struct {
	// OutsideLinks are the names of links, which need not exist. Packets from other links
	// neither meet the guard nor get in by a permission.
	OutsideLinks []string
	// Not4 and Not6 are those OutsideLinks that are not outside links for IPv4 and for
	// IPv6.
	Not4, Not6 []string
	// Subnets are the enabled subnets. A family without a subnet is left alone.
	Subnets []netip.Prefix
	// Guard drops new UDP packets to the gateway for which it has no socket.
	Guard bool
	// Quiet lets Tables.NewQuiet keep the kernel from reporting IPv4 flows that can have no
	// permission: TCP, and UDP to ExcludePeerPorts. A map that leans does so, too.
	Quiet            bool
	ExcludePeerPorts []uint16
	// Spoofed drops forwarded UDP packets from outside whose source is in Subnets, if the
	// way back to the source is not an outside link. It must not be set where the way back
	// depends on something that only the answers have, such as a mark.
	Spoofed bool
	// Published are destinations that rules of the user's lead on, and that are not the
	// gateway's. The way back to the source may depend on where they lead (ip rule from), so
	// packets to them are not taken for spoofed.
	Published cone.AddrRanges
	// Partial are those OutsideLinks that lead only to some peers. Packets that come by
	// such a link from any other peer are spoofed.
	Partial []string
	// OneArmed are those OutsideLinks by which hosts of Subnets also come. A packet that
	// comes by one with a source in Subnets is from inside if the link is the way back to
	// the source.
	OneArmed []string
	// Far are those of OneArmed that are the way back to hosts of Subnets only through a
	// default route. With two such links either may be the way back, and a host may come by
	// the other.
	Far []string
	// InsideLinks are links on which the user vouches for sources in Subnets: they are not
	// spoofed, whatever link is the way back. None of them is an outside link.
	InsideLinks []string
	// Segments has, for each link that may be the way back to a host, the other links of its
	// network segment: packets of the host may come by any of them.
	Segments map[string][]string
	// ZonedAddrs are the outside addresses of flows that have a conntrack zone in the
	// original direction alone, so that their outside endpoints are in the default zone. If
	// there are none, flows with a zone are left alone.
	ZonedAddrs []netip.Addr
	// InZone are destinations to which only an expectation admits, while flows have a zone in the
	// original direction alone. Packets from outside to them that come in a zone are counted.
	InZone []netip.Prefix
	// Bridges are bridges on which the gateway has neither address nor route. If the firewall filters
	// bridged packets, the hooks also see packets that stay on a bridge, and cannot tell
	// where they came from.
	Bridges []string
	// Helpers are the names of the conntrack helpers on anchors. Without any there are no
	// expectations. With them, packets that match an anchor are dropped, and so are the
	// first packets of expected flows that came by no outside link.
	Helpers []string
	// Helped remembers between which hosts conntrack helpers of the user's work, of Subnets and,
	// with Self, of the gateway; AutoHelpers says that the kernel gives flows helpers by
	// itself. Both matter with expectations alone.
	Helped, AutoHelpers bool
	// Self allows expectations for sockets of the gateway itself: their children are judged
	// in the input hook, and no forwarded packet may have an address of the gateway as its
	// source.
	Self bool
	// MaxChildren is how many simultaneous flows one peer may have to one outside endpoint
	// through an expectation; 0 means no cap.
	MaxChildren int
	// Diverted say from which ports of peers no child gets in.
	Diverted []Diversion
	// Map admits packets that match the map of permissions. If nil there is no map.
	Map *MapConfig
	// Mapping keeps one outside endpoint for each inside endpoint. If nil, the user's rules
	// and the kernel choose outside endpoints.
	Mapping *MappingConfig
	// UplinkMarks keeps flows of Subnets, and their children, on their uplink. If nil,
	// conenatd sets no such marks.
	UplinkMarks *UplinkMarks

	noIPsec      bool // the kernel has no IPsec
	noFib        bool // the kernel has no route lookup (fib)
	noWayBack    bool // the kernel has no route lookup in the chain way_back
	noForwardFib bool // the kernel has no route lookup in the forward hook
}

// A MappingConfig says how UDP flows over IPv4 get their outside endpoints (RFC 4787:
// endpoint-independent mapping, no port overloading). The user's own rules translate flows
// without a mapping, and mappings are learned from the result: only flows that they
// translate get one.
type MappingConfig struct {
	// Subnets are the inside subnets with mappings. IPv6 subnets are ignored.
	Subnets []netip.Prefix
	// Exempt are destinations to which no flow gets a mapping. They must include every
	// destination that leaves by an outside link and that the user's rules do not
	// translate, except for traffic that IPsec takes.
	Exempt []netip.Prefix
	// Pools have the outside ports for newcomers whose own port is owned by another host or
	// served by the gateway. Hosts without a pool are left to the user's rules.
	Pools []Pool
	// Choosers has, for each outside link, the hosts whose outside ports the user's rules
	// choose themselves. These hosts are left to those rules.
	Choosers map[string][]netip.Prefix
	// Differ are the outside links on which the user's rules may translate hosts to different
	// addresses. There a host gets no port of a pool until its own flows show its address.
	Differ []string
	// Lifetime is how long a mapping lives after the last packet of one of its unanswered
	// flows, or after the last Keep.
	Lifetime time.Duration
	// Size is the maximum number of mappings. When it is reached, further flows are left to
	// the user's rules. Changing Size ends all mappings.
	Size int
	// TakenFor is how long an outside port stays in use towards a remote endpoint after the
	// last packet of an unanswered flow without a mapping. It must be at least
	// nf_conntrack_udp_timeout, and at least the time until the next Take, by which the
	// daemon reports for another KeptFor that the flow lives. The minimums, and defaults,
	// are one minute and three minutes.
	TakenFor, KeptFor time.Duration
	// Served are outside ports that local sockets hold or that the user's rules forward.
	// They get no new mapping; an existing mapping continues.
	Served []uint16
	// Hairpin are the subnets whose hosts can reach each other by hairpinning. If empty,
	// there is no hairpinning.
	Hairpin []netip.Prefix

	// Links are outside links that keep their mappings while they are away. Without an
	// entry here, the mappings of a link end as soon as OutsideLinks lacks it.
	Links []string

	noIPsec bool // the kernel has no IPsec
}

// UplinkMarks say how the marks of flows, and of their packets from inside, encode the
// uplink by which they leave, for rules of policy routing.
type UplinkMarks struct {
	// Mask has the bits of the mark that encode the uplink; they are adjacent. No other bit
	// changes.
	Mask uint32
	// Links are the uplinks: the first is encoded in these bits as 1, the second as 2.
	Links []string
}

// Mark returns the mark of Links[i].
func (m *UplinkMarks) Mark(i int) uint32 { return uint32(i+1) << bits.TrailingZeros32(m.Mask) }

// A Pool has the outside ports for hosts of some of the subnets with mappings. Pools must
// not share subnets, and port 0 is not allowed.
type Pool struct {
	Subnets []netip.Prefix
	Ports   cone.PortRanges
}

// A MapConfig says how permissions get into the map that admits IPv4 packets from outside,
// in addition to those that are granted.
type MapConfig struct {
	// Size is the maximum number of permissions in the map. Changing it empties the map.
	Size int
	// Lifetime is how long a permission that the kernel learned lives.
	Lifetime time.Duration
	// MaxChildren is how many simultaneous flows one peer may have to one outside endpoint
	// through the map, and how many it may open at once, and then every 30 s; 0 means no cap.
	MaxChildren int
	// Learn lets the kernel itself add a permission when the first packet of a flow leaves.
	// The flow must be from an enabled subnet, not have come in by an outside link, be
	// source-NATed, leave by an outside link, and match none of the exclusions.
	Learn bool
	// LearnRate is how many permissions per second the kernel learns from one inside
	// address. Bursts may be five times as large.
	LearnRate int
	// Lean lets elements.Lean keep the kernel from reporting flows.
	Lean bool
	// Subnets are the enabled subnets. IPv6 subnets are ignored.
	Subnets []netip.Prefix
	// OpenSubnets are those of Subnets whose permissions are for everybody. PeerGroups are
	// prefixes; a flow to one address of a prefix permits the whole prefix.
	OpenSubnets []netip.Prefix
	PeerGroups  []netip.Prefix
	// The kernel learns nothing from flows to ExcludePeers or ExcludePeerPorts, nor from
	// flows whose outside endpoint has one of ExcludePorts.
	ExcludePeers     []netip.Prefix
	ExcludePeerPorts []uint16
	ExcludePorts     []uint16

	noLabels bool // the kernel has no conntrack labels
	noNumgen bool // the kernel has no random numbers for rules
	noCount  bool // the kernel cannot count flows for each peer
}

// Counters count packets since the tables were made, by the names of the counters in nft. A
// counter that the tables do not have is 0.
type Counters map[string]uint64

// Admitted are the first packets of flows that the map admitted, and that no chain of ours
// dropped afterwards. The user's firewall may have dropped them later.
func (c Counters) Admitted() uint64 { return c[admittedCounter] - c[divertedCounter] }

// Expected are the first packets of flows that expectations on anchors let in.
func (c Counters) Expected() uint64 { return c[expectedCounter] }

// Zoned are packets from outside to one of Desired.ZonedAddrs that came in a conntrack zone
// and that no expectation admitted.
func (c Counters) Zoned() uint64 { return c[zonedCounter] }

// Unexpected are packets from outside to Desired.InZone that came in a conntrack zone and that no
// expectation admitted.
func (c Counters) Unexpected() uint64 { return c[unzonedCounter] }

// PoolUsedUp are the newcomers that found no free port in their pool.
func (c Counters) PoolUsedUp() uint64 { return c[usedUpCounter] }

// AdmittedInto and ExpectedInto return the part of Admitted and Expected for one of
// Desired.Subnets. They return false if it was not counted: there is only that subnet, or the
// kernel has no labels.
func (c Counters) AdmittedInto(subnet netip.Prefix) (uint64, bool) {
	return c.into(admittedCounter, subnet)
}

// ExpectedInto is AdmittedInto for Expected.
func (c Counters) ExpectedInto(subnet netip.Prefix) (uint64, bool) {
	return c.into(expectedCounter, subnet)
}

func (c Counters) into(counter string, subnet netip.Prefix) (uint64, bool) {
	n, ok := c[into(counter, subnet)]
	return n, ok
}

// A Feature is something that a kernel may lack.
type Feature string

// The features. Without FeatureTable the package can do nothing.
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
	FeatureQuiet       Feature = "fewer reports of flows"
)

// An UnsupportedError says that the kernel, or this build, lacks a Feature.
type UnsupportedError struct {
	Feature Feature
	Fix     string // how to make it available
	Err     error  // what the kernel said; may be nil
}

func (e *UnsupportedError) Error() string {
	s := fmt.Sprintf("%s not supported: %s", e.Feature, e.Fix)
	if e.Err != nil {
		s += fmt.Sprintf(" (%v)", e.Err)
	}
	return s
}

// Unwrap returns what the kernel said.
func (e *UnsupportedError) Unwrap() error { return e.Err }

// ErrForeignTable says that a table with our name exists which conenatd did not make. It
// was not touched.
var ErrForeignTable = errors.New("it exists and conenatd did not make it: choose another name")

// ErrOwned says that another running process owns our table.
var ErrOwned = errors.New("another process owns it: is a second conenatd running?")
