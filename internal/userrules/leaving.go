package userrules

import (
	"cmp"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// A Leaving is the first packet of a UDP flow over IPv4 from one host to another, as the
// NAT chains of the postrouting hook see it.
type Leaving struct {
	Src, Dst netip.AddrPort
	Out      Link
}

// SourceOf returns what the rules translate the source of a packet to. If they leave the
// packet as it is, n has no addresses and is not a masquerade. sure is false if the result
// depends on something that is not known of the packet, or if rules are not understood or
// may be missing.
func (rs *Ruleset) SourceOf(p Leaving) (n SourceNAT, sure bool) {
	if rs.hides(legacy4, natTable) {
		return n, false
	}
	var chains []baseChain
	for _, t := range rs.tables {
		if t.torn && t.has(unix.NFPROTO_IPV4) || t.failed != nil && t.name == natTable && t.family == unix.NFPROTO_IPV4 {
			return n, false
		}
		for _, b := range t.of(unix.NF_INET_POST_ROUTING, natKind) {
			if t.has(unix.NFPROTO_IPV4) {
				chains = append(chains, baseChain{t, b})
			}
		}
	}
	slices.SortStableFunc(chains, func(a, b baseChain) int { return cmp.Compare(a.priority, b.priority) })
	packet, found := p.packet(), false
	var at int32 // the priority of the chain that translates
	for _, c := range chains {
		if found && c.priority != at {
			break // the first chain that translates ends it
		}
		w := hookWalk{table: c.table, child: packet, known: map[string]fates{}}
		w.translator = func(r *rule) {
			one := r.sourceNAT()
			n.Addrs = append(n.Addrs, one.Addrs...)
			n.Masquerade, n.Unknown = n.Masquerade || one.Masquerade, n.Unknown || one.Unknown
		}
		f, err := w.chain(c.base.name)
		switch {
		case err != nil, c.drops, f&drops != 0:
			return n, false
		case f&translates == 0:
		case f == translates && !found: // of two at one priority it is unknown which is first
			found, at = true, c.priority
		default:
			return n, false
		}
	}
	return n, !n.Unknown
}

// packet returns the packet p in the form that a hookWalk takes.
func (p Leaving) packet() *child {
	port := func(n uint16) []cell { return knownBytes([]byte{byte(n >> 8), byte(n)}) }
	c := translated(&p.Out, nil, nil)
	copy(c.network[12:], knownBytes(p.Src.Addr().AsSlice()))
	copy(c.network[16:], knownBytes(p.Dst.Addr().AsSlice()))
	c.transport = slices.Concat(port(p.Src.Port()), port(p.Dst.Port()))
	return c
}
