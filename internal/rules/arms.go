//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"slices"

	"github.com/google/nftables"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// An outside link may lead inside, too (Desired.OneArmed): then a packet is from inside if
// its source is in a subnet and its flow is not one that unsure remembers.

// armsSet has the links of arms, if there are several.
const armsSet = "one_armed"

// arms returns those of OneArmed that are outside links for IPv4, in the order of rules.
func (d *Desired) arms() []string {
	arms := slices.DeleteFunc(slices.Sorted(slices.Values(d.OneArmed)), func(name string) bool { return !slices.Contains(d.outside4(), name) })
	return slices.Compact(arms)
}

// outside4 returns the outside links for IPv4.
func (d *Desired) outside4() []string {
	return slices.DeleteFunc(slices.Clone(d.OutsideLinks), func(name string) bool { return slices.Contains(d.Not4, name) })
}

// surelyOutside matches packets that came by an outside link by which no host of a subnet
// comes, if there is such a link.
func (l *layout) surelyOutside(d Desired) (test exprs, any bool) {
	test = l.outside(iifname, true)
	arms := d.arms()
	switch len(arms) {
	case 0:
	case 1:
		test = join(test, iifname.isNot(nfnl.LinkKey(arms[0])))
	default:
		test = join(test, iifname.notIn(l.linkSet(armsSet, arms)))
	}
	return test, len(arms) == 0 || len(arms) < len(l.links)
}

// applyByArm adds the rules of apply for what came by such a link.
func (m *mapper) applyByArm(c *nftables.Chain, plain exprs) {
	for _, arm := range m.arms {
		by := join(isUDP, iifname.is(nfnl.LinkKey(arm)))
		m.rule(c, "a source from outside may be spoofed", by, m.isUnsure(), accept)
		for _, u := range m.uplinks {
			m.rule(c, "", by, u.leavesBy(), m.inZone0, m.exempt.hasNot(ipDaddr), plain, goTo(u.mapped))
		}
	}
}

// rememberByArm adds the rules of remember for what came by a link that leads to both
// sides. What is not from inside goes to inbound.
func (m *mapper) rememberByArm(c, inbound *nftables.Chain) {
	if len(m.arms) == 0 {
		return
	}
	m.rule(inbound, "it goes out again", isUDP, m.outside(oifname, true), goTo(m.foreign))
	arm := m.regular("arm")
	for _, name := range m.arms {
		m.rule(c, "", isUDP, iifname.is(nfnl.LinkKey(name)), m.inZone0, goTo(arm))
	}
	m.rule(arm, "it comes from outside", isUDP, m.subnets.hasNot(ctOriginalIPSaddr), goTo(inbound))
	m.rule(arm, "its source may be spoofed", m.isUnsure(), goTo(inbound))
	for _, u := range m.uplinks {
		m.rule(arm, "", isUDP, u.leavesBy(), m.exempt.hasNot(ipDaddr), goTo(u.ours))
	}
	m.rule(arm, "", isUDP, goTo(inbound))
}
