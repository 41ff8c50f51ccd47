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

	// Self4 and Self6 let the gateway's own addresses of a family be inside hosts, whether
	// their flows are translated or not. All of them count as one host, and as one subnet.
	// Only expectations carry their permissions.
	Self4, Self6 bool

	// Lifetime is how long a permission lives at least after it was last fed
	// from inside (RFC 4787 REQ-5, RFC 8656 section 9). It must be positive.
	Lifetime time.Duration

	// Retry is how long a refused permission waits before it is tried again.
	// It must be positive.
	Retry time.Duration

	// Expected says that permissions may stand as expectations.
	Expected bool

	// Mapped says that permissions may stand as elements of an nftables map.
	// Their children are DNATed, not expected, as flows of a forward of the user's.
	Mapped bool

	// Labels says that the kernel labels the children of the map. Without, a flow that
	// a forward leads where a permission would is taken for a child.
	Labels bool

	// Learned says that the kernel makes permissions by itself, while the
	// first packet of a flow passes. Deny tells it which it must not make.
	Learned bool

	// PeerGroups are prefixes inside which a contact with one address permits
	// all. They do not overlap. Where permissions cannot stand for a group, each
	// peer of a small one (SpreadBits) gets its own, of others each that was
	// contacted.
	PeerGroups []netip.Prefix

	ExcludePeers     []netip.Prefix // peers that never get a permission
	ExcludePeerPorts []uint16       // peer ports that never give one
	ExcludePorts     []uint16       // outside ports that never get one
}

// A Subnet is an enabled inside network. Routed takes flows that were not
// source-NATed too.
type Subnet struct {
	Prefix    netip.Prefix
	Routed    bool
	Filtering Filtering
	Mapping   bool // its mapping is endpoint-independent: who gets which port is not the kernel's choice
	Choice    Choice
}

// Filtering says who may send to a mapping (RFC 4787 section 5).
type Filtering uint8

// The kinds of filtering.
const (
	// AddressDependent lets in whom the inside host has sent to, from any port.
	AddressDependent Filtering = iota
	// EndpointIndependent lets in anybody (a full cone).
	EndpointIndependent
	// AddressAndPortDependent is what the kernel does by itself: no permissions.
	AddressAndPortDependent
)

// portSet is a set of ports that costs one load to ask.
type portSet [1 << 16 / 64]uint64

func newPortSet(ports []uint16) *portSet {
	var s portSet
	for _, p := range ports {
		s[p/64] |= 1 << (p % 64)
	}
	return &s
}

func (s *portSet) has(p uint16) bool { return s[p/64]&(1<<(p%64)) != 0 }

// policy is a Policy made quick to ask.
type policy struct {
	Policy
	peerPorts, ports *portSet
	excluded         *spans // peers
	groups, subnets  *PrefixTable
	wild             bool // there may be permissions for more than one peer

	// own are the gateway's addresses, of the families of Self4 and Self6.
	own map[Addr]struct{}
}

// compilePolicy makes p quick to ask on a gateway with these addresses.
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
		wild: len(p.PeerGroups) > 0 || slices.ContainsFunc(p.Subnets, func(s Subnet) bool {
			return s.Filtering == EndpointIndependent
		}),
	}
}

// widen makes p, a permission for one peer, the one for all peers that the
// contact with it permits. A map holds such a one, and so does an expectation
// that translates nothing; one that does makes the peer's address its own. So where
// the expectations of a subnet do the work, a small group is spread.
func (p *policy) widen(x *Permission) {
	if !p.wild || !x.Routed() && !p.mappable(x) {
		return
	}
	_, s, ok := p.subnet(x.Int.Addr.Netip())
	if ok && s.Filtering == EndpointIndependent {
		x.Wild = 128
		if x.Peer.Is4() {
			x.Wild = 32
		}
	} else if low := groupBits(p.groups, x.Peer); x.Routed() || !p.Expected || s.Choice == ChooseMap || low > SpreadBits {
		x.Wild = low
	}
	x.Peer = x.Peer.WithoutLow(x.Wild)
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

// SpreadBits bounds the groups whose permissions are spread, one for each address: they
// leave at most so many bits free.
const SpreadBits = 4

// Spread returns the first peer of the small group that peer is of, and how many there
// are (Addr.Plus); without such a group it is the peer alone.
func Spread(groups *PrefixTable, peer Addr) (first Addr, n int) {
	if low := groupBits(groups, peer); low <= SpreadBits {
		return peer.WithoutLow(low), 1 << low
	}
	return peer, 1
}

// spread returns for how many peers a contact gives a permission like x, each of its
// own, and the first. It is more than one for a small group that no permission can be
// for as a whole: an expectation that translates is for one peer.
func (p *policy) spread(x *Permission) (first Addr, n int) {
	if p.wild && x.Wild == 0 && !x.Routed() {
		return Spread(p.groups, x.Peer)
	}
	return x.Peer, 1
}

// children returns how many children a permission may have at a time.
func (p *policy) children(k *Key) int {
	if k.Wild > 0 {
		return WildChildren * p.Limits.Children
	}
	return p.Limits.Children
}

// WildChildren is how many times as many children a permission may have that is
// not for one peer.
const WildChildren = 16

// refuses returns why a flow from an enabled subnet gives no permission, or
// the zero Reason.
func (p *policy) refuses(ext, peer Endpoint, t *topology) Reason {
	if p.peerPorts.has(peer.Port) {
		return ReasonExcludedPeerPort
	}
	return p.refusesEndpoint(ext, peer, t)
}

// refusesEndpoint is refuses for whatever port of the peer.
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
