//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// toOutsideEndpoints sends packets from inside to an outside endpoint on to its
// owner (REQ-9), whatever the permissions say.
func (m *mapper) toOutsideEndpoints() {
	to := m.regular("to_outside_endpoint")
	c := m.chain("hairpin", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, hairpinPriority)
	m.rule(c, "", join(isUDP, m.outside(iifname, false), m.hairpin.has(source(0)), inZone, goTo(to)))
	m.rule(to, "the gateway itself serves it", join(hasSocket, accept))
	m.rule(to, "", join(
		destination(extWord), transport(2, extPortWord), find(m.owned, extWord, ownedWord), m.hairpin.hasAt(hostWord),
		count(hairpinCounter), dnat(hostWord, portWord)))
}

// hairpinned translates the source of what toOutsideEndpoints translated to its
// own outside endpoint on that link (REQ-9a); where it has none, to the same
// outside address, with a port that no other one has.
func (m *mapper) hairpinned(c *nftables.Chain) {
	h := m.regular("hairpinned")
	m.rule(c, "", join(
		isUDP, m.outside(iifname, false), m.outside(oifname, false), m.hairpin.has(source(0)), isForwarded, goTo(h)))
	m.rule(h, "its own outside endpoint; nft does not list the look-ups in maps", join(
		m.ownEndpoint(), find(m.mappings, linkWord, valueAt),
		destination(remoteWord), transport(2, remotePortWord), hasNot(m.taken, extPortWord), snat(extWord, extPortWord)))
	m.rule(h, "its own outside port is taken towards this one", join(
		m.ownEndpoint(), find(m.mappings, linkWord, valueAt), count(leftCounter), accept))
	// Only the address is given: the kernel keeps the port where it can, and looks
	// whether the flow is the only one. With a range it does that too.
	address := join(m.ownEndpoint(), original(expr.CtKeyDSTIP, extWord))
	m.rule(h, "another one has its port", join(address, transport(0, extPortWord), find(m.owned, extWord, ownedWord), m.toPool()))
	m.rule(h, "the gateway has its port", join(address, transport(0, extPortWord), has(m.served, extPortWord), m.toPool()))
	m.rule(h, "", join(address, piece{&expr.NAT{
		Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: word32(extWord),
	}}))
}

// ownEndpoint loads the source of a hairpinned packet as an inside endpoint on the
// link of the outside endpoint that it was sent to. It ends the rule where that is
// nobody's: a forward of the user's.
func (m *mapper) ownEndpoint() piece {
	return join(m.linkOfDestination(), source(hostWord), transport(0, portWord))
}

func (m *mapper) linkOfDestination() piece {
	return join(original(expr.CtKeyDSTIP, extWord), original(expr.CtKeyPROTODST, extPortWord), find(m.owned, extWord, ownedWord))
}

// rememberHairpins learns from hairpinned flows as remember does from others.
func (m *mapper) rememberHairpins(c, foreign *nftables.Chain) {
	h := m.regular("remember_hairpin")
	m.rule(c, "", join(isUDP, m.outside(oifname, false), inZone, m.hairpin.has(original(expr.CtKeySRCIP, 0)), isHairpinned, goTo(h)))
	endpoint := join(m.linkOfDestination(), original(expr.CtKeySRCIP, hostWord), original(expr.CtKeyPROTOSRC, portWord))
	m.rule(h, "it has a mapping", join(endpoint, find(m.mappings, linkWord, valueAt), accept))
	m.rule(h, "", join(m.subnets.hasNot(original(expr.CtKeySRCIP, 0)), goTo(foreign)))
	m.rule(h, "", join(original(expr.CtKeyPROTOSRC, 0), is(be16(0)), goTo(foreign)))
	m.rule(h, "", join(reply(expr.CtKeyPROTODST, 0), has(m.served, 0), goTo(foreign)))
	m.rule(h, "", goTo(m.own(m.regular("own_hairpin"), endpoint, foreign)))
}
