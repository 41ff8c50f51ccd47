package rules

import (
	"github.com/google/nftables"

	"github.com/conenatd/conenatd/internal/rules/elements"
)

// known adds the rules for a packet whose source has a mapping. With a fixed port the
// kernel does not check whether the flow is unique; it later drops the packet if it is not.
func (u *uplink) known(c *nftables.Chain) {
	u.rule(c, "its mapping", isUDP, setIPSaddr(u.kept.of(packetSource)), goTo(u.ownPort))
	u.rule(c, "its mapping has another port", isUDP, setUDPSport(u.ports.of(packetSource)), goTo(u.given))
}

// givesOwnPort returns the chain for a packet that already carries the source address of its
// mapping, and whose own port is that of the mapping.
func (u *uplink) givesOwnPort() *nftables.Chain {
	c := u.regular("own_port")
	u.leavesLost(c)
	u.rule(c, "", setInsideSource)
	u.rule(c, "its outside port is taken towards this remote endpoint", isUDP, packetTuple.in(u.taken), counter(leftCounter), accept)
	u.rule(c, "its mapping", isUDP, snatTo(u.kept.of(packetSource), udpSport))
	return c
}

// givesMoved returns the chain for a packet that already carries the source port of its
// mapping.
func (u *uplink) givesMoved() *nftables.Chain {
	c := u.regular("given")
	if u.asksFib() {
		u.rule(c, "", isUDP, setIPSaddr(u.moved.of(flowInside)))
		u.leavesLost(c)
		u.rule(c, "", setInsideSource)
	}
	u.rule(c, "its outside port is taken towards this remote endpoint",
		isUDP, packetTuple.in(u.taken), setInsidePort, counter(leftCounter), accept)
	u.giveMoved(c)
	return c
}

// giveMoved adds rules that restore the source of the packet and translate it to the
// mapping in moved.
func (u *uplink) giveMoved(c *nftables.Chain) {
	u.rule(c, "", isUDP, setInsidePort)
	u.rule(c, "its mapping", isUDP, snatTo(u.moved.of(packetSource), u.ports.of(packetSource)))
}

// An outside address is lost if only a masquerade gave it and no link has it any more. Then
// without mappings the kernel would translate to another address at once. The daemon ends such
// mappings, too, but it may be dead, and the tables may be a copy that was saved before the
// gateway got another address.

// lost matches if addr is lost; notLocal asks about that address of the packet.
func (m *mapper) lost(notLocal exprs, addr operand) exprs {
	return join(notLocal, addr.in(m.masqueraded))
}

// asksFib reports whether the kernel can tell that an address is lost.
func (m *mapper) asksFib() bool { return m.masqueraded != nil }

// leavesLost adds a rule for a packet that carries the source address of its mapping: if that
// is lost, it goes on to lostAddress. A packet that leaves by another link is hairpinned: the
// link may be down for a moment.
func (u *uplink) leavesLost(c *nftables.Chain) {
	if u.asksFib() {
		u.rule(c, "the gateway lost the address", u.lost(notOfGateway, ipSaddr), u.leavesBy(), goTo(u.lostAddress))
	}
}

// endsLost makes the chain for a packet that carries, as its source, the outside endpoint of
// its mapping, of which the address is lost. It ends the mapping, and the packet goes on as that
// of a newcomer. The next flows tell which address hosts have.
func (u *uplink) endsLost(newcomers *nftables.Chain) {
	if !u.asksFib() {
		return
	}
	c, first := u.lostAddress, nobody(ipSaddr)
	gone := join(isUDP, deleteFrom(u.owned, elem{key: packetSource}))
	if u.hairpin != nil {
		gone = join(gone,
			deleteFrom(u.owners, elem{key: packetSource, data: &ctOriginalIPSaddr}),
			deleteFrom(u.ownerPorts, elem{key: packetSource, data: &ctOriginalProtoSrc}))
	}
	u.rule(c, "", gone)
	u.rule(c, "", isUDP, deleteFrom(u.kept, elem{key: flowInside, data: &ipSaddr}),
		deleteFrom(u.moved, elem{key: flowInside, data: &ipSaddr}), deleteFrom(u.ports, elem{key: flowInside, data: &udpSport}))
	u.rule(c, "flows will tell the addresses anew", ipSaddr.in(u.translated), deleteFrom(u.translated, elem{key: ipSaddr}),
		deleteFrom(u.translated, elem{key: first}), deleteFrom(u.several, elem{key: first}), deleteFrom(u.addresses, elem{key: first, data: &ipSaddr}))
	u.rule(c, "", isUDP, setInsidePort)
	u.rule(c, "", setInsideSource, goTo(newcomers))
}

// lostSet makes the set of the addresses that are lost as soon as no link has them.
func (m *mapper) lostSet(noFib bool) {
	if !noFib {
		m.masqueraded = m.set(elements.MasqueradedSet, addressKey...)
		m.masqueraded.free = true
	}
}
