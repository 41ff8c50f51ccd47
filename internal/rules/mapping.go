//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/conenatd/conenatd/internal/rules/elements"
)

// Names of sets and counters.
const (
	mappedSet      = "mapped_subnets"
	exemptSet      = "exempt"
	servedSet      = "served"
	hairpinSet     = "hairpin_subnets"
	movedCounter   = "moved"
	usedUpCounter  = "pool_used_up"
	leftCounter    = "left_to_rules"
	hairpinCounter = "hairpinned"
)

const (
	// Before all of the user's rules that translate: a flow that gets its mapping here
	// is done, any other one goes on to them. nft takes no number below, and all NAT
	// chains run inside one hook of the kernel, so this only orders them.
	mapPriority = -199
	// After the user's own forwards, which come first and win, whatever their priority.
	hairpinPriority = 1<<31 - 1
	// After srcnat and learn, when the outside endpoint is known.
	rememberPriority = 291
	// After guard: what it drops takes no outside endpoint.
	arrivalsPriority = 210
)

const (
	// takenTimeout is the least value of MappingConfig.TakenFor.
	takenTimeout = time.Minute
	// copyTimeout is that of an element for which the rule tells none: nft 1.0.2 drops the
	// timeouts of maps where it loads what it listed.
	copyTimeout = time.Hour
	// takenSize bounds the flows that are remembered, addressesSize the hosts, and
	// linkAddressesSize the outside addresses of a link.
	takenSize         = 1 << 18
	addressesSize     = 1 << 16
	linkAddressesSize = 1 << 12
)

// Keys of the sets.
var (
	addressKey  = []nftables.SetDatatype{nftables.TypeIPAddr}
	endpointKey = []nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeInetService}
)

// mapping keeps one outside endpoint for each inside endpoint and outside link,
// and gives it to no other one (RFC 4787, REQ-1 to REQ-4). An outside link has sets of
// its own, which keep their elements while it is away:
//
//   - kept has the outside address of an inside endpoint that kept its port, moved
//     and ports have that and the port of one that has another. They learn from
//     the first flow, as the user's own rules translated it, or from the pool. Only
//     flows of the inside endpoint itself refresh them.
//   - addresses has, under 0.0.0.0, the outside address that the user's rules gave to
//     the first host that was seen; translated has all that they gave, and 0.0.0.0
//     once there is one; several has 0.0.0.0 once there is a second one. From then on
//     addresses has the one of each host.
//
// And for all links:
//
//   - owned has the outside endpoints of all mappings. With hairpinning, owners and
//     owner_ports have the inside endpoint of each.
//   - taken has the remote endpoints towards which an outside port is used by
//     something that has no mapping: the gateway itself, a packet that came
//     before the answer, a host whose subnet is not enabled.
//   - gone has the outside addresses that went a moment ago.
//
// A flow that is answered does not refresh its mapping, for its packets do not
// come here. A mapping must not end before its last flow, or another host gets
// its port: it is the daemon's to refresh those of living flows, and what is
// taken by living flows without a mapping, in time. Two first packets at one moment,
// on two CPUs, may become owners of one endpoint: the daemon ends one.
func (l *layout) mapping(c *MappingConfig) {
	l.set(elements.GatewaySet, nftables.TypeIPAddr).free = true
	l.counters = append(l.counters, movedCounter, usedUpCounter, leftCounter)
	m := &mapper{
		layout: l, MappingConfig: c,
		owned:   l.learnedSet(elements.OwnedSet, endpointKey, c.Size),
		taken:   l.learnedSet(elements.TakenSet, []nftables.SetDatatype{nftables.TypeInetService, nftables.TypeIPAddr, nftables.TypeInetService}, takenSize),
		gone:    l.learnedSet(elements.GoneSet, addressKey, linkAddressesSize),
		served:  l.set(servedSet, nftables.TypeInetService),
		subnets: l.prefixes(mappedSet, c.Subnets),
	}
	m.served.setPorts(c.Served)
	if len(c.Exempt) > 0 {
		m.exempt = l.prefixes(exemptSet, c.Exempt)
	}
	if len(c.Hairpin) > 0 {
		l.counters = append(l.counters, hairpinCounter)
		m.hairpin = l.prefixes(hairpinSet, c.Hairpin)
		m.owners = l.learnedMap(elements.OwnersMap, endpointKey, nftables.TypeIPAddr, c.Size)
		m.ownerPorts = l.learnedMap(elements.OwnerPortsMap, endpointKey, nftables.TypeInetService, c.Size)
		m.toOutsideEndpoints()
	}
	m.foreign, m.left = m.regular("foreign"), m.regular("left")
	m.rule(m.foreign, "a flow without a mapping takes the port", join(isUDP, put(m.taken, opUpdate, flowTuple, nil, m.takenFor())))
	m.rule(m.left, "", insideSource)
	m.rule(m.left, "its outside port is taken towards this remote endpoint", join(count(leftCounter), accept))
	m.unmoved = m.regular("unmoved")
	m.rule(m.unmoved, "", join(isUDP, insideSourcePort))
	for _, name := range c.links(l.links) {
		u := m.uplink(name)
		if slices.Contains(l.links, name) { // else it only keeps its sets
			m.uplinks = append(m.uplinks, u)
			u.makeChains()
		}
	}
	m.apply()
	m.remember()
	m.arrivals()
}

// links returns the names of the links that have sets: the outside ones, and those that
// were.
func (c *MappingConfig) links(outside []string) []string {
	return slices.Compact(slices.Sorted(slices.Values(slices.Concat(outside, c.Links))))
}

func (l *layout) learnedSet(name string, key []nftables.SetDatatype, size int) *set {
	s := l.set(name, key...)
	s.HasTimeout, s.Dynamic, s.free, s.Size = true, true, true, uint32(size)
	return s
}

func (l *layout) learnedMap(name string, key []nftables.SetDatatype, value nftables.SetDatatype, size int) *set {
	s := l.learnedSet(name, key, size)
	s.IsMap, s.DataType, s.Timeout = true, value, copyTimeout
	return s
}

// addressMap makes a map in which an element without a timeout stands for ever.
func (l *layout) addressMap(name string) *set {
	s := l.learnedMap(name, addressKey, nftables.TypeIPAddr, addressesSize)
	s.Timeout = 0
	return s
}

// A mapper has the sets that the rules of mapping name. All rules load their
// registers themselves: the kernel refuses those that rely on another rule.
type mapper struct {
	*layout
	*MappingConfig

	owned, taken, gone, served *set
	owners, ownerPorts         *set      // nil without hairpinning
	subnets, exempt, hairpin   *prefixes // the last two may be nil
	foreign, left, unmoved     *nftables.Chain
	uplinks                    []*uplink
}

// An uplink makes the rules and sets that are there once for each outside link.
type uplink struct {
	*mapper
	name                                                     string
	kept, moved, ports, addresses, translated, several       *set
	mapped, given, pool, learnAddress, own, ours, hairpinned *nftables.Chain
}

func (m *mapper) uplink(name string) *uplink {
	sets := elements.SetsOfLink(name)
	return &uplink{
		mapper: m, name: name,
		kept:       m.learnedMap(sets.Kept, endpointKey, nftables.TypeIPAddr, m.Size),
		moved:      m.learnedMap(sets.Moved, endpointKey, nftables.TypeIPAddr, m.Size),
		ports:      m.learnedMap(sets.Ports, endpointKey, nftables.TypeInetService, m.Size),
		addresses:  m.addressMap(sets.Addresses),
		translated: m.learnedSet(sets.Translated, addressKey, linkAddressesSize),
		several:    m.learnedSet(sets.Several, addressKey, 1),
	}
}

// leaves tells whether the packet leaves by the link.
func (u *uplink) leaves() piece { return join(oifname, is(linkKey(u.name))) }

// regular adds a chain of this link that only others lead to. No name may be that of
// another one and an underscore with something behind.
func (u *uplink) regular(name string) *nftables.Chain {
	return u.mapper.regular(name + "_" + elements.Identifier(u.name))
}

// makeChains makes the chains that others lead to.
func (u *uplink) makeChains() {
	u.given = u.givesMoved()
	u.pool = u.movedToPool()
	u.mapped = u.throughMapping()
	u.learnAddress = u.learnsAddress()
	u.own = u.owns()
	u.ours = u.remembers()
	if u.hairpin != nil {
		u.hairpinned = u.regular("hairpinned")
	}
}

var (
	inZone       = join(ctZone, is(ne16(0)))
	isForwarded  = join(ctStatus, masked(ctDstNAT), is(ne32(ctDstNAT)))
	isHairpinned = join(ctStatus, masked(ctSrcNAT|ctDstNAT), is(ne32(ctSrcNAT|ctDstNAT)))
	// A packet that IPsec takes is no packet of the link.
	isPlain = piece{
		&expr.Rt{Register: reg, Key: 4}, // NFT_RT_XFRM
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{0}},
	}
)

// apply translates what has a mapping, and moves a newcomer whose port another
// host has, or the gateway, to the pool. Everything else it leaves to the user's
// rules. A NAT chain sees the first packet of a flow only.
func (m *mapper) apply() {
	c := m.chain("map_source", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, mapPriority)
	if m.hairpin != nil {
		m.hairpinSources(c)
	}
	plain := isPlain
	if m.noIPsec {
		plain = nil
	}
	for _, u := range m.uplinks {
		m.rule(c, "a source from outside may be spoofed", join(
			isUDP, u.leaves(), m.outside(iifname, false), inZone, m.exempt.hasNot(destination(0)), plain, goTo(u.mapped)))
	}
}

// known adds the rules for a packet whose source has a mapping. With a port that is
// given the kernel does not look whether the flow is the only one, and drops the packet
// in the end when it is not.
func (u *uplink) known(c *nftables.Chain) {
	u.rule(c, "its mapping", join(
		isUDP, hasNot(u.taken, packetTuple), find(u.kept, packetSourceEndpoint), transport(0, secondWord), snat(true)))
	u.rule(c, "its mapping has another port", join(
		isUDP, setSourcePort(find(u.ports, packetSourceEndpoint)), goTo(u.given)))
	u.rule(c, "", join(isUDP, has(u.taken, packetTuple), setSource(find(u.kept, packetSourceEndpoint)), goTo(u.left)))
}

// givesMoved goes on with a packet that has the source port of its mapping.
func (u *uplink) givesMoved() *nftables.Chain {
	c := u.regular("given")
	u.rule(c, "its outside port is taken towards this remote endpoint", join(
		isUDP, has(u.taken, packetTuple), insideSourcePort, count(leftCounter), accept))
	u.giveMoved(c)
	return c
}

// giveMoved adds rules that put the source of the packet back and translate it to the
// mapping in moved.
func (u *uplink) giveMoved(c *nftables.Chain) {
	u.rule(c, "", join(isUDP, insideSourcePort))
	u.rule(c, "its mapping", join(
		isUDP, find(u.moved, packetSourceEndpoint), findAt(u.ports, sourceEndpointAt(secondWord), secondWord), snat(true)))
}

// throughMapping returns the chain for packets that leave by the link.
func (u *uplink) throughMapping() *nftables.Chain {
	c := u.regular("mapped")
	u.rule(c, "from a host without mappings", join(u.subnets.hasNot(source(0)), accept))
	u.known(c)
	if len(u.Pool) == 0 { // the user's rules choose ports for newcomers
		return c
	}
	newcomer := u.regular("newcomer")
	u.withAddress(c, newcomer)

	u.rule(newcomer, "another one has the port", join(isUDP, has(u.owned, packetSourceEndpoint), goTo(u.pool)))
	u.rule(newcomer, "the gateway has the port", join(isUDP, has(u.served, sourcePort), goTo(u.pool)))
	u.rule(newcomer, "", insideSource)
	return c
}

// withAddress adds rules that give the packet the outside address that the user's rules
// would give it as its source, where that is known, and go on to next. A host that was
// not seen yet is taken to get the address that all others get, where there is but one.
func (u *uplink) withAddress(c, next *nftables.Chain) {
	u.rule(c, "all have one address", join(
		hasNot(u.several, nobody(source(0))), setSource(find(u.addresses, nobody(source(0)))), goTo(next)))
	u.rule(c, "its address is known", join(setSource(find(u.addresses, source(0))), goTo(next)))
}

// movedToPool returns the chain that gives a newcomer a port of the pool that nobody has,
// even or odd as its own (REQ-4). An inside endpoint gets the same ports to try each
// time: two first packets at once agree, and so does the next flow when the mapping is
// gone. When all tries fail it is left to the user's rules.
func (u *uplink) movedToPool() *nftables.Chain {
	c, made := u.regular("pool"), u.regular("made")
	u.rule(c, "", insideSource)
	// The port that is tried first depends on all bits of the port and some of the
	// address, as a linear hash.
	for i, x := range mixers {
		bit := be32(1 << i)
		u.rule(c, "", join(isUDP, source(0), and(bit), is(bit), setSourcePort(join(sourcePort, bitwise(be16(0xffff), be16(x))))))
	}
	tries := u.regular("tries")
	u.withAddress(c, tries)
	u.rule(c, "", goTo(u.unmoved))

	u.rule(tries, "an address that is gone", join(has(u.gone, source(0)), insideSource, goTo(u.unmoved)))
	for _, t := range poolTries(u.Pool) {
		// The low bits are the hash still, or the port that was tried before.
		u.rule(tries, "", join(isUDP, setSourcePort(join(sourcePort, bitwise(be16(t.mask), be16(t.xor))))))
		u.rule(tries, "nobody has it, nor is it taken towards this remote endpoint", join(
			isUDP, hasNot(u.owned, packetSourceEndpoint), hasNot(u.served, sourcePort), hasNot(u.taken, packetTuple),
			u.owner(opAdd, packetSourceEndpoint),
			put(u.moved, opUpdate, flowInside, source(secondWord), u.Lifetime),
			put(u.ports, opUpdate, flowInside, transport(0, secondWord), u.Lifetime),
			count(movedCounter), goTo(made)))
	}
	u.rule(tries, "", join(insideSource, count(usedUpCounter), goTo(u.unmoved)))
	u.rule(made, "", insideSource)
	u.giveMoved(made)
	return c
}

// owner makes the inside endpoint of the flow the owner of the outside endpoint that
// load puts into reg.
func (m *mapper) owner(op uint32, ext piece) piece {
	p := put(m.owned, op, ext, nil, m.Lifetime+elements.OwnedLonger)
	if m.hairpin != nil {
		p = join(p,
			put(m.owners, op, ext, original(expr.CtKeySRCIP, secondWord), m.Lifetime+elements.OwnedLonger),
			put(m.ownerPorts, op, ext, original(expr.CtKeyPROTOSRC, secondWord), m.Lifetime+elements.OwnedLonger))
	}
	return p
}

// remember learns mappings, and what is taken, from flows that are translated
// already and not answered yet.
func (m *mapper) remember() {
	inbound := m.regular("inbound")
	m.rule(inbound, "its answers take the port", m.takeInbound())

	c := m.filter("remember", nftables.ChainHookPostrouting, rememberPriority)
	m.rule(c, "answered flows end here", join(ctState, isNot(ne32(expr.CtStateBitNEW)), accept))
	for _, u := range m.uplinks {
		m.rule(c, "a source from outside may be spoofed", join(
			isUDP, u.leaves(), m.outside(iifname, false), inZone, m.exempt.hasNot(destination(0)), goTo(u.ours)))
	}
	m.rule(c, "its source may be spoofed", join(isUDP, m.outside(iifname, true), inZone, goTo(inbound)))
	if m.hairpin != nil {
		m.rememberHairpins(c)
	}
	m.rule(c, "", join(isUDP, m.outside(oifname, true), inZone, goTo(m.foreign)))
}

// remembers returns the chain that does so for flows from inside that leave by the link.
func (u *uplink) remembers() *nftables.Chain {
	moved := u.regular("moved_flow")
	u.rule(moved, "it was left to the rules of others", join(isUDP, has(u.taken, packetTuple), outsideSourcePort, goTo(u.foreign)))
	u.rule(moved, "", join(isUDP, setSource(find(u.moved, flowInside))))
	u.rule(moved, "only its own flows refresh a mapping", join(isUDP,
		u.owner(opUpdate, packetSourceEndpoint),
		put(u.moved, opUpdate, flowInside, source(secondWord), u.Lifetime),
		put(u.ports, opUpdate, flowInside, transport(0, secondWord), u.Lifetime)))
	u.rule(moved, "", outsideSource)
	u.rule(moved, "", join(isUDP, outsideSourcePort, accept))

	c := u.regular("ours")
	// A flow that was left to the rules of others may get outside the very port from which
	// its host has a mapping. It is taken for a flow of that until the next reconcile.
	u.rule(c, "only its own flows refresh a mapping", join(isUDP,
		setSource(find(u.kept, keptInside)),
		put(u.kept, opUpdate, keptInside, source(secondWord), u.Lifetime),
		u.owner(opUpdate, packetSourceEndpoint), outsideSource, accept))
	u.rule(c, "its mapping has another port", join(isUDP, setSourcePort(find(u.ports, flowInside)), goTo(moved)))
	u.rule(c, "from a host without mappings", join(u.subnets.hasNot(original(expr.CtKeySRCIP, 0)), goTo(u.foreign)))
	u.rule(c, "it was left to the rules of others", join(isUDP, setSource(find(u.kept, flowInside)), outsideSource, goTo(u.foreign)))
	u.rule(c, "nobody translated it", join(ctStatus, masked(ctSrcNAT), is(ne32(0)), goTo(u.foreign)))
	u.rule(c, "conntrack takes port 0 for none", join(isUDP, original(expr.CtKeyPROTOSRC, 0), is(be16(0)), goTo(u.foreign)))
	u.rule(c, "an older flow than its address", join(has(u.gone, reply(expr.CtKeyDSTIP, 0)), accept))
	u.rule(c, "", join(hasNot(u.translated, reply(expr.CtKeyDSTIP, 0)), jump(u.learnAddress.Name)))
	u.rule(c, "which one does the host get?", join(
		has(u.several, nobody(reply(expr.CtKeyDSTIP, 0))),
		put(u.addresses, opAdd, original(expr.CtKeySRCIP, 0), reply(expr.CtKeyDSTIP, secondWord), elements.AddressTimeout)))
	u.rule(c, "the gateway has the port", join(isUDP, has(u.served, reply(expr.CtKeyPROTODST, 0)), goTo(u.foreign)))
	u.rule(c, "", goTo(u.own))
	return c
}

// learnsAddress returns the chain that learns an outside address of the link.
func (u *uplink) learnsAddress() *nftables.Chain {
	c, address := u.regular("learn_address"), reply(expr.CtKeyDSTIP, 0)
	u.rule(c, "a second one", join(has(u.translated, nobody(address)), put(u.several, opAdd, nobody(address), nil, 0)))
	u.rule(c, "", put(u.addresses, opAdd, nobody(address), reply(expr.CtKeyDSTIP, secondWord), 0))
	u.rule(c, "", put(u.translated, opAdd, nobody(address), nil, 0))
	u.rule(c, "", put(u.translated, opAdd, address, nil, 0))
	return c
}

// owns returns the chain that makes the flow the owner of its outside endpoint, unless
// another one is.
func (u *uplink) owns() *nftables.Chain {
	c, moved := u.regular("owner"), u.regular("other_port")
	own := join(isUDP, u.owner(opAdd, flowOutside))
	// A flow that kept its port owns the endpoint with that port now.
	ownPort := join(reply(expr.CtKeyDSTIP, 0), original(expr.CtKeyPROTOSRC, 1))
	u.rule(c, "another one owns it", join(isUDP, has(u.owned, flowOutside), goTo(u.foreign)))
	u.rule(c, "another one owns its own port", join(isUDP, has(u.owned, ownPort), goTo(moved)))
	u.rule(c, "", own)
	u.rule(c, "it kept its port", join(isUDP, has(u.owned, ownPort),
		put(u.kept, opAdd, flowInside, reply(expr.CtKeyDSTIP, secondWord), u.Lifetime), accept))
	u.rule(c, "", goTo(moved))

	u.rule(moved, "", own)
	u.rule(moved, "there is no room", join(isUDP, hasNot(u.owned, flowOutside), goTo(u.foreign)))
	u.rule(moved, "it has another port", join(isUDP,
		put(u.moved, opAdd, flowInside, reply(expr.CtKeyDSTIP, secondWord), u.Lifetime),
		put(u.ports, opAdd, flowInside, reply(expr.CtKeyPROTODST, secondWord), u.Lifetime)))
	return c
}

// takenFor is how long what is taken is remembered after its last packet.
func (m *mapper) takenFor() time.Duration { return max(takenTimeout, m.TakenFor) }

// takeInbound remembers a flow from outside by its first packet, as it came.
func (m *mapper) takeInbound() piece {
	return join(isUDP, put(m.taken, opUpdate, inboundTuple, nil, m.takenFor()))
}

// arrivals remembers flows to the gateway itself. Those of a port that it serves
// are in nobody's way.
func (m *mapper) arrivals() {
	c := m.filter("arrivals", nftables.ChainHookInput, arrivalsPriority)
	m.rule(c, "", join(ctState, isNot(ne32(expr.CtStateBitNEW)), accept))
	m.rule(c, "", join(notUDP, accept))
	m.rule(c, "", join(isUDP, has(m.served, original(expr.CtKeyPROTODST, 0)), accept))
	m.rule(c, "its answers take the port", join(m.outside(iifname, true), m.takeInbound(), accept))
	if m.hairpin != nil {
		m.rule(c, "the same, of a host that there is hairpinning for", join(m.hairpin.has(source(0)), m.takeInbound()))
	}
}
