package userrules

import (
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// asked returns the lookups of a rule that UDP packets may reach, each with the purposes
// for which the elements of the set matter. They matter if part of the key may be known. A
// set of peer addresses, say, may be long, and its elements only tell whom a forward is
// for. describe returns a set without its elements.
func asked(r *rule, family byte, describe func(name string) *set) (all []lookup) {
	looksUp := func(s statement) bool { _, is := s.expr.(*expr.Lookup); return is }
	if !slices.ContainsFunc(r.statements, looksUp) {
		return nil // like most rules
	}
	packets := knownPackets(family)
	for _, s := range r.statements {
		switch e := s.expr.(type) {
		case *expr.Lookup:
			all = append(all, askedBy(r, e, describe(e.SetName), packets))
			if e.DestRegister != unix.NFT_REG_VERDICT && e.IsDestRegSet {
				for _, p := range packets {
					p.fields.put(e.DestRegister, nil)
					p.regs.put(e.DestRegister, unknownBytes(16, nil))
					p.sure.put(e.DestRegister, unknownBytes(16, nil))
				}
			}
		case *expr.Cmp:
			packets = slices.DeleteFunc(packets, func(p *knownPacket) bool { return p.sure.compare(e) == never })
			if len(packets) == 0 {
				return all // the rule is for another protocol
			}
		default:
			for _, p := range packets {
				p.load(s.expr)
			}
		}
	}
	return all
}

// askedBy returns one lookup.
func askedBy(r *rule, e *expr.Lookup, s *set, packets []*knownPacket) lookup {
	l := lookup{set: e.SetName, verdicts: e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT}
	if l.verdicts || s.failed != nil {
		l.asks = anyPurpose
		return l
	}
	translates := func(s statement) bool { return s.translatesSource() }
	l.values = e.IsDestRegSet && !s.changing && slices.ContainsFunc(r.statements, translates)
	if !s.named {
		l.asks = forSources | forVerdicts | forHelpers
	}
	for _, p := range packets {
		fields := p.fields.get(e.SourceRegister, s.size)
		if slices.ContainsFunc(fields, field.isAsked) || !s.named && slices.ContainsFunc(fields, field.isSource) {
			l.asks |= forDestinations | forVerdicts | forHelpers
		}
		hosts := slices.ContainsFunc(fields, field.isSource)
		l.sources = l.sources || s.fixed() && hosts
		l.spares = l.spares || hosts && r.spares(e, s)
		if slices.ContainsFunc(p.regs.get(e.SourceRegister, s.size), func(c cell) bool { return c.known != 0 }) {
			l.asks |= p.why
		}
	}
	return l
}

// A knownPacket is a packet of which everything is known that any question may know of its
// packets.
type knownPacket struct {
	why    purposes
	packet *child
	regs   cells     // what is known of the registers' bytes
	sure   cells     // what holds for all UDP packets of the family
	fields registers // the fields that the registers hold
}

func knownPackets(family byte) (all []*knownPacket) {
	for _, subnet := range []netip.Prefix{
		netip.PrefixFrom(netip.IPv4Unspecified(), 32), netip.PrefixFrom(netip.IPv6Unspecified(), 128),
	} {
		if f := familyOf(subnet); f == family || family == unix.NFPROTO_INET {
			all = append(all, &knownPacket{why: forVerdicts, packet: newChild(false, &Link{}, &Link{}, nil, subnet, nil)})
		}
	}
	if family != unix.NFPROTO_IPV6 {
		all = append(all, &knownPacket{why: forSources, packet: translated(&Link{}, nil, nil)})
	}
	for _, p := range all {
		p.regs.forget(unix.NFT_REG_1)
		p.sure.forget(unix.NFT_REG_1)
	}
	return all
}

// load updates the registers with what a statement loads.
func (p *knownPacket) load(e expr.Any) {
	p.fields.load(e, p.packet.family)
	p.packet.load(&p.regs, e)
	udp := knownBytes([]byte{unix.IPPROTO_UDP})
	switch e := e.(type) {
	case *expr.Meta:
		switch {
		case e.SourceRegister:
		case e.Key == expr.MetaKeyL4PROTO, e.Key == expr.MetaKeyNFPROTO, e.Key == expr.MetaKeyPROTOCOL:
			p.sure.put(e.Register, p.packet.meta(e.Key))
		default:
			p.sure.put(e.Register, unknownBytes(16, nil))
		}
	case *expr.Payload:
		if e.Base == expr.PayloadBaseNetworkHeader && p.packet.family == unix.NFPROTO_IPV4 && e.Offset == 9 && e.Len == 1 {
			p.sure.put(e.DestRegister, udp)
		} else if e.OperationType == expr.PayloadLoad {
			p.sure.forget(e.DestRegister)
		}
	case *expr.Bitwise:
		p.sure.bitwise(e)
	default:
		p.sure.forget(unix.NFT_REG_1)
	}
}
