package rules

import "github.com/google/nftables"

// toOutsideEndpoints sends packets from inside to an outside endpoint on to its owner
// (REQ-9), regardless of permissions. Owners are in subnets with mappings, all of which
// have hairpinning.
func (m *mapper) toOutsideEndpoints() {
	to := m.regular("to_outside_endpoint")
	c := m.chain("hairpin", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, hairpinPriority)
	m.rule(c, "", isUDP, m.outside(iifname, false), m.hairpin.has(ipSaddr), m.inZone0, goTo(to))
	m.rule(to, "the gateway itself serves it", hasSocket, accept)
	owner := m.regular("to_owner")
	m.rule(to, "", isUDP, packetTarget.in(m.owned), goTo(owner))
	if m.asksFib() {
		m.rule(owner, "the gateway lost the address", m.lost(forwarded, ipDaddr), accept)
	}
	m.rule(owner, "", isUDP, counter(hairpinCounter), dnatTo(m.owners.of(packetTarget), m.ownerPorts.of(packetTarget)))
}

// hairpinSources translates the source of packets that toOutsideEndpoints redirected to the
// source's own outside endpoint on that link (REQ-9a). A source without one gets the outside
// address of its host there, and a port that no other source has. If that address is not known, the
// source gets the gateway's address on the way to the owner, and no mapping: with an outside address
// the kernel might give the same one to the source's other flows.
func (m *mapper) hairpinSources(c *nftables.Chain) {
	h, without := m.regular("hairpinned"), m.hairpinAddress()
	m.rule(c, "", isUDP, m.outside(iifname, false), m.outside(oifname, false), m.hairpin.has(ipSaddr),
		statusIs(ctDstNAT, ctDstNAT), goTo(h))
	m.rule(h, "a forward of the user's", isUDP, flowTarget.notIn(m.owned), accept)
	for _, u := range m.uplinks {
		u.known(u.hairpinned)
		u.hairpinsNewcomer(without)
		m.rule(h, "", ctOriginalIPDaddr.in(u.translated), goTo(u.hairpinned))
	}
	m.rule(h, "", goTo(without))
}

// hairpinsNewcomer adds rules for a source without a mapping. without is as hairpinAddress returns
// it. While all hosts have one address, the packet was sent to that one.
func (u *uplink) hairpinsNewcomer(without *nftables.Chain) {
	u.haveOne(u.hairpinned, ipSaddr, goTo(without))
	c := u.regular("hairpin_newcomer")
	u.rule(u.hairpinned, "its address is known", setIPSaddr(u.addresses.of(ipSaddr)), goTo(c))
	u.rule(u.hairpinned, "its address is not known", masquerade)

	own := u.addresses.of(ipSaddr)
	for _, p := range u.pools {
		hosts, pool := p.hosts(ctOriginalIPSaddr), join(setInsideSource, snatToRange(own, largest(p.ports)))
		u.rule(c, "another one has its port", isUDP, hosts, packetSource.in(u.owned), pool)
		u.rule(c, "the gateway has its port", isUDP, hosts, udpSport.in(u.served), pool)
	}
	u.rule(c, "", setInsideSource, snatToAddr(own))
}

// haveOne adds a rule for packets while all hosts have one outside address on the link. addr is any
// address.
func (u *uplink) haveOne(c *nftables.Chain, addr operand, end ...exprs) {
	if !u.differ {
		u.rule(c, "all have one address", append([]exprs{nobody(addr).notIn(u.several)}, end...)...)
	}
}

// hairpinAddress returns the chain that translates only the address: the kernel keeps the
// port where it can, and makes sure that the flow is unique. It does so with a port range,
// too.
func (m *mapper) hairpinAddress() *nftables.Chain {
	c := m.regular("hairpin_address")
	for _, p := range m.pools {
		pool := snatToRange(ctOriginalIPDaddr, largest(p.ports))
		m.rule(c, "another one has its port", isUDP, p.hosts(ipSaddr), concat(ctOriginalIPDaddr, udpSport).in(m.owned), pool)
		m.rule(c, "the gateway has its port", isUDP, p.hosts(ipSaddr), udpSport.in(m.served), pool)
	}
	m.rule(c, "", snatToAddr(ctOriginalIPDaddr))
	return c
}

// rememberHairpins learns from hairpinned flows as remember does from others.
func (m *mapper) rememberHairpins(c *nftables.Chain) {
	h := m.regular("remember_hairpin")
	m.rule(c, "", isUDP, m.outside(oifname, false), m.inZone0, m.hairpin.has(ctOriginalIPSaddr),
		statusIs(ctSrcNAT|ctDstNAT, ctSrcNAT|ctDstNAT), goTo(h))
	m.rule(h, "a forward of the user's", isUDP, flowTarget.notIn(m.owned), accept)
	for _, u := range m.uplinks {
		m.rule(h, "", ctOriginalIPDaddr.in(u.translated), goTo(u.remembersHairpin()))
	}
}

// remembersHairpin returns the chain for hairpinned flows to an outside endpoint on the
// link.
func (u *uplink) remembersHairpin() *nftables.Chain {
	c := u.regular("remember_hairpin")
	u.rule(c, "it has a mapping", isUDP, setIPSaddr(u.kept.of(flowInside)), setOutsideSource, accept)
	u.rule(c, "the same, with another port", isUDP, setUDPSport(u.ports.of(flowInside)), setOutsidePort, accept)
	u.rule(c, "", u.subnets.hasNot(ctOriginalIPSaddr), goTo(u.foreign))
	if u.chosen.leaves(u, c, ctOriginalIPSaddr, goTo(u.foreign)) { // no rule of the user's chose this port
		return c
	}
	u.rule(c, "", isUDP, ctOriginalProtoSrc.is(be16(0)), goTo(u.foreign))
	u.rule(c, "a rule of the user's gave it no outside address", ctReplyIPDaddr.notIn(u.translated), goTo(u.foreign))
	u.rule(c, "", isUDP, ctReplyProtoDst.in(u.served), goTo(u.foreign))
	u.haveOne(c, ctReplyIPDaddr, goTo(u.own))
	u.rule(c, "its first packet taught nothing", hasStatus(ctConfirmed), goTo(u.foreign))
	u.rule(c, "its address is known", setIPSaddr(u.addresses.of(ctOriginalIPSaddr)), setOutsideSource, goTo(u.own))
	u.rule(c, "", goTo(u.foreign))
	return c
}
