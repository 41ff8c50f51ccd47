package rules

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// Children are counted for each subnet if there are several, since the user's firewall may
// treat them differently.

// countsExpected reports whether the children of expectations are counted for each subnet.
func (d *Desired) countsExpected() bool { return len(d.Helpers) > 0 && len(d.Subnets) > 1 }

// countsAdmitted reports whether the children of the map are. Only their label tells them from
// the flows of the user's own forwards.
func (d *Desired) countsAdmitted() bool {
	return d.Map != nil && !d.Map.noLabels && len(ipFamilies[0].of(d.Subnets)) > 1
}

// into is the name of the counter for one subnet. nft accepts no colon in a name.
func into(counter string, subnet netip.Prefix) string {
	return counter + "_into_" + strings.ReplaceAll(subnet.String(), ":", "_")
}

// countInto adds a chain that counts a packet for the innermost of the subnets that it is sent to.
func (l *layout) countInto(name string, subnets []netip.Prefix) *nftables.Chain {
	c := l.regular(name + "_into")
	subnets = slices.Clone(subnets)
	slices.SortFunc(subnets, func(a, b netip.Prefix) int { return cmp.Or(cmp.Compare(b.Bits(), a.Bits()), a.Compare(b)) })
	for _, p := range subnets {
		l.counters = append(l.counters, into(name, p))
		l.rule(c, "", daddrIn(p), counter(into(name, p)), accept)
	}
	return c
}

// judgeAdmitted drops and counts children of the map alone, in a chain on the forward hook, before
// the user's rules see them. Those that an expectation made RELATED are judged as its children.
func (l *layout) judgeAdmitted(c *nftables.Chain, d Desired) {
	first := join(l.outside(iifname, true), isUDP, ipFamilies[0].is, lacksStatus(ctExpected|ctConfirmed), hasLabel)
	l.rule(c, "", ctState.and(host32(expr.CtStateBitESTABLISHED)).isNot(host32(0)), accept)
	if d.divertsAdmitted() {
		l.counters = append(l.counters, divertedCounter)
		diverted := l.regular("diverted")
		l.divert(diverted, d.Diverted, ipFamilies[:1], true, join(counter(divertedCounter), drop))
		l.rule(c, "the first packet of a child of the map", first, jump(diverted))
	}
	if d.countsAdmitted() {
		l.rule(c, "the first packet of a child of the map", first, goTo(l.countInto(admittedCounter, ipFamilies[0].of(d.Subnets))))
	}
}
