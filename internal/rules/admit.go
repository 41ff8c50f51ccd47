package rules

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// permissionKey is peer . outside address . outside port, in the order in which an incoming
// packet has them.
var permissionKey = []nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeIPAddr, nftables.TypeInetService}

func (l *layout) permissions(c *MapConfig) {
	for _, values := range []struct {
		of   string
		typ  nftables.SetDatatype
		size int
	}{
		{elements.PermissionMap, nftables.TypeIPAddr, c.Size}, {elements.PortMap, nftables.TypeInetService, c.Size}, {elements.MarksMap, nftables.TypeMark, marksSize},
	} {
		m := l.set(values.of, permissionKey...)
		m.IsMap, m.DataType = true, values.typ
		m.HasTimeout, m.Timeout, m.Dynamic, m.free, m.Size = true, savedTimeout, true, true, uint32(values.size)
	}
	l.noPeers = l.set(noPeersSet, nftables.TypeIPAddr)
	l.noPeers.Interval, l.noPeers.elements = true, intervals(slices.Concat(notUnicast, c.Subnets, c.ExcludePeers))
}

// A kind of permissions is for one peer, for the peers of groups with that many host bits,
// or for everybody.
type kind struct {
	hostBits uint8
	groups   *set // the first address of each group; nil for the other kinds
	open     *set // the inside subnets whose permissions are for everybody
}

// kinds makes the sets that the kinds need and returns the kinds, those for the fewest
// peers first.
func (l *layout) kinds(c *MapConfig) []kind {
	free := map[uint8][]nftables.SetElement{}
	for _, g := range c.PeerGroups {
		if hostBits := 32 - g.Bits(); g.Addr().Is4() && hostBits > 0 {
			free[uint8(hostBits)] = append(free[uint8(hostBits)], nftables.SetElement{Key: g.Addr().AsSlice()})
		}
	}
	all := []kind{{}}
	for _, hostBits := range slices.Sorted(maps.Keys(free)) {
		s := l.set(groupsName(32-int(hostBits)), nftables.TypeIPAddr)
		s.elements = free[hostBits]
		all = append(all, kind{hostBits: hostBits, groups: s})
	}
	if open := intervals(c.OpenSubnets); len(open) > 0 {
		s := l.set(openSet, nftables.TypeIPAddr)
		s.Interval, s.elements = true, open
		all = append(all, kind{hostBits: 32, open: s})
	}
	return all
}

func groupsName(bits int) string { return fmt.Sprintf("%s_%d", groupsSet, bits) }

// peers is the peer's address without its host bits.
func (k kind) peers(addr operand) operand {
	if k.hostBits == 0 {
		return addr
	}
	return addr.and(net.CIDRMask(32-int(k.hostBits), 32))
}

// packetKey is the map's key of an incoming packet, flowKey that of an outgoing flow. Each
// rule tests for UDP, though only UDP gets there: nft needs the test to know what a port
// is. Our rules load the key anew for each map, as nft does; otherwise nft would turn its
// own listing into different rules.
func (k kind) packetKey() operand { return concat(k.peers(ipSaddr), ipDaddr, udpDport) }

func (k kind) flowKey() operand {
	return concat(k.peers(ctReplyIPSaddr), ctReplyIPDaddr, ctReplyProtoDst)
}

// hasPacket matches a packet of this kind, hasFlow a flow of this kind.
func (k kind) hasPacket() exprs { return k.hasPeer(ipSaddr) }

func (k kind) hasFlow() exprs {
	if k.open != nil {
		return ctOriginalIPSaddr.in(k.open)
	}
	return k.hasPeer(ctReplyIPSaddr)
}

func (k kind) hasPeer(addr operand) exprs {
	if k.groups == nil {
		return nil
	}
	return k.peers(addr).in(k.groups)
}

// Three keys of a flow: from its packets before NAT, from its original direction, and from
// its reply direction. No two flows share one.
var (
	packetFlow   = concat(ipSaddr, udpSport, ipDaddr, udpDport)
	originalFlow = concat(ctOriginalIPSaddr, ctOriginalProtoSrc, ctOriginalIPDaddr, ctOriginalProtoDst)
	replyFlow    = concat(ctReplyIPSaddr, ctReplyProtoSrc, ctReplyIPDaddr, ctReplyProtoDst)
)

// admit needs no conntrack state: a NAT chain sees the first packet only. Where zones exist
// in the original direction alone, the zone of that packet does not matter.
//
// Each child takes a token from the bucket of its permission, and is counted among the live
// children of its peer. To count visits each of them; the bucket limits how many packets of a
// flood do that. A packet beyond either limit continues as unsolicited, normally to the guard
// chain.
func (l *layout) admit(d Desired, kinds []kind) {
	l.counters = append(l.counters, admittedCounter)
	admitted := l.regular("admitted")
	admit := l.chain("admit", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, admitPriority)
	for _, name := range slices.Sorted(slices.Values(d.Partial)) {
		l.rule(admit, "the peer is not behind it", isUDP, notBehind(name, !d.noFib), accept)
	}
	if l.zoned == nil {
		l.rule(admit, "permissions are of the default zone", isUDP, l.outside(iifname, true), zoneIs0, goTo(admitted))
	} else {
		l.rule(admit, "", isUDP, l.outside(iifname, true), goTo(admitted))
	}
	if !d.noFib {
		l.fakedPeers(admit, kinds)
	}
	flows := l.set(admittedSet, flowKey...)
	flows.HasTimeout, flows.Dynamic, flows.free = true, true, true
	flows.Timeout, flows.Size = admittedTimeout, admittedSize
	label := setLabel
	if d.Map.noLabels {
		label = nil
	}
	// With uplink marks each permission has a mark. Do not overwrite a mark that the user's
	// rules gave the child.
	var unmarked exprs
	if d.UplinkMarks != nil {
		unmarked = ctMark.is(host32(0))
	}
	addrs, ports, marks := l.named(elements.PermissionMap), l.named(elements.PortMap), l.named(elements.MarksMap)
	// nft lists the lookups last, in "dnat to". Do them first, because the rule must not match
	// without them.
	const addr, port = dataWord, dataWord + 1
	find := func(k kind) exprs {
		key := k.packetKey()
		return join(isUDP, k.hasPacket(), key.load(0), ports.find(0, port), key.load(0), addrs.find(0, addr))
	}
	lead := join(label, addTo(flows, elem{key: packetFlow}))
	mark := func(c *nftables.Chain, k kind) {
		l.rule(c, "a mark for policy routing", isUDP, unmarked, k.hasPacket(), setCt(expr.CtKeyMARK, marks.of(k.packetKey())))
	}
	if len(d.Helpers) > 0 {
		related := l.regular("related")
		for _, helper := range d.Helpers {
			l.rule(admitted, "an expectation lets it in; the chain child judges it", hasStatus(ctExpected), ctHelper.is(helperName(helper)), jump(related))
		}
		for _, k := range kinds {
			if k.hostBits <= cone.ExpandBits {
				mark(related, k)
				l.rule(related, "a peer may send from any port", find(k), lead, nat(expr.NATTypeDestNAT, addr, port))
			}
		}
	}
	l.rule(admitted, "the gateway itself serves it", hasSocket, accept)
	if d.Map.noLabels {
		l.divert(admitted, d.Diverted, ipFamilies[:1], false, accept)
	}
	if l.zoned != nil {
		l.counters = append(l.counters, zonedCounter)
		l.rule(admitted, "no expectation admitted it", zoneIsNot0, ipDaddr.in(l.zoned), counter(zonedCounter))
	}
	for _, k := range kinds {
		if k.open != nil {
			l.rule(admitted, "", ipSaddr.in(l.noPeers), accept)
		}
		mark(admitted, k)
		l.rule(admitted, "a peer may send from any port", find(k), l.takeToken(k, d.Map), l.countChild(d.Map),
			lead, counter(admittedCounter), nat(expr.NATTypeDestNAT, addr, port))
	}
}

// fakedPeers drops packets that claim to be from a permitted peer, but come by another link than
// the outside ones and than the one that leads to that peer. Otherwise they would become flows
// that end on the gateway, and take the peer's own packets from the same port. Packets that the
// user's rules forward do not get here.
func (l *layout) fakedPeers(admit *nftables.Chain, kinds []kind) {
	l.counters = append(l.counters, spoofedCounter)
	faked := l.regular("faked_peer")
	l.rule(admit, "the source may be faked", isUDP, l.outside(iifname, false), l.inZone0, noWayBack, goTo(faked))
	l.rule(faked, "the gateway itself serves it", hasSocket, accept)
	for _, k := range kinds {
		// nft cannot list a map that is merely looked up, so the value goes into the packet,
		// which is dropped.
		l.rule(faked, "it would keep the peer from the inside host", isUDP, k.hasPacket(),
			setUDPSport(l.named(elements.PortMap).of(k.packetKey())), counter(spoofedCounter), drop)
	}
}

// keepSource lets the inside host see the peer's own address, as with an expectation, even
// where the user's rules translate the source of incoming packets. Flows that the user's
// own rules forward stay as they are: they never reach the chain admitted, and have no label if
// they follow a child with the same tuple.
func (l *layout) keepSource(c *MapConfig) {
	ours := hasLabel
	if c.noLabels {
		ours = nil
	}
	chain := l.chain("keep_source", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, sourcePriority)
	l.rule(chain, "the inside host sees the peer itself", l.outside(iifname, true), hasStatus(ctDstNAT), ours, isUDP,
		originalFlow.in(l.named(admittedSet)), snatToAddr(ipSaddr))
}

// learn lets the kernel add the permission that a flow gets, by its first packet.
func (l *layout) learn(d Desired, kinds []kind) {
	c := d.Map
	if !c.Learn {
		return
	}
	learn := l.filter("learn", nftables.ChainHookPostrouting, learnPriority)
	l.rule(learn, "answered flows end here", notNew, accept)
	if !c.noNumgen {
		l.rule(learn, "of later packets without an answer, most end here", hasStatus(ctConfirmed), numgenRandom(sampled).isNot(host32(0)), accept)
	}
	if test, any := l.surelyOutside(d); any {
		l.rule(learn, "a source may be spoofed", test, accept)
	}
	l.rule(learn, "no UDP, or the daemon has been silent for long", l.silent(), accept)
	l.counters = append(l.counters, learnedCounter, limitedCounter)
	subnets := l.named(subnetsSet)
	if subnets == nil {
		subnets = l.set(subnetsSet, nftables.TypeIPAddr)
		subnets.Interval, subnets.elements = true, intervals(c.Subnets)
	}
	peerPorts, ports := l.set(excludedPeerSet, nftables.TypeInetService), l.set(excludedPortsSet, nftables.TypeInetService)
	peerPorts.setPorts(c.ExcludePeerPorts)
	ports.setPorts(c.ExcludePorts)
	learners := l.set(learnersSet, nftables.TypeIPAddr)
	learners.HasTimeout, learners.Timeout, learners.Dynamic, learners.free, learners.Size = true, learnerTimeout, true, true, uint32(c.Size)
	denied := l.set(elements.DeniedSet, permissionKey...)
	denied.HasTimeout, denied.free, denied.Size = true, true, elements.DeniedSize
	full := l.set(elements.FullSet, nftables.TypeIPAddr)
	full.HasTimeout, full.free, full.Size = true, true, elements.FullSize

	l.rule(learn, "", l.outside(oifname, false), accept)
	l.rule(learn, "", lacksStatus(ctSrcNAT), accept)
	if len(l.inZone0) > 0 {
		l.rule(learn, "permissions are of the default zone", zoneIsNot0, accept)
	}
	learned, excluded := accept, accept
	if d.leans() {
		learned = goTo(l.lean())
	}
	if d.quiet() {
		excluded = goTo(l.nobodyAsks())
	}
	// Before the subnets, which lack those that expectations serve.
	l.rule(learn, "", isUDP, ctReplyProtoSrc.in(peerPorts), excluded)
	l.rule(learn, "", isUDP, ctReplyProtoDst.in(ports), excluded)
	l.rule(learn, "", ctOriginalIPSaddr.notIn(subnets), accept)
	if l.named(elements.UnsureSet) != nil {
		l.rule(learn, "a source may be spoofed", l.isUnsure(), accept)
	}
	l.rule(learn, "", ctReplyIPSaddr.in(l.noPeers), accept)
	// A sender without an answer must not use up the learning rate of its host, but must be
	// learned again after its permission has expired.
	repeaters := l.set(repeatersSet, permissionKey...)
	repeaters.HasTimeout, repeaters.Timeout, repeaters.Dynamic, repeaters.free, repeaters.Size = true, learnerTimeout, true, true, uint32(c.Size)
	l.rule(learn, "a flow that was seen, but for six packets a minute", hasStatus(ctConfirmed), isUDP,
		addTo(repeaters, elem{key: kinds[0].flowKey(), limit: limitRate(true, 6, expr.LimitTimeMinute, 1)}), accept)

	l.rule(learn, "its host has reached a limit", ctOriginalIPSaddr.in(full), accept)
	// A flow gets the permission for the most peers, so try the widest kind first.
	kinds = slices.Clone(kinds)
	slices.Reverse(kinds)
	for _, k := range kinds {
		l.rule(learn, "the daemon forbids it", isUDP, k.hasFlow(), k.flowKey().in(denied), accept)
	}
	l.rule(learn, "too many at a time", addTo(learners, elem{
		key: ctOriginalIPSaddr, limit: limitRate(true, c.LearnRate, expr.LimitTimeSecond, learnBurst*c.LearnRate),
	}), counter(limitedCounter), accept)
	l.learnFlow(learn, learned, c, kinds)
}

// learnFlow ends the chain learn: it adds the permission that the flow gets, and ends with learned.
// kinds begins with the one for the most peers.
func (l *layout) learnFlow(learn *nftables.Chain, learned exprs, c *MapConfig, kinds []kind) {
	// An earlier flow with the same reply direction has ended, and this flow's host has the
	// outside port now: the peer's packets must not reach the earlier host any more.
	flows := l.set(learnedSet, flowKey...)
	flows.HasTimeout, flows.Timeout, flows.Dynamic, flows.free, flows.Size = true, savedTimeout, true, true, uint32(min(c.Size, learnedSize))
	addrMap, portMap, marks := l.named(elements.PermissionMap), l.named(elements.PortMap), l.named(elements.MarksMap)
	add := func(chain *nftables.Chain, end exprs) {
		l.rule(chain, "", isUDP, updateIn(flows, elem{key: replyFlow, timeout: c.Lifetime}))
		for _, k := range kinds {
			key := k.flowKey()
			l.rule(chain, "", ctMark.isNot(host32(0)), isUDP, k.hasFlow(), addTo(marks, elem{key: key, timeout: c.Lifetime, data: &ctMark}))
			// A second host on the outside endpoint must neither take over nor refresh the
			// element.
			l.rule(chain, "one that is there stays as it is", isUDP, k.hasFlow(),
				addTo(portMap, elem{key: key, timeout: c.Lifetime, data: &ctOriginalProtoSrc}),
				addTo(addrMap, elem{key: key, timeout: c.Lifetime, data: &ctOriginalIPSaddr}),
				counter(learnedCounter), end)
		}
	}
	passed := l.regular("passed_on")
	l.rule(learn, "a flow with the same answers has ended", lacksStatus(ctConfirmed), isUDP, replyFlow.in(flows), goTo(passed))
	for _, k := range kinds {
		key := k.flowKey()
		l.rule(passed, "the outside port has passed to this host", isUDP, k.hasFlow(),
			deleteFrom(portMap, elem{key: key, data: &ctOriginalProtoSrc}),
			deleteFrom(addrMap, elem{key: key, data: &ctOriginalIPSaddr}),
			deleteFrom(marks, elem{key: key, data: &ctMark}))
	}
	add(passed, accept) // the daemon must know: the previous host may use other flows
	add(learn, learned)
}

// sampled is one in how many later packets of an unanswered flow learn looks at. That is
// enough to learn the permission of a stream again that expired while no daemon renewed it.
const sampled = 64

// learnBurst times LearnRate is how many permissions the kernel may learn at once.
const learnBurst = 5

// countChild matches while the peer has at most c.MaxChildren live flows to the outside endpoint,
// this one included. In a group each address counts for itself, as with an expectation. A child
// of a full set is refused.
func (l *layout) countChild(c *MapConfig) exprs {
	if c.MaxChildren == 0 || c.noCount {
		return nil
	}
	name := fmt.Sprintf("%s_%d", childrenSet, c.MaxChildren) // each element keeps the limit that it was made with
	children := l.named(name)
	if children == nil {
		children = l.set(name, permissionKey...)
		children.Dynamic, children.free, children.Size = true, true, uint32(c.Size)
	}
	return addTo(children, elem{key: kind{}.packetKey(), limit: ctCount(c.MaxChildren)})
}

// takeToken matches while the permission may have another child: c.MaxChildren at once, and
// as many again in 30 s, the time that conntrack keeps an unanswered flow
// (nf_conntrack_udp_timeout): then what countChild lets pass has a token. A permission for more
// than one peer may have more (cone.GroupChildren).
func (l *layout) takeToken(k kind, c *MapConfig) exprs {
	most := c.MaxChildren
	if most == 0 {
		return nil
	}
	if k.hostBits > 0 {
		most *= cone.GroupChildren
	}
	name := fmt.Sprintf("%s_%d", bucketsSet, most) // each element keeps the limit that it was made with
	buckets := l.named(name)
	if buckets == nil {
		buckets = l.set(name, permissionKey...)
		buckets.HasTimeout, buckets.Timeout, buckets.Dynamic, buckets.free, buckets.Size = true, bucketTimeout, true, true, uint32(c.Size)
	}
	return updateIn(buckets, elem{key: k.packetKey(), limit: limitRate(false, 2*most, expr.LimitTimeMinute, most)})
}

// bucketTimeout is longer than an empty bucket takes to fill up.
const bucketTimeout = time.Minute
