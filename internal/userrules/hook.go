package userrules

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A baseChain is a base chain with its table.
type baseChain struct {
	*table
	base
}

// Children says what the chains of the forward hook do with the first packet of a flow from
// the links outside, nil for any, to a host of each of the subnets. The answers are in the
// order of the subnets, as are the links inside that lead to them. A link of inside without
// a name, or one that is also outside, counts as unknown, but not as one of outside. The
// answer is Unknown, unless other chains drop, if iptables-legacy may have a filter table
// that only root can see, or has one that is not understood.
//
// An error names the table and chain that could not be read; then there is no answer.
func (rs *Ruleset) Children(outside, inside []Link, subnets []netip.Prefix) ([]ChildVerdicts, error) {
	return rs.ChildrenOf(netip.Prefix{}, outside, inside, subnets)
}

// ChildrenOf answers as Children does, for flows of the peers in one prefix. The prefix is
// invalid for any peer, otherwise of the family of the subnets.
func (rs *Ruleset) ChildrenOf(peers netip.Prefix, outside, inside []Link, subnets []netip.Prefix) ([]ChildVerdicts, error) {
	chains, err := rs.forwardHook(subnets)
	if err != nil {
		return nil, err
	}
	to := make([]*Link, len(subnets))
	for i := range inside {
		if l := &inside[i]; l.Name != "" && !slices.ContainsFunc(outside, func(o Link) bool { return o.Index == l.Index }) {
			to[i] = l
		}
	}
	answers, err := childVerdicts(chains, peers, outside, to, subnets)
	if err != nil {
		return nil, err
	}
	for i, s := range subnets {
		if rs.mayDropAll(s) {
			answers[i].mayDropAll()
		}
	}
	return answers, nil
}

// Stranger says what the chains of the forward hook do with the first packet of a flow from one
// endpoint, whose port is 0 for any, by one of the links outside, nil for any, to another one by
// the link inside. Nobody translates the packet, and no expectation admits it. A link without a
// name is unknown. dropper is the chain that drops it, as in ChildVerdicts. Errors and hidden
// rules are as for Children.
func (rs *Ruleset) Stranger(outside []Link, inside Link, from, to netip.AddrPort) (a Answer, dropper string, err error) {
	host := netip.PrefixFrom(to.Addr(), to.Addr().BitLen())
	chains, err := rs.forwardHook([]netip.Prefix{host})
	if err != nil {
		return Unknown, "", err
	}
	var out *Link
	if inside.Name != "" {
		out = &inside
	}
	for i, in := range linksOrAny(outside) {
		x, by, err := hookAnswer(chains, newStranger(in, out, outside, from, to), false)
		if err != nil {
			return Unknown, "", err
		}
		if i == 0 {
			a, dropper = x, by
		}
		a = both(a, x)
	}
	if a == Accepted && rs.mayDropAll(host) {
		a = Unknown
	}
	return a, dropper, nil
}

// linksOrAny returns the links, or nil for any.
func linksOrAny(links []Link) (all []*Link) {
	for i := range links {
		all = append(all, &links[i])
	}
	if all == nil {
		all = []*Link{nil}
	}
	return all
}

// forwardHook returns the chains of the forward hook for packets to any of the subnets, in
// the order in which packets meet them.
func (rs *Ruleset) forwardHook(subnets []netip.Prefix) (chains []baseChain, err error) {
	for _, t := range rs.tables {
		t = t.settled()
		if !slices.ContainsFunc(subnets, func(s netip.Prefix) bool { return t.has(familyOf(s)) }) {
			continue
		}
		bases := t.of(unix.NF_INET_FORWARD, "")
		switch {
		case t.refused && t.name != natTable:
			return nil, t.failed
		case t.torn && len(bases) > 0:
			return nil, fmt.Errorf("read nftables table %s: %w", t.title, nfnl.ErrInterrupted)
		}
		for _, b := range bases {
			chains = append(chains, baseChain{t, b})
		}
	}
	slices.SortStableFunc(chains, func(a, b baseChain) int { return cmp.Compare(a.priority, b.priority) })
	return chains, nil
}

func familyOf(subnet netip.Prefix) byte {
	if subnet.Addr().Is4() {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

// mayDropAll reports whether iptables-legacy may have a table that filters packets to the
// subnet and of which nothing is known.
func (rs *Ruleset) mayDropAll(subnet netip.Prefix) bool {
	for _, t := range rs.tables {
		if t.legacy != nil && t.failed != nil && t.name != natTable && t.family == familyOf(subnet) {
			return true
		}
	}
	return rs.hides(legacyOf(familyOf(subnet)), filterTable)
}

// mayDropAll turns the answer Accepted into Unknown.
func (v *ChildVerdicts) mayDropAll() {
	for _, a := range []*Answer{&v.DNATed, &v.Related, &v.MostDNATed, &v.MostRelated} {
		if *a == Accepted {
			*a = Unknown
		}
	}
}

// childVerdicts answers for each of the subnets. inside has the links that lead to them,
// nil for an unknown one.
func childVerdicts(chains []baseChain, peers netip.Prefix, outside []Link, inside []*Link, subnets []netip.Prefix) ([]ChildVerdicts, error) {
	from := linksOrAny(outside)
	answers := make([]ChildVerdicts, len(subnets))
	for i, subnet := range subnets {
		for n, in := range from {
			v, err := verdicts(chains, func(related bool) *child {
				c := newChild(related, in, inside[i], outside, subnet, subnets)
				if peers.IsValid() {
					copy(c.source(), inPrefix(peers))
				}
				return c
			})
			if err != nil {
				return nil, err
			}
			if a := &answers[i]; n == 0 {
				*a = v
			} else {
				a.DNATed, a.Related = both(a.DNATed, v.DNATed), both(a.Related, v.Related)
				a.MostDNATed, a.MostRelated = both(a.MostDNATed, v.MostDNATed), both(a.MostRelated, v.MostRelated)
			}
		}
		if a := &answers[i]; a.MostDNATed != Dropped && a.MostRelated != Dropped {
			a.Dropper = ""
		}
	}
	return answers, nil
}

// verdicts answers for both kinds of packets that the function packets returns.
func verdicts(chains []baseChain, packets func(related bool) *child) (v ChildVerdicts, err error) {
	for _, kind := range []struct {
		related   bool
		all, most *Answer
	}{{true, &v.Related, &v.MostRelated}, {false, &v.DNATed, &v.MostDNATed}} {
		var dropper string
		if *kind.all, dropper, err = hookAnswer(chains, packets(kind.related), false); err != nil {
			return v, err
		}
		if *kind.most = *kind.all; *kind.all == Unknown {
			if *kind.most, dropper, err = hookAnswer(chains, packets(kind.related), true); err != nil {
				return v, err
			}
		}
		if *kind.most == Dropped {
			v.Dropper = dropper
		}
	}
	return v, nil
}

func both(a, b Answer) Answer {
	if a != b {
		return Unknown
	}
	return a
}

// hookAnswer takes packets through all chains. An accept ends only one chain.
func hookAnswer(chains []baseChain, packets *child, most bool) (Answer, string, error) {
	answer := Accepted
	for _, c := range chains {
		if !c.has(packets.family) {
			continue
		}
		w := hookWalk{table: c.table, child: packets, most: most, known: map[string]fates{}}
		f, err := w.chain(c.base.name)
		if err != nil {
			return Unknown, "", fmt.Errorf("read nftables table %s: %w", c.title, nfnl.Permitted(err))
		}
		if f&returns != 0 {
			if f &^= returns; c.drops {
				f |= drops
			} else {
				f |= accepts
			}
		}
		switch f {
		case accepts:
		case drops:
			return Dropped, c.title + " " + c.base.name, nil
		default:
			answer = Unknown
		}
	}
	return answer, "", nil
}
