//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Names of sets.
const (
	mappingsMap    = "mappings"
	ownedMap       = "owned"
	takenSet       = "taken"
	addressesMap   = "addresses"
	translatedSet  = "translated"
	moversMap      = "movers"
	mappedSet      = "mapped_subnets"
	exemptSet      = "exempt"
	servedSet      = "served"
	goneSet        = "gone"
	hairpinSet     = "hairpin_subnets"
	movedCounter   = "moved"
	usedUpCounter  = "pool_used_up"
	leftCounter    = "left_to_rules"
	hairpinCounter = "hairpinned"
)

const (
	// Before srcnat: a flow that gets its mapping here is done, any other one
	// goes on to the user's rules.
	mapPriority = 95
	// After dstnat: the user's own forwards come first and win.
	hairpinPriority = -94
	// After srcnat and learn, when the outside endpoint is known.
	rememberPriority = 291
	// After guard: what it drops takes no outside endpoint.
	arrivalsPriority = 210
)

const (
	// ownedLonger is how much longer an outside endpoint is owned than its
	// mapping lasts. The other way round two hosts could have it for a moment.
	ownedLonger = time.Second
	// takenTimeout and keptTimeout are the least values of MappingConfig.TakenFor and
	// KeptFor.
	takenTimeout = time.Minute
	keptTimeout  = 3 * time.Minute
	// addressTimeout is how long it is remembered which outside address the
	// user's rules gave a host, and moverTimeout on which one it is moved to the
	// pool: until its packet has met the next rules.
	addressTimeout = time.Hour
	moverTimeout   = time.Second
	// goneTimeout is how long no mapping is learned to an address that is gone, until
	// the flows that have it have ended.
	goneTimeout = 10 * time.Second
	// takenSize bounds the flows that are remembered, addressesSize the hosts.
	takenSize     = 1 << 18
	addressesSize = 1 << 16
	// tries is how many ports of the pool are looked at for a newcomer: with half of
	// the pool owned one in 256 finds none. A packet may meet 16 chains one in another.
	tries = 8
)

// Keys of the sets. An inside endpoint is one on an outside link: with two of
// them a host has a mapping on each. The link is a LinkID.
var (
	insideEndpoint  = []nftables.SetDatatype{nftables.TypeMark, nftables.TypeIPAddr, nftables.TypeInetService}
	insideHost      = insideEndpoint[:2]
	outsideEndpoint = []nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeInetService}
)

// valueOf returns the type of a value; see valueAt.
func valueOf(parts ...nftables.SetDatatype) nftables.SetDatatype {
	return nftables.MustConcatSetType(append([]nftables.SetDatatype{nftables.TypeMark}, parts...)...)
}

// mapping keeps one outside endpoint for each inside endpoint and outside link,
// and gives it to no other one (RFC 4787, REQ-1 to REQ-4):
//
//   - mappings has the outside endpoint of an inside endpoint on a link, owned is
//     its inverse. Both learn from the first flow, as the user's own rules
//     translated it. Elements are added, not updated, so the first one keeps what
//     it has, and only flows of the inside endpoint itself refresh it.
//   - taken has the remote endpoints towards which an outside port is used by
//     something that has no mapping: the gateway itself, a packet that came
//     before the answer, a host whose subnet is not enabled.
//   - addresses has the outside address that the user's rules give to a host, and,
//     under 0.0.0.0, to the first host that was seen. translated has all of a
//     link, and 0.0.0.0 once there is a second one. movers has for a moment the
//     outside address of a host that is moved to the pool.
//   - gone has the outside addresses that went a moment ago.
//
// A flow that is answered does not refresh its mapping, for its packets do not
// come here. A mapping must not end before its last flow, or another host gets
// its port: it is the daemon's to refresh those of living flows, and what is
// taken by living flows without a mapping, in time.
func (l *layout) mapping(c *MappingConfig) {
	l.gatewayAddresses()
	l.counters = append(l.counters, movedCounter, usedUpCounter, leftCounter)
	mappings, owned := l.set(mappingsMap, insideEndpoint...), l.set(ownedMap, outsideEndpoint...)
	mappings.IsMap, mappings.DataType = true, valueOf(outsideEndpoint...)
	owned.IsMap, owned.DataType = true, valueOf(insideEndpoint...)
	mappings.Size, owned.Size = uint32(c.Size), uint32(c.Size)
	taken := l.set(takenSet, nftables.TypeInetService, nftables.TypeIPAddr, nftables.TypeInetService)
	addresses := l.set(addressesMap, insideHost...)
	addresses.IsMap, addresses.DataType = true, valueOf(nftables.TypeIPAddr)
	translated := l.set(translatedSet, insideHost...)
	movers := l.set(moversMap, insideHost...)
	movers.IsMap, movers.DataType = true, addresses.DataType
	taken.Size, addresses.Size, movers.Size = takenSize, addressesSize, addressesSize
	gone := l.set(goneSet, nftables.TypeIPAddr)
	for _, s := range []*set{mappings, owned, taken, addresses, translated, movers, gone} {
		s.HasTimeout, s.Dynamic, s.free = true, true, true
	}
	served := l.set(servedSet, nftables.TypeInetService)
	served.elements = portElements(c.Served)
	m := &mapper{
		layout: l, MappingConfig: c,
		mappings: mappings, owned: owned, taken: taken, addresses: addresses, translated: translated, movers: movers, gone: gone,
		served: served, subnets: l.prefixes(mappedSet, c.Subnets),
	}
	if len(c.Exempt) > 0 {
		m.exempt = l.prefixes(exemptSet, c.Exempt)
	}
	if len(c.Hairpin) > 0 {
		m.hairpin = l.prefixes(hairpinSet, c.Hairpin)
		l.counters = append(l.counters, hairpinCounter)
		m.toOutsideEndpoints()
	}
	for i, name := range l.links {
		m.uplinks = append(m.uplinks, &uplink{mapper: m, name: name, number: i + 1})
	}
	m.apply()
	m.remember()
	m.arrivals()
}

// A mapper has the sets that the rules of mapping name. All rules load their
// registers themselves: the kernel refuses those that rely on another rule.
type mapper struct {
	*layout
	*MappingConfig

	mappings, owned, taken, addresses, translated, movers, gone *set
	served                                                      *set
	subnets, exempt, hairpin                                    *prefixes // the last two may be nil
	uplinks                                                     []*uplink
}

// An uplink makes the rules that are there once for each outside link: they load its
// LinkID as a constant, which is far cheaper than a look-up by its name.
type uplink struct {
	*mapper
	name   string
	number int
}

// Words of the registers. A value begins with a word that says nothing: nft 1.0.6
// aborts when it lists a rule that has the first word of a value in a key, or in
// another value, so that one has to be loaded again.
const (
	ownedWord = 0 // where the value of owned goes: nothing, and the key of mappings
	linkWord  = 1 // the key of mappings, and that of addresses
	hostWord  = 2
	portWord  = 3

	valueAt     = 4 // the values of mappings and addresses: nothing, and the key of owned
	extWord     = 5
	extPortWord = 6

	remoteWord     = 7 // with extPortWord before it, the key of taken
	remotePortWord = 8

	hashWord = 9 // and the next

	maskedWord = 11 // an address without its low bits
)

// These load a part of the packet, or a constant, into a word.
func word32(w uint32) uint32     { return unix.NFT_REG32_00 + w }
func source(w uint32) piece      { return network(12, w) }
func destination(w uint32) piece { return network(16, w) }
func network(offset, w uint32) piece {
	return piece{&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4, DestRegister: word32(w)}}
}

func constant(w uint32, b []byte) piece {
	return piece{&expr.Immediate{Register: word32(w), Data: b}}
}
func nobody(w uint32) piece { return constant(w, be32(0)) }

// find ends the rule where the map has not the key at word from, and puts its
// value at word to.
func find(m *set, from, to uint32) piece {
	return piece{&expr.Lookup{SourceRegister: word32(from), SetName: m.Name, DestRegister: word32(to), IsDestRegSet: true}}
}

func has(s *set, from uint32) piece {
	return piece{&expr.Lookup{SourceRegister: word32(from), SetName: s.Name}}
}

func hasNot(s *set, from uint32) piece {
	return piece{&expr.Lookup{SourceRegister: word32(from), SetName: s.Name, Invert: true}}
}

// put writes the element with the key at word from and, in a map, the value at
// word value. NFT_DYNSET_OP_ADD leaves one that is there as it is; _UPDATE
// refreshes it, but not its value. The rule ends where the set is full.
func put(s *set, op, from, value uint32, timeout time.Duration) piece {
	d := &expr.Dynset{SrcRegKey: word32(from), SetName: s.Name, Operation: op, Timeout: timeout}
	if s.IsMap {
		d.SrcRegData = word32(value)
	}
	return piece{d}
}

const (
	opAdd    = unix.NFT_DYNSET_OP_ADD
	opUpdate = unix.NFT_DYNSET_OP_UPDATE
)

// link loads the LinkID, endpoint the key of mappings from a packet that is not
// translated yet, flowEndpoint from a flow.
func (u *uplink) link() piece { return constant(linkWord, ne32(uint32(LinkIDOf(u.name)))) }

func (u *uplink) endpoint() piece { return join(u.link(), source(hostWord), transport(0, portWord)) }

func (u *uplink) flowEndpoint() piece {
	return join(u.link(), original(expr.CtKeySRCIP, hostWord), original(expr.CtKeyPROTOSRC, portWord))
}

// leaves tells whether the packet leaves by the link.
func (u *uplink) leaves() piece { return join(oifname, is(linkKey(u.name))) }

// regular adds a chain of this link that only others lead to.
func (u *uplink) regular(name string) *nftables.Chain {
	if u.number > 1 {
		name = fmt.Sprintf("%s_link_%d", name, u.number)
	}
	return u.mapper.regular(name)
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

func snat(addr, port uint32) piece { return nat(expr.NATTypeSourceNAT, addr, port) }
func dnat(addr, port uint32) piece { return nat(expr.NATTypeDestNAT, addr, port) }
func nat(typ expr.NATType, addr, port uint32) piece {
	return piece{&expr.NAT{
		Type: typ, Family: unix.NFPROTO_IPV4, RegAddrMin: word32(addr), RegProtoMin: word32(port),
	}}
}

// apply translates what has a mapping, and moves a newcomer whose port another
// host has, or the gateway, to the pool. Everything else it leaves to the user's
// rules. A NAT chain sees the first packet of a flow only.
func (m *mapper) apply() {
	c := m.chain("map_source", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, mapPriority)
	if m.hairpin != nil {
		m.hairpinned(c)
	}
	plain := isPlain
	if m.noIPsec {
		plain = nil
	}
	for _, u := range m.uplinks {
		m.rule(c, "a source from outside may be spoofed", join(
			isUDP, u.leaves(), m.outside(iifname, false), inZone, m.exempt.hasNot(destination(0)), plain, goTo(u.mapped())))
	}
}

// mapped returns the chain that does so for packets that leave by the link.
func (u *uplink) mapped() *nftables.Chain {
	c := u.regular("mapped")
	// With a port that is given the kernel does not look whether the flow is the
	// only one, and drops the packet in the end when it is not.
	u.rule(c, "its mapping", join(
		u.endpoint(), u.subnets.hasAt(hostWord), find(u.mappings, linkWord, valueAt),
		destination(remoteWord), transport(2, remotePortWord), hasNot(u.taken, extPortWord), snat(extWord, extPortWord)))
	u.rule(c, "from a host without mappings", join(u.subnets.hasNot(source(0)), accept))
	u.rule(c, "its outside port is taken towards this remote endpoint", join(
		u.endpoint(), find(u.mappings, linkWord, valueAt), count(leftCounter), accept))

	pool := u.pool()
	// A host that was not seen yet is taken to get the address that all others get,
	// where there is but one. Else its first flow is left to the user's rules.
	known := join(u.link(), source(hostWord), find(u.addresses, linkWord, valueAt))
	likely := join(u.link(), nobody(hostWord), hasNot(u.translated, linkWord), find(u.addresses, linkWord, valueAt), source(hostWord))
	move := join(nobody(valueAt), put(u.movers, opUpdate, linkWord, valueAt, moverTimeout), goTo(pool))
	for i, address := range []piece{known, likely} {
		if i > 0 {
			u.rule(c, "its address is known", join(known, accept))
		}
		u.rule(c, "another one has the port", join(
			address, transport(0, extPortWord), find(u.owned, extWord, ownedWord), u.link(), source(hostWord), move))
		u.rule(c, "the gateway has the port", join(address, transport(0, extPortWord), has(u.served, extPortWord), move))
	}
	return c
}

// regular adds a chain that only others lead to.
func (m *mapper) regular(name string) *nftables.Chain {
	c := &nftables.Chain{Table: m.table, Name: name}
	m.chains = append(m.chains, c)
	return c
}

// moversAddress loads the outside address on which the packet's host is moved.
func (u *uplink) moversAddress() piece {
	return join(u.link(), source(hostWord), find(u.movers, linkWord, valueAt))
}

// pool makes the chains that give a newcomer a port of the pool that nobody has,
// even or odd as its own (REQ-4), and returns the first. An inside endpoint gets
// the same ports to try each time: two first packets at once agree, and so does
// the next flow when the mapping is gone. When all tries fail it is left to the
// user's rules.
//
// A rule cannot remember a port for the next one, so each computes it again.
func (u *uplink) pool() *nftables.Chain {
	// From the last one to the first: a rule names the next chain.
	usedUp := u.regular("pool_used_up")
	u.rule(usedUp, "", join(count(usedUpCounter), accept))
	first, last := (int(u.PoolFirst)+1)&^1, (int(u.PoolLast)-1)&^1 // of the even ports
	if first > last {
		return usedUp
	}
	var parities [2]*nftables.Chain
	for parity := range parities {
		next := usedUp
		for try := tries; try > 0; try-- {
			c := u.regular(fmt.Sprintf("pool_%s_%d", []string{"even", "odd"}[parity], try))
			port := candidate(first, last, parity, try)
			u.rule(c, "another one has it", join(u.moversAddress(), port, find(u.owned, extWord, ownedWord), goTo(next)))
			u.rule(c, "nor has the gateway, nor is it taken towards this remote endpoint", join(
				u.moversAddress(), port, hasNot(u.served, extPortWord), destination(remoteWord), transport(2, remotePortWord),
				hasNot(u.taken, extPortWord), count(movedCounter), snat(extWord, extPortWord)))
			u.rule(c, "", goTo(next))
			next = c
		}
		parities[parity] = next
	}
	pool := u.regular("pool")
	u.rule(pool, "an odd port stays odd", join(transport(0, 0), lowBit, is(be16(1)), goTo(parities[1])))
	u.rule(pool, "", goTo(parities[0]))
	return pool
}

// toPool lets the kernel choose from the pool, behind the outside address.
func (m *mapper) toPool() piece {
	return piece{
		&expr.Immediate{Register: word32(extPortWord), Data: be16(m.PoolFirst)},
		&expr.Immediate{Register: word32(extPortWord + 1), Data: be16(m.PoolLast)},
		&expr.NAT{
			Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: word32(extWord),
			RegProtoMin: word32(extPortWord), RegProtoMax: word32(extPortWord + 1),
		},
	}
}

var lowBit = piece{&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 2, Mask: be16(1), Xor: be16(0)}}

// candidate puts a port, as it lies in a packet, behind the outside address that
// moversAddress loads. It is a hash of the inside endpoint, at the upper half of a
// number that is then brought into network byte order.
func candidate(first, last, parity, try int) piece {
	const port = extPortWord
	return join(source(hashWord), transport(0, hashWord+1), piece{
		&expr.Hash{
			Type: expr.HashTypeJenkins, Seed: uint32(try), SourceRegister: word32(hashWord), Length: 8,
			DestRegister: word32(port), Modulus: uint32(last+2-first) << 16, Offset: uint32(first) << 16,
		},
		&expr.Byteorder{SourceRegister: word32(port), DestRegister: word32(port), Op: expr.ByteorderHton, Len: 4, Size: 4},
		&expr.Bitwise{
			SourceRegister: word32(port), DestRegister: word32(port), Len: 4,
			Mask: []byte{0xff, 0xfe, 0, 0}, Xor: []byte{0, byte(parity), 0, 0},
		},
	})
}

// remember learns mappings, and what is taken, from flows that are translated
// already and not answered yet.
func (m *mapper) remember() {
	inbound, foreign := m.regular("inbound"), m.regular("foreign")
	m.rule(inbound, "its answers take the port", m.takeInbound())
	m.rule(foreign, "a flow without a mapping takes the port", join(
		reply(expr.CtKeyPROTODST, 0), reply(expr.CtKeySRCIP, 1), reply(expr.CtKeyPROTOSRC, 2),
		put(m.taken, opUpdate, 0, 0, max(takenTimeout, m.TakenFor))))

	c := m.filter("remember", nftables.ChainHookPostrouting, rememberPriority)
	m.rule(c, "answered flows end here", join(ctState, isNot(ne32(expr.CtStateBitNEW)), accept))
	for _, u := range m.uplinks {
		m.rule(c, "a source from outside may be spoofed", join(
			isUDP, u.leaves(), m.outside(iifname, false), inZone, m.exempt.hasNot(destination(0)), goTo(u.ours(foreign))))
	}
	m.rule(c, "its source may be spoofed", join(isUDP, m.outside(iifname, true), inZone, goTo(inbound)))
	if m.hairpin != nil {
		m.rememberHairpins(c, foreign)
	}
	m.rule(c, "", join(isUDP, m.outside(oifname, true), inZone, goTo(foreign)))
}

// ours returns the chain that does so for flows from inside that leave by the link.
func (u *uplink) ours(foreign *nftables.Chain) *nftables.Chain {
	c := u.regular("ours")
	u.rule(c, "only its own flows refresh a mapping", join(
		u.flowEndpoint(), u.subnets.hasAt(hostWord), find(u.mappings, linkWord, valueAt),
		destination(remoteWord), transport(2, remotePortWord), hasNot(u.taken, extPortWord),
		nobody(valueAt), put(u.mappings, opUpdate, linkWord, valueAt, u.Lifetime),
		nobody(ownedWord), put(u.owned, opUpdate, extWord, ownedWord, u.Lifetime+ownedLonger), accept))
	u.rule(c, "from a host without mappings", join(u.subnets.hasNot(original(expr.CtKeySRCIP, 0)), goTo(foreign)))
	u.rule(c, "it was left to the rules of others", join(u.flowEndpoint(), find(u.mappings, linkWord, valueAt), goTo(foreign)))

	u.rule(c, "nobody translated it", join(ctStatus, masked(ctSrcNAT), is(ne32(0)), goTo(foreign)))
	u.rule(c, "", join(original(expr.CtKeyPROTOSRC, 0), is(be16(0)), goTo(foreign)))
	u.rule(c, "an older flow than its address", join(reply(expr.CtKeyDSTIP, 0), has(u.gone, 0), accept))
	u.rule(c, "a second outside address of the link", join(
		u.link(), reply(expr.CtKeyDSTIP, hostWord), hasNot(u.translated, linkWord),
		nobody(hostWord), find(u.addresses, linkWord, valueAt), put(u.translated, opAdd, linkWord, 0, 0)))
	u.rule(c, "", join(u.link(), reply(expr.CtKeyDSTIP, hostWord), put(u.translated, opUpdate, linkWord, 0, addressTimeout+ownedLonger)))
	address := join(nobody(valueAt), reply(expr.CtKeyDSTIP, extWord), put(u.addresses, opAdd, linkWord, valueAt, addressTimeout))
	u.rule(c, "", join(u.link(), nobody(hostWord), address))
	own := u.own(u.regular("own"), u.flowEndpoint(), foreign)
	u.rule(c, "", join(reply(expr.CtKeyPROTODST, 0), has(u.served, 0), goTo(foreign)))
	u.rule(c, "it was moved to the pool, or would have been: no word on its address", join(
		u.link(), original(expr.CtKeySRCIP, hostWord), find(u.movers, linkWord, valueAt), goTo(own)))
	u.rule(c, "", join(u.link(), original(expr.CtKeySRCIP, hostWord), address))
	u.rule(c, "", goTo(own))
	return c
}

// own makes c the chain that makes the flow the owner of its outside endpoint, unless
// another one is. endpoint loads its inside endpoint.
func (m *mapper) own(c *nftables.Chain, endpoint piece, foreign *nftables.Chain) *nftables.Chain {
	ext := join(nobody(valueAt), reply(expr.CtKeyDSTIP, extWord), reply(expr.CtKeyPROTODST, extPortWord))
	m.rule(c, "the first one owns the outside endpoint", join(
		endpoint, nobody(ownedWord), ext, put(m.owned, opAdd, extWord, ownedWord, m.Lifetime+ownedLonger)))
	m.rule(c, "the owner has the mapping, whoever that is", join(
		ext, find(m.owned, extWord, ownedWord), put(m.mappings, opAdd, linkWord, valueAt, m.Lifetime)))
	m.rule(c, "", join(endpoint, find(m.mappings, linkWord, valueAt), accept))
	m.rule(c, "another one owns it", goTo(foreign))
	return c
}

// takeInbound remembers a flow from outside by its first packet, as it came.
func (m *mapper) takeInbound() piece {
	return join(original(expr.CtKeyPROTODST, 0), original(expr.CtKeySRCIP, 1), original(expr.CtKeyPROTOSRC, 2),
		put(m.taken, opUpdate, 0, 0, max(takenTimeout, m.TakenFor)))
}

// arrivals remembers flows to the gateway itself. Those of a port that it serves
// are in nobody's way.
func (m *mapper) arrivals() {
	c := m.filter("arrivals", nftables.ChainHookInput, arrivalsPriority)
	m.rule(c, "", join(ctState, isNot(ne32(expr.CtStateBitNEW)), accept))
	m.rule(c, "", join(notUDP, accept))
	m.rule(c, "", join(original(expr.CtKeyPROTODST, 0), has(m.served, 0), accept))
	m.rule(c, "its answers take the port", join(m.outside(iifname, true), m.takeInbound(), accept))
	if m.hairpin != nil {
		m.rule(c, "the same, of a host that there is hairpinning for", join(m.hairpin.has(source(0)), m.takeInbound()))
	}
}
