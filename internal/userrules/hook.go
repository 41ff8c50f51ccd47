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

// Children says what the chains of the prerouting and forward hooks do with the first packet of a flow from
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
	q := childQuery{peers: peers, outside: outside, subnets: subnets}
	if err := rs.prepare(&q, inside); err != nil {
		return nil, err
	}
	answers := make([]ChildVerdicts, len(subnets))
	for i, s := range subnets {
		var err error
		if answers[i], err = q.answer(i); err != nil {
			return nil, err
		}
		if rs.mayDropAll(s) {
			answers[i].mayDropAll()
		}
	}
	return answers, nil
}

// prepare completes the query, of which chains, sources and the links inside are still missing.
func (rs *Ruleset) prepare(q *childQuery, inside []Link) (err error) {
	if q.chains, err = rs.path(q.subnets); err != nil {
		return err
	}
	q.inside = make([]*Link, len(q.subnets))
	if slices.ContainsFunc(q.chains, func(b baseChain) bool { return b.hook == unix.NF_INET_PRE_ROUTING }) && !rs.SourcesMayBeHidden() {
		q.sources, q.exempt = rs.sourceNAT()
	}
	for i := range inside {
		if l := &inside[i]; l.Name != "" && !slices.ContainsFunc(q.outside, func(o Link) bool { return o.Index == l.Index }) {
			q.inside[i] = l
		}
	}
	return nil
}

// Stranger says what the chains of the prerouting and forward hooks do with the first packet of a flow from one
// endpoint, whose port is 0 for any, by one of the links outside, nil for any, to another one by
// the link inside. The packet arrives for the endpoint at: if that is not the same, a forward of the
// user's leads it there; otherwise nobody translates it. No expectation admits it. A link without a
// name is unknown. dropper is the chain that drops it, as in ChildVerdicts. Errors and hidden
// rules are as for Children.
func (rs *Ruleset) Stranger(outside []Link, inside Link, from, at, to netip.AddrPort) (a Answer, dropper Dropper, err error) {
	host := netip.PrefixFrom(to.Addr(), to.Addr().BitLen())
	chains, err := rs.path([]netip.Prefix{host})
	if err != nil {
		return Unknown, dropper, err
	}
	var out *Link
	if inside.Name != "" {
		out = &inside
	}
	for i, in := range linksOrAny(outside) {
		x, by, err := hookAnswer(chains, strangerStages(newStranger(in, out, outside, from, to), in, at, to), false)
		if err != nil {
			return Unknown, Dropper{}, err
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

// path returns the chains of the prerouting and forward hooks for packets to any of the
// subnets, in the order in which packets meet them.
func (rs *Ruleset) path(subnets []netip.Prefix) (chains []baseChain, err error) {
	for _, t := range rs.tables {
		t = t.settled()
		if !slices.ContainsFunc(subnets, func(s netip.Prefix) bool { return t.has(familyOf(s)) }) {
			continue
		}
		if t.refused && t.name != natTable {
			return nil, t.failed
		}
		for _, b := range append(t.of(unix.NF_INET_PRE_ROUTING, ""), t.of(unix.NF_INET_FORWARD, "")...) {
			if t.torn && b.kind != natKind {
				return nil, fmt.Errorf("read nftables table %s: %w", t.title, nfnl.ErrInterrupted)
			}
			chains = append(chains, baseChain{t, b})
		}
	}
	slices.SortStableFunc(chains, func(a, b baseChain) int {
		return cmp.Or(cmp.Compare(a.hook, b.hook), cmp.Compare(a.hookPriority(), b.hookPriority()), cmp.Compare(a.priority, b.priority))
	})
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

// A childQuery asks what becomes of children of some subnets.
type childQuery struct {
	chains  []baseChain
	peers   netip.Prefix // invalid for any
	outside []Link
	inside  []*Link // the links that lead to subnets, nil for an unknown one
	subnets []netip.Prefix
	// What rules do to sources, as Ruleset.sourceNAT returns it.
	sources, exempt []SourceNAT
}

// answer answers for one of the subnets.
func (q *childQuery) answer(subnet int) (a ChildVerdicts, err error) {
	for n, in := range linksOrAny(q.outside) {
		v, err := q.verdicts(in, subnet)
		if err != nil {
			return a, err
		}
		if n == 0 {
			a = v
		} else {
			a.DNATed, a.Related = both(a.DNATed, v.DNATed), both(a.Related, v.Related)
			a.MostDNATed, a.MostRelated = both(a.MostDNATed, v.MostDNATed), both(a.MostRelated, v.MostRelated)
		}
	}
	if a.MostDNATed != Dropped {
		a.DNATedBy = Dropper{}
	}
	if a.MostRelated != Dropped {
		a.RelatedBy = Dropper{}
	}
	return a, nil
}

// verdicts answers for both kinds of children that come by a link to a subnet.
func (q *childQuery) verdicts(in *Link, subnet int) (v ChildVerdicts, err error) {
	to := q.subnets[subnet]
	outside, own := outsideAddr(q.sources, q.exempt, in, to)
	for _, kind := range []struct {
		related   bool
		all, most *Answer
		by        *Dropper
	}{{true, &v.Related, &v.MostRelated, &v.RelatedBy}, {false, &v.DNATed, &v.MostDNATed, &v.DNATedBy}} {
		packets := func() stages {
			c := newChild(kind.related, in, q.inside[subnet], q.outside, to, q.subnets)
			if q.peers.IsValid() {
				copy(c.source(), inPrefix(q.peers))
			}
			return stagesOf(c, outside, own)
		}
		if *kind.all, *kind.by, err = hookAnswer(q.chains, packets(), false); err != nil {
			return v, err
		}
		if *kind.most = *kind.all; *kind.all == Unknown {
			if *kind.most, *kind.by, err = hookAnswer(q.chains, packets(), true); err != nil {
				return v, err
			}
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
func hookAnswer(chains []baseChain, packets stages, most bool) (Answer, Dropper, error) {
	answer := Accepted
	for _, c := range chains {
		if !c.has(packets.forwarded.family) {
			continue
		}
		seen, place := packets.at(c.base)
		var f fates
		for _, p := range seen {
			one, err := c.fates(p, most)
			if err != nil {
				return Unknown, Dropper{}, fmt.Errorf("read nftables table %s: %w", c.title, nfnl.Permitted(err))
			}
			f |= one
		}
		switch f {
		case 0, accepts:
		case drops:
			return Dropped, Dropper{c.title + " " + c.base.name, place}, nil
		default:
			answer = Unknown
		}
	}
	return answer, Dropper{}, nil
}

// fates returns the possible fates of packets in a base chain, whose policy is the last rule.
func (b baseChain) fates(packets *child, most bool) (fates, error) {
	w := hookWalk{table: b.table, child: packets, most: most, known: map[string]fates{}}
	f, err := w.chain(b.base.name)
	if f&returns != 0 {
		if f &^= returns; b.drops {
			f |= drops
		} else {
			f |= accepts
		}
	}
	if f&translates != 0 { // packets that a forward takes are no children
		if f &^= translates; f == 0 {
			f = accepts
		}
	}
	if b.kind == natKind && packets.mayBeTranslated() {
		f |= accepts
	}
	return f, err
}
