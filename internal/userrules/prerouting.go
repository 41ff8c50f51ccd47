package userrules

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// A Place says what a chain sees of the first packet of a child.
type Place uint8

const (
	// BehindNAT is the forward hook, and prerouting behind destination NAT: the packet is
	// for the inside host.
	BehindNAT Place = iota
	// BeforeNAT is prerouting between conntrack and destination NAT, and the NAT chains: the
	// packet is for the outside address. A child of an expectation is RELATED, and DNATed as
	// well; a child that the map will admit differs in nothing from other new flows.
	BeforeNAT
	// BeforeConntrack is prerouting before conntrack: the packet has no state.
	BeforeConntrack
)

// Priorities of the kernel's own hooks in prerouting. All NAT chains run at priorityNAT, in the
// order of their own priorities (nf_nat_ipv4_ops).
const (
	priorityConntrack = -200 // NF_IP_PRI_CONNTRACK
	priorityNAT       = -100 // NF_IP_PRI_NAT_DST
)

// hookPriority is the priority at which the kernel calls the chain.
func (b base) hookPriority() int32 {
	if b.kind == natKind {
		return priorityNAT
	}
	return b.priority
}

// stages are a class of packets on their way to a host, as the chains see them.
type stages struct {
	untracked *child // before conntrack
	arrived   *child // before NAT
	routing   *child // behind NAT, before it is known by which link they leave
	forwarded *child // in the forward hook
}

// stagesOf returns the stages of packets that are forwarded as given. They arrive for an
// outside address; an invalid one stands for any. own says that the link by which they come
// has this address.
func stagesOf(forwarded *child, outside netip.Addr, own bool) stages {
	s := stages{forwarded: forwarded}
	routing := *forwarded
	routing.out = oneLink(nil, nil)
	arrived := routing
	arrived.labelled = false
	if arrived.family == unix.NFPROTO_IPV4 && forwarded.status != 0 { // children over IPv6 are seldom translated
		arrived.arriveFor(outside, own)
	}
	untracked := arrived
	untracked.untracked = true
	s.untracked, s.arrived, s.routing = &untracked, &arrived, &routing
	return s
}

// strangerStages returns the stages of a packet that comes by the link in and arrives for the endpoint
// at, if a forward leads it to the endpoint to, unless that is the same.
func strangerStages(forwarded *child, in *Link, at, to netip.AddrPort) stages {
	if at == to {
		return stagesOf(forwarded, netip.Addr{}, false)
	}
	forwarded.status = statusDstNAT
	own := in != nil && in.Masquerade == at.Addr()
	s := stagesOf(forwarded, at.Addr(), own)
	for _, c := range []*child{s.untracked, s.arrived} {
		c.arriveFor(at.Addr(), own)
		c.transport = slices.Concat(c.transport[:2], knownBytes(binary.BigEndian.AppendUint16(nil, at.Port())))
	}
	return s
}

// arriveFor makes c the packets before their destination is translated.
func (c *child) arriveFor(outside netip.Addr, own bool) {
	at := c.destination()
	if c.status&statusExpected != 0 {
		c.replies = c.network[at:] // the expectation has set up NAT
	} else {
		c.status &^= statusDstNAT
	}
	to := unknownBytes(4, &origin{even: true})
	if outside.IsValid() {
		to = knownBytes(outside.AsSlice())
	}
	c.network = slices.Concat(c.network[:at], to)
	if c.local = maybe; own {
		c.local = always
	}
}

// at returns the packets that a base chain sees. They are two classes if the order in which
// hooks of one priority were registered decides; none if the chain sees no packets.
func (s stages) at(b base) ([]*child, Place) {
	const dnat = statusDstNAT
	switch at := b.hookPriority(); {
	case b.hook == unix.NF_INET_FORWARD:
		return []*child{s.forwarded}, BehindNAT
	case b.kind == natKind && s.arrived.status&s.arrived.knownStatus&dnat != 0:
		return nil, BeforeNAT // translated already (nf_nat_inet_fn)
	case b.kind == natKind:
		return []*child{s.arrived}, BeforeNAT
	case at < priorityConntrack:
		return []*child{s.untracked}, BeforeConntrack
	case at == priorityConntrack:
		return []*child{s.untracked, s.arrived}, BeforeConntrack
	case at < priorityNAT:
		return []*child{s.arrived}, BeforeNAT
	case at == priorityNAT:
		return []*child{s.arrived, s.routing}, BeforeNAT
	}
	return []*child{s.routing}, BehindNAT
}

// mayBeTranslated reports whether NAT chains may not see some of the packets, because an
// expectation translates them.
func (c *child) mayBeTranslated() bool { return c.status&^c.knownStatus&statusDstNAT != 0 }

// destinationType returns the type of the destination address (RTN_LOCAL and so on).
func (c *child) destinationType() []cell {
	switch c.local {
	case never:
		return knownBytes(binary.NativeEndian.AppendUint32(nil, unix.RTN_UNICAST))
	case always:
		return knownBytes(binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL))
	}
	return unknownBytes(4, nil)
}

// outsideAddr returns the address for which packets to hosts of a subnet arrive by a link, as
// far as the rules tell, and whether it is the link's own.
func outsideAddr(rules, untranslated []SourceNAT, in *Link, subnet netip.Prefix) (addr netip.Addr, own bool) {
	if in == nil || !subnet.Addr().Is4() {
		return addr, false
	}
	o := OutsideAddrsOf(rules, untranslated, in.Name, in.Masquerade, []netip.Prefix{subnet})
	if o.Addr == nil || !o.Addr.IsValid() {
		return addr, false
	}
	return *o.Addr, *o.Addr == in.Masquerade
}
