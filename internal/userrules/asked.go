package userrules

import (
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// asked returns the lookups of a rule, as far as UDP packets get to them, each with what
// the elements of the set matter for. They do where something may be known of the key: a
// set of the addresses of peers, say, may be long, and its elements tell nothing. describe
// returns a set without its elements.
func asked(r *rule, family byte, describe func(name string) *set) (all []lookup) {
	var sure cells // of all UDP packets
	packets := knownPackets(family)
	sure.forget(unix.NFT_REG_1)
	for _, s := range r.statements {
		switch e := s.expr.(type) {
		case *expr.Lookup:
			all = append(all, askedBy(e, describe(e.SetName), packets))
			if e.DestRegister != unix.NFT_REG_VERDICT && e.IsDestRegSet {
				sure.put(e.DestRegister, unknownBytes(16, nil))
				for _, p := range packets {
					p.fields.put(e.DestRegister, nil)
					p.regs.put(e.DestRegister, unknownBytes(16, nil))
				}
			}
		case *expr.Cmp:
			if sure.compare(e) == never {
				return all // it is for another protocol
			}
		default:
			loadSure(&sure, s.expr, family)
			for _, p := range packets {
				p.fields.load(s.expr, p.packet.family)
				p.packet.load(&p.regs, s.expr)
			}
		}
	}
	return all
}

// askedBy returns one lookup.
func askedBy(e *expr.Lookup, s *set, packets []*knownPacket) lookup {
	l := lookup{set: e.SetName, verdicts: e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT}
	if l.verdicts || s.failed != nil {
		l.asks = anyPurpose
		return l
	}
	if !s.named {
		l.asks = forSources | forVerdicts
	}
	for _, p := range packets {
		fields := p.fields.get(e.SourceRegister, s.size)
		if slices.ContainsFunc(fields, field.isAsked) || !s.named && slices.ContainsFunc(fields, field.isSource) {
			l.asks |= forDestinations
		}
		if slices.ContainsFunc(p.regs.get(e.SourceRegister, s.size), func(c cell) bool { return c.known != 0 }) {
			l.asks |= forSources | forVerdicts
		}
	}
	return l
}

// A knownPacket is one of which all is known that may be known of any that a question is
// about.
type knownPacket struct {
	packet *child
	regs   cells     // what is known of their bytes
	fields registers // what they hold
}

func knownPackets(family byte) (all []*knownPacket) {
	for _, subnet := range []netip.Prefix{
		netip.PrefixFrom(netip.IPv4Unspecified(), 32), netip.PrefixFrom(netip.IPv6Unspecified(), 128),
	} {
		if f := familyOf(subnet); f == family || family == unix.NFPROTO_INET {
			p := &knownPacket{packet: newChild(false, &Link{}, &Link{}, nil, subnet, nil)}
			p.regs.forget(unix.NFT_REG_1)
			all = append(all, p)
		}
	}
	return all
}

// loadSure puts into registers what is true of all UDP packets.
func loadSure(regs *cells, e expr.Any, family byte) {
	udp := knownBytes([]byte{unix.IPPROTO_UDP})
	switch e := e.(type) {
	case *expr.Meta:
		switch {
		case e.SourceRegister:
		case e.Key == expr.MetaKeyL4PROTO:
			regs.put(e.Register, udp)
		default:
			regs.put(e.Register, unknownBytes(16, nil))
		}
	case *expr.Payload:
		if e.Base == expr.PayloadBaseNetworkHeader && family == unix.NFPROTO_IPV4 && e.Offset == 9 && e.Len == 1 {
			regs.put(e.DestRegister, udp)
		} else if e.OperationType == expr.PayloadLoad {
			regs.forget(e.DestRegister)
		}
	case *expr.Bitwise:
		regs.bitwise(e)
	default:
		regs.forget(unix.NFT_REG_1)
	}
}
