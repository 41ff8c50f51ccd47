//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// toOutsideEndpoints sends packets from inside to an outside endpoint on to its
// owner (REQ-9), whatever the permissions say. An owner is in a subnet with mappings,
// and those have hairpinning.
func (m *mapper) toOutsideEndpoints() {
	to := m.regular("to_outside_endpoint")
	c := m.chain("hairpin", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, hairpinPriority)
	m.rule(c, "", join(isUDP, m.outside(iifname, false), m.hairpin.has(source(0)), inZone, goTo(to)))
	m.rule(to, "the gateway itself serves it", join(hasSocket, accept))
	m.rule(to, "", join(
		isUDP, has(m.owned, packetTarget), count(hairpinCounter),
		find(m.owners, packetTarget),
		findAt(m.ownerPorts, join(destination(secondWord), transport(2, secondWord+1)), secondWord), dnat()))
}

// hairpinSources translates the source of what toOutsideEndpoints translated to its
// own outside endpoint on that link (REQ-9a); where it has none, to the same
// outside address, with a port that no other one has.
func (m *mapper) hairpinSources(c *nftables.Chain) {
	h, without := m.regular("hairpinned"), m.hairpinAddress()
	m.rule(c, "", join(
		isUDP, m.outside(iifname, false), m.outside(oifname, false), m.hairpin.has(source(0)), isForwarded, goTo(h)))
	m.rule(h, "a forward of the user's", join(isUDP, hasNot(m.owned, flowTarget), accept))
	for _, u := range m.uplinks {
		u.known(u.hairpinned)
		u.rule(u.hairpinned, "", goTo(without))
		m.rule(h, "", join(has(u.translated, original(expr.CtKeyDSTIP, 0)), goTo(u.hairpinned)))
	}
	m.rule(h, "", goTo(without))
}

// hairpinAddress returns the chain that gives but the address: the kernel keeps the port
// where it can, and looks whether the flow is the only one. With a range it does that
// too.
func (m *mapper) hairpinAddress() *nftables.Chain {
	c, address := m.regular("hairpin_address"), original(expr.CtKeyDSTIP, 0)
	if len(m.Pool) > 0 {
		toPool := join(address, toRange(largest(m.Pool)))
		m.rule(c, "another one has its port", join(isUDP, has(m.owned, join(address, transport(0, 1))), toPool))
		m.rule(c, "the gateway has its port", join(isUDP, has(m.served, sourcePort), toPool))
	}
	m.rule(c, "", join(address, snat(false)))
	return c
}

// toRange lets the kernel choose a port, behind the outside address in reg.
func toRange(r PortRange) piece {
	return piece{
		&expr.Immediate{Register: unix.NFT_REG_2, Data: be16(r.First)},
		&expr.Immediate{Register: unix.NFT_REG_3, Data: be16(r.Last)},
		&expr.NAT{
			Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg,
			RegProtoMin: unix.NFT_REG_2, RegProtoMax: unix.NFT_REG_3,
		},
	}
}

// rememberHairpins learns from hairpinned flows as remember does from others.
func (m *mapper) rememberHairpins(c *nftables.Chain) {
	h := m.regular("remember_hairpin")
	m.rule(c, "", join(isUDP, m.outside(oifname, false), inZone, m.hairpin.has(original(expr.CtKeySRCIP, 0)), isHairpinned, goTo(h)))
	m.rule(h, "a forward of the user's", join(isUDP, hasNot(m.owned, flowTarget), accept))
	for _, u := range m.uplinks {
		m.rule(h, "", join(has(u.translated, original(expr.CtKeyDSTIP, 0)), goTo(u.remembersHairpin())))
	}
}

// remembersHairpin returns the chain for those to an outside endpoint on the link.
func (u *uplink) remembersHairpin() *nftables.Chain {
	c := u.regular("remember_hairpin")
	u.rule(c, "it has a mapping", join(isUDP, setSource(find(u.kept, flowInside)), outsideSource, accept))
	u.rule(c, "the same, with another port", join(isUDP, setSourcePort(find(u.ports, flowInside)), outsideSourcePort, accept))
	u.rule(c, "", join(u.subnets.hasNot(original(expr.CtKeySRCIP, 0)), goTo(u.foreign)))
	u.rule(c, "", join(isUDP, original(expr.CtKeyPROTOSRC, 0), is(be16(0)), goTo(u.foreign)))
	u.rule(c, "", join(isUDP, has(u.served, reply(expr.CtKeyPROTODST, 0)), goTo(u.foreign)))
	u.rule(c, "", goTo(u.own))
	return c
}
