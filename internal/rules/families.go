package rules

import (
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// An ipFamily is one of the two families that family inet combines.
type ipFamily struct {
	name         string
	is           exprs // matches packets of the family
	addr         nftables.SetDatatype
	saddr, daddr operand
	opener       operand // the source of the flow's original direction
	answerer     operand // the source of its reply direction
	answered     operand // the destination of its reply direction
	// The key of a permission, as an expected child has it: peer . outside address .
	// outside port. Zones share a cap.
	key  operand
	icmp byte
	size int // bytes of an address
}

var ipFamilies = []*ipFamily{
	{
		name: "4", is: metaNfproto.is([]byte{unix.NFPROTO_IPV4}), addr: nftables.TypeIPAddr,
		saddr: ipSaddr, daddr: ipDaddr, opener: ctOriginalIPSaddr, answerer: ctReplyIPSaddr, answered: ctReplyIPDaddr,
		key:  concat(ctOriginalIPSaddr, ctOriginalIPDaddr, ctOriginalProtoDst),
		icmp: unix.IPPROTO_ICMP, size: net.IPv4len,
	},
	{
		name: "6", is: metaNfproto.is([]byte{unix.NFPROTO_IPV6}), addr: nftables.TypeIP6Addr,
		saddr: ip6Saddr, daddr: ip6Daddr, opener: ctOriginalIP6Saddr, answerer: ctReplyIP6Saddr, answered: ctReplyIP6Daddr,
		key:  concat(ctOriginalIP6Saddr, ctOriginalIP6Daddr, ctOriginalProtoDst),
		icmp: unix.IPPROTO_ICMPV6, size: net.IPv6len,
	},
}

// of returns the prefixes of the family.
func (f *ipFamily) of(prefixes []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool { return p.Addr().BitLen() != 8*f.size })
}

// familiesOf returns the families of prefixes.
func familiesOf(prefixes []netip.Prefix) []*ipFamily {
	return slices.DeleteFunc(slices.Clone(ipFamilies), func(f *ipFamily) bool { return len(f.of(prefixes)) == 0 })
}

// onlyOf matches packets of the families. It is empty if these are all families.
func onlyOf(families []*ipFamily) exprs {
	if len(families) == 1 {
		return families[0].is
	}
	return nil
}

// saddrIn matches if the source of the packet is in p, and daddrIn if its destination is, in a
// rule of family inet. saddrIn is for all packets: it tests the address before the family, which
// excludes more of them, and word by word, because the kernel is quickest with single words
// (nft_payload_fast_eval, nft_cmp_fast_eval).
func saddrIn(p netip.Prefix) (test exprs) {
	f := familyOf(p)
	addr, field := p.Masked().Addr().AsSlice(), *f.saddr.load(0)[0].(*expr.Payload)
	for i := range (p.Bits() + 31) / 32 {
		word := one(1, func(r uint32) expr.Any {
			part := field
			part.DestRegister, part.Len = r, 4
			part.Offset += uint32(4 * i)
			return &part
		})
		if bits := p.Bits() - 32*i; bits < 32 {
			word = word.and(net.CIDRMask(bits, 32))
		}
		test = append(test, word.compare(expr.CmpOpEq, addr[4*i:][:4])...)
	}
	return join(test, f.is)
}

func daddrIn(p netip.Prefix) exprs {
	f := familyOf(p)
	return join(f.is, f.daddr.inPrefix(p, true))
}

func familyOf(p netip.Prefix) *ipFamily {
	if p.Addr().Is6() {
		return ipFamilies[1]
	}
	return ipFamilies[0]
}
