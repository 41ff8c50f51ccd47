package userrules

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// Uplinks returns the names of the links that lead outside according to the rules: packets
// that leave by them from another link get another source, and packets that leave by some
// other link do not. A rule for all links says nothing about any of them. Rules for a few
// destinations (hairpin) do not count, nor do rules of iptables-legacy that only root can
// see.
func (rs *Ruleset) Uplinks(links []LAN) ([]string, error) {
	names, _, err := rs.uplinks(links)
	return names, err
}

// NamedUplinks returns those Uplinks that the rules name. It returns none if the rules name
// the inside instead, as "ip saddr LAN masquerade" does: then any other link would count as
// an uplink, though it need not lead outside.
func (rs *Ruleset) NamedUplinks(links []LAN) ([]string, error) {
	names, others, err := rs.uplinks(links)
	if others {
		names = nil
	}
	return names, err
}

// uplinks returns the names. others says that a link that no rule knows would be one of
// them.
func (rs *Ruleset) uplinks(links []LAN) (names []string, others bool, err error) {
	if len(links) == 0 {
		return nil, false, nil
	}
	var chains []baseChain
	for _, t := range rs.sourceTables(unix.NFPROTO_IPV4) {
		for _, b := range t.of(unix.NF_INET_POST_ROUTING, natKind) {
			chains = append(chains, baseChain{t, b})
		}
	}
	// No link can have this name: packets that leave by it match only rules for all links.
	differ := false
	for _, l := range append(slices.Clip(links), LAN{Link: Link{Name: "/"}}) {
		translated, err := translatesBy(chains, l, links)
		if err != nil {
			return nil, false, err
		}
		if translated {
			names = append(names, l.Name)
		} else {
			differ = true
		}
	}
	if !differ {
		return nil, false, nil
	}
	isOther := func(name string) bool { return name == "/" }
	return slices.DeleteFunc(slices.Clone(names), isOther), slices.ContainsFunc(names, isOther), nil
}

// translatesBy reports whether chains translate the source of UDP packets from the networks
// of the other links that leave by the link out. If a rule tests something that is not
// known, it is enough that some packets may be translated.
func translatesBy(chains []baseChain, out LAN, links []LAN) (bool, error) {
	var from []netip.Prefix
	for _, l := range links {
		if l.Name != out.Name {
			from = append(from, l.Networks...)
		}
	}
	source := &origin{even: true}
	if len(from) > 0 {
		source = &origin{other: func(low, high []byte) bool { return !overlapsAny(from, low, high) }}
	}
	packets := translated(&out.Link, []Link{out.Link}, source)
	for _, c := range chains {
		w := hookWalk{table: c.table, child: packets, most: true, known: map[string]fates{}}
		f, err := w.chain(c.base.name)
		if err != nil {
			return false, fmt.Errorf("read nftables table %s: %w", c.title, err)
		}
		if f&translates != 0 {
			return true, nil
		}
	}
	return false, nil
}

// translated returns the packets from a source that leave by a link, as the NAT chains of
// the postrouting hook see them. They did not come by a link of notFrom.
func translated(out *Link, notFrom []Link, source *origin) *child {
	return &child{
		state:       expr.CtStateBitNEW,
		knownStatus: statusExpected | statusSeenReply | statusAssured | statusConfirmed | statusDstNAT,
		family:      unix.NFPROTO_IPV4,
		transport:   slices.Concat(unknownBytes(2, &origin{even: true}), unknownBytes(2, &origin{even: true})),
		network: slices.Concat(unknownBytes(9, nil), knownBytes([]byte{unix.IPPROTO_UDP}), unknownBytes(2, nil),
			unknownBytes(4, source), unknownBytes(4, &origin{even: true})),
		in:  oneLink(nil, notFrom),
		out: oneLink(out, nil),
	}
}

// overlapsAny reports whether an address from low to high is in one of the prefixes.
func overlapsAny(prefixes []netip.Prefix, low, high []byte) bool {
	asked := addrRange(filled(low, 4, 0), filled(high, 4, 0xff))
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return cone.RangeOf(p).Overlaps(asked) })
}
