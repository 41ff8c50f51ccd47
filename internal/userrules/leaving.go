package userrules

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Leaving is the first packet of a UDP flow from one host to another, as the
// NAT chains of the postrouting hook see it.
type Leaving struct {
	Src, Dst netip.AddrPort
	Out      Link
}

// Sources are what rules may make of the source of a packet, all taken together where the
// result depends on something that is not known of it.
type Sources struct {
	Addrs      cone.AddrRanges // fixed addresses
	Masquerade bool            // or an address of the link by which it leaves
	Kept       bool            // or the source that it has
}

// SourcesOf returns what the rules may make of the source of a packet. known is false if there
// may be something else, because rules are not understood, may be missing or may drop the packet.
func (rs *Ruleset) SourcesOf(p Leaving) (n Sources, known bool) {
	family, legacy := byte(unix.NFPROTO_IPV4), legacy4
	if p.Src.Addr().Is6() {
		family, legacy = unix.NFPROTO_IPV6, legacy6
	}
	if rs.hides(legacy, natTable) {
		return n, false
	}
	var chains []baseChain
	for _, t := range rs.tables {
		if t.torn && t.has(family) || t.failed != nil && t.name == natTable && t.family == family {
			return n, false
		}
		for _, b := range t.of(unix.NF_INET_POST_ROUTING, natKind) {
			if t.has(family) {
				chains = append(chains, baseChain{t, b})
			}
		}
	}
	slices.SortStableFunc(chains, func(a, b baseChain) int { return cmp.Compare(a.priority, b.priority) })
	packet, known := p.packet(), true
	n.Kept = true
	var at int32 // the priority of the chain that surely translates
	for _, c := range chains {
		if !n.Kept && c.priority != at {
			break // the first chain that translates ends it; of two at one priority that is unknown
		}
		w := hookWalk{table: c.table, child: packet, known: map[string]fates{}}
		w.translator = func(r *rule, regs *cells) {
			one := c.table.sourceNAT(r)
			if addr, is := r.sourceIn(regs, len(packet.source())); is {
				one.Addrs, one.Unknown = cone.AddrRanges{addr}, false
			}
			n.Addrs = append(n.Addrs, one.Addrs...)
			n.Masquerade, known = n.Masquerade || one.Masquerade, known && !one.Unknown
		}
		f, err := w.chain(c.base.name)
		if err != nil || c.drops || f&drops != 0 {
			return n, false
		}
		if f == translates {
			n.Kept, at = false, c.priority
		}
	}
	return n, known
}

// sourceIn returns the addresses of this size that a statement of nftables translates to, as the registers
// have them: those that a map has for the packet, say.
func (r *rule) sourceIn(regs *cells, size int) (a cone.AddrRange, known bool) {
	for _, s := range r.statements {
		if e, is := s.expr.(*expr.NAT); is && s.translatesSource() && e.RegAddrMin != 0 {
			a.First = knownAddr(regs.get(e.RegAddrMin, size))
			if a.Last = a.First; e.RegAddrMax != 0 {
				a.Last = knownAddr(regs.get(e.RegAddrMax, size))
			}
		}
	}
	return a, a.First.IsValid() && a.Last.IsValid()
}

// knownAddr returns the address in cells, or an invalid one if it is not wholly known.
func knownAddr(cells []cell) (a netip.Addr) {
	b := make([]byte, len(cells))
	for i, c := range cells {
		if b[i] = c.val; c.known != 0xff {
			return a
		}
	}
	a, _ = netip.AddrFromSlice(b)
	return a
}

// SameSources reports whether the rules that SourcesOf follows are those of o. It may be false
// if something else changed in their tables.
func (rs *Ruleset) SameSources(o *Ruleset) bool {
	return rs == o || rs != nil && o != nil && slices.Equal(rs.sourceTables(unix.NFPROTO_IPV4), o.sourceTables(unix.NFPROTO_IPV4)) &&
		slices.Equal(rs.sourceTables(unix.NFPROTO_IPV6), o.sourceTables(unix.NFPROTO_IPV6))
}

// packet returns the packet p in the form that a hookWalk takes.
func (p Leaving) packet() *child {
	port := func(n uint16) []cell { return knownBytes([]byte{byte(n >> 8), byte(n)}) }
	c := translated(&p.Out, nil, nil)
	if p.Src.Addr().Is6() {
		c.family = unix.NFPROTO_IPV6
		c.network = slices.Concat(unknownBytes(6, nil), knownBytes([]byte{unix.IPPROTO_UDP}), unknownBytes(1, nil),
			knownBytes(p.Src.Addr().AsSlice()), knownBytes(p.Dst.Addr().AsSlice()))
	} else {
		copy(c.network[12:], knownBytes(p.Src.Addr().AsSlice()))
		copy(c.network[16:], knownBytes(p.Dst.Addr().AsSlice()))
	}
	c.transport = slices.Concat(port(p.Src.Port()), port(p.Dst.Port()))
	return c
}
