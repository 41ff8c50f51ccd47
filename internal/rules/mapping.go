package rules

import (
	"slices"
	"time"

	"github.com/google/nftables"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// Names of sets and counters.
const (
	mappedSet      = "mapped_subnets"
	exemptSet      = "exempt"
	servedSet      = "served"
	hairpinSet     = "hairpin_subnets"
	movedCounter   = "moved"         // newcomers that got a port of the pool
	usedUpCounter  = "pool_used_up"  // those that found no free port
	leftCounter    = "left_to_rules" // flows whose mapping something else uses towards that remote endpoint
	sharedCounter  = "port_shared"   // flows to which the user's rules gave the endpoint of another host's mapping
	hairpinCounter = "hairpinned"    // flows from inside to an outside endpoint
	sourceChain    = "map_source"
)

// MapPriority is the priority of the chain that translates packets that have a mapping. It
// comes before all of the user's source NAT rules: a flow that gets its mapping there is
// done, any other flow continues to them. nft accepts no lower number. All NAT chains run
// inside one hook of the kernel, so the number only orders them.
const MapPriority = -199

const (
	// After the user's own forwards, whatever their priority: they come first and win.
	hairpinPriority = 1<<31 - 1
	// After srcnat and learn, when the outside endpoint is known.
	rememberPriority = 291
	// After guard: packets that guard drops occupy no outside endpoint.
	arrivalsPriority = 210
)

const (
	// takenTimeout is the minimum of MappingConfig.TakenFor.
	takenTimeout = time.Minute
	// copyTimeout is the timeout of elements for which the rule gives none: nft 1.0.2 drops
	// the timeouts of map elements when it loads its own listing.
	copyTimeout = time.Hour
	// takenSize limits how many flows are remembered, addressesSize how many hosts, and
	// linkAddressesSize how many outside addresses of a link.
	takenSize         = 1 << 18
	addressesSize     = 1 << 16
	linkAddressesSize = 1 << 12
)

// Keys of the sets.
var (
	addressKey  = []nftables.SetDatatype{nftables.TypeIPAddr}
	endpointKey = []nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeInetService}
)

// mapping keeps one outside endpoint for each inside endpoint and outside link, and gives
// that endpoint to no other inside endpoint (RFC 4787, REQ-1 to REQ-4). Each outside link
// has its own sets, which keep their elements while the link is away:
//
//   - kept has the outside address of each inside endpoint that kept its port. For an
//     inside endpoint with another outside port, moved has the outside address and ports
//     the port. They learn from the first flow, as the user's own rules or the pool
//     translated it. Only flows of the inside endpoint itself refresh them.
//   - addresses has, under the key 0.0.0.0, the outside address that the user's rules gave
//     to the first host that was seen. translated has all addresses that they gave, and
//     0.0.0.0 once there is one; several has 0.0.0.0 once there is a second one. From then
//     on, or from the start for links in Differ, addresses has the outside address of each
//     host.
//
// And for all links:
//
//   - owned has the outside endpoints of all mappings. With hairpinning, owners and
//     owner_ports have the inside endpoint of each.
//   - taken has the remote endpoints towards which an outside port is in use without a
//     mapping: by the gateway itself, by a packet that came before the answer, or by a host
//     whose subnet is not enabled.
//   - gone has the outside addresses that were lost a moment ago.
//   - masqueraded_addresses has those that are lost if no link has them (endsLost).
//   - former has the outside addresses that the user's rules no longer give to hosts with
//     flows that still have them.
//
// An answered flow does not refresh its mapping, because its packets do not reach these
// chains. A mapping must not end before its last flow, or another host gets its port: the
// daemon must refresh the mappings of living flows in time, and the elements of taken for
// living flows without a mapping. Two simultaneous first packets on two CPUs may become
// owners of the same endpoint: the daemon ends one of the mappings.
func (l *layout) mapping(d Desired) {
	c := d.Mapping
	l.set(elements.GatewaySet, nftables.TypeIPAddr).free = true
	l.counters = append(l.counters, movedCounter, usedUpCounter, leftCounter, sharedCounter)
	m := &mapper{
		layout: l, MappingConfig: c, arms: d.arms(),
		owned:   l.learnedSet(elements.OwnedSet, endpointKey, c.Size),
		taken:   l.learnedSet(elements.TakenSet, []nftables.SetDatatype{nftables.TypeInetService, nftables.TypeIPAddr, nftables.TypeInetService}, takenSize),
		gone:    l.learnedSet(elements.GoneSet, addressKey, linkAddressesSize),
		former:  l.learnedSet(elements.FormerSet, []nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeIPAddr}, addressesSize),
		served:  l.set(servedSet, nftables.TypeInetService),
		subnets: l.prefixes(mappedSet, c.Subnets),
	}
	m.served.setPorts(c.Served)
	m.makePools()
	m.lostSet(d.noFib)
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
	m.foreign = m.regular("foreign")
	m.rule(m.foreign, "a flow without a mapping takes the port", isUDP, updateIn(m.taken, elem{key: flowTuple, timeout: m.takenFor()}))
	m.unmoved = m.regular("unmoved")
	m.rule(m.unmoved, "", isUDP, setInsidePort)
	for _, name := range c.links(l.links) {
		u := m.uplink(name)
		if slices.Contains(l.links, name) { // a former outside link only keeps its sets
			m.uplinks = append(m.uplinks, u)
			u.makeChains()
		}
	}
	m.apply()
	m.remember()
	m.arrivals()
}

// links returns the names of the links that have sets: the current and the former outside
// links.
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

// addressMap makes a map in which elements without a timeout never expire.
func (l *layout) addressMap(name string) *set {
	s := l.learnedMap(name, addressKey, nftables.TypeIPAddr, addressesSize)
	s.Timeout = 0
	return s
}

// A mapper has the sets that the rules of mapping use. Each rule loads its registers
// itself: the kernel refuses rules that rely on another rule's registers.
type mapper struct {
	*layout
	*MappingConfig

	owned, taken, gone, former, served *set
	owners, ownerPorts                 *set      // nil without hairpinning
	subnets, exempt, hairpin           *prefixes // the last two may be nil
	arms                               []string  // outside links by which hosts of subnets also come
	pools                              []*hostPool
	foreign, unmoved                   *nftables.Chain
	uplinks                            []*uplink
	masqueraded                        *set // nil if the kernel has no route lookup
}

// An uplink makes the rules and sets that exist once for each outside link.
type uplink struct {
	*mapper
	name                                               string
	kept, moved, ports, addresses, translated, several *set
	chosen                                             *chosen
	differ                                             bool // hosts may have different addresses there
	mapped, ownPort, given, lostAddress                *nftables.Chain
	learnAddress, own, ours, hairpinned                *nftables.Chain
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
		chosen:     m.chosenBy(name),
		differ:     slices.Contains(m.Differ, name),
	}
}

// leavesBy matches if the packet leaves by the link.
func (u *uplink) leavesBy() exprs { return oifname.is(nfnl.LinkKey(u.name)) }

// regular adds a chain of this link without a hook, for goto and jump. No name may be that
// of another chain followed by an underscore and more.
func (u *uplink) regular(name string) *nftables.Chain {
	return u.mapper.regular(name + "_" + elements.Identifier(u.name))
}

// makeChains makes the link's chains for goto and jump.
func (u *uplink) makeChains() {
	u.mapped = u.throughMapping()
	u.learnAddress = u.learnsAddress()
	u.own = u.owns()
	u.ours = u.remembers()
	if u.hairpin != nil {
		u.hairpinned = u.regular("hairpinned")
	}
}

// Keys of the sets: endpoints of the packet and of a flow.
var (
	packetSource = concat(ipSaddr, udpSport)
	packetTarget = concat(ipDaddr, udpDport)
	flowInside   = concat(ctOriginalIPSaddr, ctOriginalProtoSrc)
	flowOutside  = concat(ctReplyIPDaddr, ctReplyProtoDst)
	flowTarget   = concat(ctOriginalIPDaddr, ctOriginalProtoDst)
	// flowInside of a flow that kept its port, taken from its packet: a field of the packet
	// is cheaper to load than one of conntrack.
	keptInside = concat(ctOriginalIPSaddr, udpSport)
	// The key of taken: for a packet that leaves, for a flow, and for a packet from outside
	// before NAT.
	packetTuple  = concat(udpSport, ipDaddr, udpDport)
	flowTuple    = concat(ctReplyProtoDst, ctReplyIPSaddr, ctReplyProtoSrc)
	inboundTuple = concat(ctOriginalProtoDst, ctOriginalIPSaddr, ctOriginalProtoSrc)
)

// The first two restore the source that the packet had when it arrived. The other two
// restore the source that it has after NAT.
var (
	setInsideSource  = setIPSaddr(ctOriginalIPSaddr)
	setInsidePort    = setUDPSport(ctOriginalProtoSrc)
	setOutsideSource = setIPSaddr(ctReplyIPDaddr)
	setOutsidePort   = setUDPSport(ctReplyProtoDst)
)

// nobody is the constant key 0.0.0.0, computed from an address.
func nobody(addr operand) operand { return addr.and(be32(0)) }

// apply translates packets that have a mapping. It moves a newcomer to the pool if another
// host or the gateway has its port. It leaves all other packets to the user's rules. A NAT
// chain sees the first packet of a flow only.
func (m *mapper) apply() {
	c := m.chain(sourceChain, nftables.ChainTypeNAT, nftables.ChainHookPostrouting, MapPriority)
	if m.hairpin != nil {
		m.hairpinSources(c)
	}
	var plain exprs // excludes packets that IPsec takes, which do not leave by the link
	if !m.noIPsec {
		plain = rtIPsec.missing(1)
	}
	for _, u := range m.uplinks {
		m.rule(c, "a source from outside may be spoofed",
			isUDP, u.leavesBy(), m.outside(iifname, false), m.inZone0, m.exempt.hasNot(ipDaddr), plain, goTo(u.mapped))
	}
	m.applyByArm(c, plain)
}

// throughMapping returns the chain for packets that leave by the link.
func (u *uplink) throughMapping() *nftables.Chain {
	c, newcomers := u.regular("mapped"), u.regular("unmapped")
	u.rule(c, "from a host without mappings", u.subnets.hasNot(ipSaddr), accept)
	u.lostAddress = u.regular("lost_address")
	u.ownPort, u.given = u.givesOwnPort(), u.givesMoved()
	u.known(c)
	u.rule(c, "", goTo(newcomers))
	u.endsLost(newcomers)
	if len(u.pools) > 0 && u.chosen.leaves(u, newcomers, ipSaddr, accept) {
		return c
	}
	for _, p := range u.pools {
		newcomer, pool := u.regular("newcomer"+p.suffix), u.movedToPool(p)
		u.withAddress(newcomers, p.hosts(ipSaddr), newcomer)

		u.rule(newcomer, "another one has the port", isUDP, packetSource.in(u.owned), goTo(pool))
		u.rule(newcomer, "the gateway has the port", isUDP, udpSport.in(u.served), goTo(pool))
		u.rule(newcomer, "", setInsideSource)
	}
	return c
}

// withAddress adds rules for packets of hosts. They set the source to the outside address
// that the user's rules would give, if that is known, and go on to next. While there is
// only one outside address, a host that was not seen yet is assumed to get that one, unless
// the rules may give it another.
func (u *uplink) withAddress(c *nftables.Chain, hosts exprs, next *nftables.Chain) {
	u.haveOne(c, ipSaddr, hosts, setIPSaddr(u.addresses.of(nobody(ipSaddr))), goTo(next))
	u.rule(c, "its address is known", hosts, setIPSaddr(u.addresses.of(ipSaddr)), goTo(next))
}

// movedToPool returns the chain that gives a newcomer a free port of the pool with the
// parity of its own port (REQ-4). An inside endpoint tries the same ports each time: two
// simultaneous first packets agree, and so does the next flow after the mapping has ended.
// When all tries fail, the packet is left to the user's rules.
func (u *uplink) movedToPool(p *hostPool) *nftables.Chain {
	c, made := u.regular("pool"+p.suffix), u.regular("made"+p.suffix)
	u.rule(c, "", setInsideSource)
	u.rule(c, "the daemon has been silent for long", u.silent(), accept)
	// The first port to try depends on all bits of the source port and some bits of the
	// address, as a linear hash.
	for i, x := range mixers {
		bit := be32(1 << i)
		u.rule(c, "", isUDP, ipSaddr.and(bit).is(bit), setUDPSport(udpSport.bitwise(be16(0xffff), be16(x))))
	}
	tries := u.regular("tries" + p.suffix)
	u.withAddress(c, nil, tries)
	u.rule(c, "", goTo(u.unmoved))

	u.rule(tries, "an address that is gone", ipSaddr.in(u.gone), setInsideSource, goTo(u.unmoved))
	if u.asksFib() {
		u.rule(tries, "the gateway lost the address", u.lost(notOfGateway, ipSaddr), setInsideSource, goTo(u.unmoved))
	}
	for _, t := range poolTries(p.ports) {
		// The low bits come from the hash, or from the port that was tried before.
		port := udpSport.bitwise(be16(t.mask), be16(t.xor))
		var fits exprs // a single port fits only sources of its parity
		if t.mask == 0 {
			port, fits = constant(be16(t.xor)), udpSport.and(be16(1)).is(be16(t.xor&1))
		}
		u.rule(tries, "", isUDP, fits, setUDPSport(port))
		u.rule(tries, "nobody has it, nor is it taken towards this remote endpoint",
			isUDP, fits, packetSource.notIn(u.owned), udpSport.notIn(u.served), packetTuple.notIn(u.taken),
			u.owner(addTo, packetSource), u.movedTo(updateIn, ipSaddr, udpSport), counter(movedCounter), goTo(made))
	}
	u.rule(tries, "", setInsideSource, counter(usedUpCounter), goTo(u.unmoved))
	u.rule(made, "", setInsideSource)
	u.giveMoved(made)
	return c
}

// movedTo gives the inside endpoint of the flow a mapping with another port. put is addTo
// or updateIn.
func (u *uplink) movedTo(put func(*set, elem) exprs, addr, port operand) exprs {
	return join(
		put(u.moved, elem{key: flowInside, timeout: u.Lifetime, data: &addr}),
		put(u.ports, elem{key: flowInside, timeout: u.Lifetime, data: &port}))
}

// owner makes the inside endpoint of the flow the owner of an outside endpoint. put is
// addTo or updateIn.
func (m *mapper) owner(put func(*set, elem) exprs, ext operand) exprs {
	const longer = elements.OwnedLonger
	p := put(m.owned, elem{key: ext, timeout: m.Lifetime + longer})
	if m.hairpin != nil {
		p = join(p,
			put(m.owners, elem{key: ext, timeout: m.Lifetime + longer, data: &ctOriginalIPSaddr}),
			put(m.ownerPorts, elem{key: ext, timeout: m.Lifetime + longer, data: &ctOriginalProtoSrc}))
	}
	return p
}

// remember learns mappings and elements of taken from flows that are already translated and
// not yet answered.
func (m *mapper) remember() {
	inbound := m.regular("inbound")
	m.rule(inbound, "its answers take the port", m.takeInbound())

	c := m.filter("remember", nftables.ChainHookPostrouting, rememberPriority)
	m.rule(c, "answered flows end here", notNew, accept)
	for _, u := range m.uplinks {
		m.rule(c, "a source from outside may be spoofed",
			isUDP, u.leavesBy(), m.outside(iifname, false), m.inZone0, m.exempt.hasNot(ipDaddr), goTo(u.ours))
	}
	m.rememberByArm(c, inbound)
	m.rule(c, "its source may be spoofed", isUDP, m.outside(iifname, true), zoneIs0, goTo(inbound))
	if m.hairpin != nil {
		m.rememberHairpins(c)
	}
	m.rule(c, "", isUDP, m.outside(oifname, true), m.inZone0, goTo(m.foreign))
}

// remembers returns the chain that learns from flows from inside that leave by the link.
func (u *uplink) remembers() *nftables.Chain {
	moved := u.regular("moved_flow")
	u.rule(moved, "it was left to the rules of others", isUDP, packetTuple.in(u.taken), setOutsidePort, goTo(u.foreign))
	u.rule(moved, "", isUDP, setIPSaddr(u.moved.of(flowInside)))
	u.rule(moved, "only its own flows refresh a mapping",
		isUDP, u.owner(updateIn, packetSource), u.movedTo(updateIn, ipSaddr, udpSport))
	u.rule(moved, "", setOutsideSource)
	u.rule(moved, "", isUDP, setOutsidePort, accept)

	c := u.regular("ours")
	// A flow that was left to other rules may get the same outside port that its host's
	// mapping comes from. Until the next reconcile it counts as a flow of that mapping.
	u.rule(c, "only its own flows refresh a mapping", isUDP, setIPSaddr(u.kept.of(keptInside)),
		updateIn(u.kept, elem{key: keptInside, timeout: u.Lifetime, data: &ipSaddr}), u.owner(updateIn, packetSource), setOutsideSource, accept)
	u.rule(c, "its mapping has another port", isUDP, setUDPSport(u.ports.of(flowInside)), goTo(moved))
	u.rule(c, "from a host without mappings", u.subnets.hasNot(ctOriginalIPSaddr), goTo(u.foreign))
	u.rule(c, "it was left to the rules of others", isUDP, setIPSaddr(u.kept.of(flowInside)), setOutsideSource, goTo(u.foreign))
	u.rule(c, "nobody translated it", lacksStatus(ctSrcNAT), goTo(u.foreign))
	u.rule(c, "conntrack takes port 0 for none", isUDP, ctOriginalProtoSrc.is(be16(0)), goTo(u.foreign))
	if u.asksFib() {
		u.rule(c, "an older flow with the address of another link", hasStatus(ctConfirmed), ofGateway, notOfLink, accept)
		u.rule(c, "an older flow than its address", hasStatus(ctConfirmed), u.lost(notOfGateway, ipSaddr), accept)
	}
	u.rule(c, "an older flow than its address", ctReplyIPDaddr.in(u.gone), accept)
	u.rule(c, "the rules give the host another address now", concat(ctOriginalIPSaddr, ctReplyIPDaddr).in(u.former), goTo(u.foreign))
	u.rule(c, "", ctReplyIPDaddr.notIn(u.translated), jump(u.learnAddress))
	var several exprs
	if !u.differ {
		several = nobody(ctReplyIPDaddr).in(u.several)
	}
	u.rule(c, "which one does the host get?", several,
		addTo(u.addresses, elem{key: ctOriginalIPSaddr, timeout: elements.AddressTimeout, data: &ctReplyIPDaddr}))
	u.rule(c, "the gateway has the port", isUDP, ctReplyProtoDst.in(u.served), goTo(u.foreign))
	u.rule(c, "", goTo(u.own))
	return c
}

// learnsAddress returns the chain that learns an outside address of the link.
func (u *uplink) learnsAddress() *nftables.Chain {
	c, first := u.regular("learn_address"), nobody(ctReplyIPDaddr)
	u.rule(c, "a second one", first.in(u.translated), addTo(u.several, elem{key: first}))
	u.rule(c, "", addTo(u.addresses, elem{key: first, data: &ctReplyIPDaddr}))
	u.rule(c, "", addTo(u.translated, elem{key: first}))
	u.rule(c, "", addTo(u.translated, elem{key: ctReplyIPDaddr}))
	return c
}

// owns returns the chain that makes the flow the owner of its outside endpoint, unless that
// has an owner already.
func (u *uplink) owns() *nftables.Chain {
	c, moved := u.regular("owner"), u.regular("other_port")
	own := u.owner(addTo, flowOutside)
	u.rule(c, "the daemon has been silent for long", u.silent(), goTo(u.foreign))
	// A flow that kept its port now owns the endpoint with that port.
	ownPort := concat(ctReplyIPDaddr, ctOriginalProtoSrc)
	u.rule(c, "another one owns it", isUDP, flowOutside.in(u.owned), flowTuple.notIn(u.taken), counter(sharedCounter))
	u.rule(c, "", isUDP, flowOutside.in(u.owned), goTo(u.foreign))
	u.rule(c, "another one owns its own port", isUDP, ownPort.in(u.owned), goTo(moved))
	u.rule(c, "", isUDP, own)
	u.rule(c, "it kept its port", isUDP, ownPort.in(u.owned),
		addTo(u.kept, elem{key: flowInside, timeout: u.Lifetime, data: &ctReplyIPDaddr}), accept)
	u.rule(c, "", goTo(moved))

	u.rule(moved, "", isUDP, own)
	u.rule(moved, "there is no room", isUDP, flowOutside.notIn(u.owned), goTo(u.foreign))
	u.rule(moved, "it has another port", isUDP, u.movedTo(addTo, ctReplyIPDaddr, ctReplyProtoDst))
	return c
}

// takenFor is how long an element of taken outlives the last packet of its flow.
func (m *mapper) takenFor() time.Duration { return max(takenTimeout, m.TakenFor) }

// takeInbound remembers a flow from outside by its first packet before NAT.
func (m *mapper) takeInbound() exprs {
	return join(isUDP, updateIn(m.taken, elem{key: inboundTuple, timeout: m.takenFor()}))
}

// arrivals remembers flows to the gateway itself, except those to ports that it serves: no
// mapping uses these ports.
func (m *mapper) arrivals() {
	c := m.filter("arrivals", nftables.ChainHookInput, arrivalsPriority)
	m.rule(c, "", notNew, accept)
	m.rule(c, "", notUDP, accept)
	m.rule(c, "", isUDP, ctOriginalProtoDst.in(m.served), accept)
	m.rule(c, "its answers take the port", m.outside(iifname, true), m.takeInbound(), accept)
	if m.hairpin != nil {
		m.rule(c, "the same, of a host that there is hairpinning for", m.hairpin.has(ipSaddr), m.takeInbound())
	}
}
