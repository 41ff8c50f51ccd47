package cone

import (
	"net/netip"
	"slices"
	"time"
)

// A Policy says which flows give permissions and how long these live.
type Policy struct {
	Subnets []Subnet
	Limits  Limits

	// Self4 and Self6 make the gateway's own addresses of a family inside hosts, whether
	// their flows are translated or not. All of them count as one host, and as one subnet.
	// Only expectations carry their permissions.
	Self4, Self6 bool

	// Lifetime is how long a permission lives at least after its last traffic from inside
	// (RFC 4787 REQ-5, RFC 8656 section 9). It must be positive.
	Lifetime time.Duration

	// Retry is how long a refused permission waits before it is tried again.
	// It must be positive.
	Retry time.Duration

	// Expected says that permissions may stand as expectations.
	Expected bool

	// Mapped says that permissions may stand as elements of an nftables map. Their children
	// are DNATed and not expected, like flows of a user's forward.
	Mapped bool

	// Labels says that the kernel labels the children of the map. Without labels, a DNATed
	// flow that goes where a permission leads is taken for a child.
	Labels bool

	// Learned says that the kernel makes permissions by itself while the first packet of a
	// flow passes. Deny tells it which ones it must not make.
	Learned bool

	// PeerGroups are prefixes inside which a contact with one address permits all. They do
	// not overlap. Where a permission cannot stand for a group, each address of a small
	// group (ExpandBits) gets its own; of a larger group only contacted addresses do.
	PeerGroups []netip.Prefix

	// Shut are flows that the user's firewall drops if forwards of the user's lead them to their hosts.
	// An expectation takes nothing from such a forward, and nothing else admits peers.
	Shut []Shut

	ExcludePeers     []netip.Prefix // peers that never get a permission
	ExcludePeerPorts []uint16       // peer ports that never give one
	ExcludePorts     []uint16       // outside ports that never get one
}

// A Subnet is an enabled inside network. If Routed is set, flows without source NAT count
// too.
type Subnet struct {
	Prefix    netip.Prefix
	Routed    bool
	Filtering Filtering
	Mapping   bool // its mapping is endpoint-independent: our rules choose the ports
	Choice    Choice
}

// Shut are flows from peers to ports of inside hosts.
type Shut struct {
	Peers, Hosts netip.Prefix
	Ports        PortRange
}

// has reports whether the flows of all peers of p to its host are among them.
func (s *Shut) has(p *Permission) bool {
	peers := p.Peers()
	return s.Ports.Has(p.Int.Port) && s.Hosts.Contains(p.Int.Addr.Netip()) &&
		s.Peers.Bits() <= peers.Bits() && s.Peers.Contains(peers.Addr())
}

// Filtering says who may send to a mapping (RFC 4787 section 5).
type Filtering uint8

// The kinds of filtering.
const (
	// AddressDependent lets in the peers that the inside host has sent to, from any port.
	AddressDependent Filtering = iota
	// EndpointIndependent lets in anybody (a full cone).
	EndpointIndependent
	// AddressAndPortDependent is what the kernel does by itself: no permissions.
	AddressAndPortDependent
)

// portSet is a set of ports; a look-up costs one load.
type portSet [1 << 16 / 64]uint64

func newPortSet(ports []uint16) *portSet {
	var s portSet
	for _, p := range ports {
		s[p/64] |= 1 << (p % 64)
	}
	return &s
}

func (s *portSet) has(p uint16) bool { return s[p/64]&(1<<(p%64)) != 0 }

// policy is a Policy prepared for fast look-ups.
type policy struct {
	Policy
	peerPorts, ports *portSet
	excluded         *spans // peers
	groups, subnets  *PrefixTable
	forGroups        bool // there may be permissions for more than one peer

	// own are the gateway's addresses, of the families of Self4 and Self6.
	own map[Addr]struct{}
}

// compilePolicy prepares p for a gateway with these addresses.
func compilePolicy(p Policy, local map[Addr]struct{}) policy {
	prefixes := make([]netip.Prefix, len(p.Subnets))
	for i, s := range p.Subnets {
		prefixes[i] = s.Prefix
	}
	return policy{
		own:       p.ownOf(local),
		Policy:    p,
		peerPorts: newPortSet(p.ExcludePeerPorts),
		ports:     newPortSet(p.ExcludePorts),
		excluded:  spansOf(p.ExcludePeers),
		groups:    NewPrefixTable(p.PeerGroups),
		subnets:   NewPrefixTable(prefixes),
		forGroups: len(p.PeerGroups) > 0 || slices.ContainsFunc(p.Subnets, func(s Subnet) bool {
			return s.Filtering == EndpointIndependent
		}),
	}
}

// widen turns x, a permission for one peer, into the one for all peers that a contact with
// this peer permits. A map can hold it, and so can an expectation that translates nothing.
// Where an expectation would have to translate, a small group is expanded instead (expand).
func (p *policy) widen(x *Permission) {
	if !p.forGroups || !x.Routed() && !p.mappable(x) {
		return
	}
	_, s, ok := p.subnet(x.Int.Addr.Netip())
	if ok && s.Filtering == EndpointIndependent {
		x.HostBits = 128
		if x.Peer.Is4() {
			x.HostBits = 32
		}
	} else {
		x.HostBits = groupBits(p.groups, x.Peer)
	}
	x.Peer = x.Peer.WithoutLow(x.HostBits)
}

// groupBits returns how many low bits of a peer's address do not matter.
func groupBits(groups *PrefixTable, peer Addr) uint8 {
	a := peer.Netip()
	i := groups.Find(a)
	if i < 0 {
		return 0
	}
	return uint8(a.BitLen() - groups.prefixes[i].Bits())
}

// ExpandBits bounds the groups that are expanded into one permission for each address:
// their prefixes leave at most so many bits free.
const ExpandBits = 4

// Expand returns the first address of the small group that holds peer, and how many there
// are (Addr.Plus). Without such a group it returns peer alone.
func Expand(groups *PrefixTable, peer Addr) (first Addr, n int) {
	if low := groupBits(groups, peer); low <= ExpandBits {
		return peer.WithoutLow(low), 1 << low
	}
	return peer, 1
}

// expand returns the first of the peers to which a contact gives permissions like x, one
// each, and how many they are. They are more than one for a small group that x cannot cover
// as a whole: an expectation that translates is for one peer.
func (p *policy) expand(x *Permission) (first Addr, n int) {
	if p.forGroups && x.HostBits == 0 && !x.Routed() {
		return Expand(p.groups, x.Peer)
	}
	return x.Peer, 1
}

// children returns how many children a permission may have at a time.
func (p *policy) children(k *Key) int {
	if k.HostBits > 0 {
		return GroupChildren * p.Limits.Children
	}
	return p.Limits.Children
}

// GroupChildren is how many times as many children a permission for more than one peer may
// have.
const GroupChildren = 16

// refuses returns why a flow from an enabled subnet gives no permission, or
// the zero Reason.
func (p *policy) refuses(ext, peer Endpoint, t *topology) Reason {
	if p.peerPorts.has(peer.Port) {
		return ReasonExcludedPeerPort
	}
	return p.refusesEndpoint(ext, peer, t)
}

// refusesEndpoint is refuses without the check for excluded peer ports.
func (p *policy) refusesEndpoint(ext, peer Endpoint, t *topology) Reason {
	a := peer.Addr.Netip()
	switch {
	case ext.Port == 0 || peer.Port == 0:
		return ReasonPortZero
	case !unicast(a):
		return ReasonNotUnicast
	case p.ports.has(ext.Port):
		return ReasonExcludedPort
	case !t.outside(a):
		return ReasonPeerInside
	}
	if p.excluded.has(a) {
		return ReasonExcludedPeer
	}
	if _, _, inside := p.subnet(a); inside {
		return ReasonPeerInside
	}
	return ReasonNone
}

var (
	thisNetwork = netip.MustParsePrefix("0.0.0.0/8")
	class4E     = netip.MustParsePrefix("224.0.0.0/3") // multicast, reserved, broadcast
)

func unicast(a netip.Addr) bool {
	switch {
	case a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast():
		return false
	case a.Is4():
		return !thisNetwork.Contains(a) && !class4E.Contains(a)
	}
	return true
}
