package rules

import (
	"slices"

	"github.com/google/nftables"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// An outside link may also lead inside (Desired.OneArmed). On such a link a packet is from
// inside if its source is in a subnet and unsure does not remember its flow.

// armsSet has the names of the arms, if there is more than one.
const armsSet = "one_armed"

// arms returns the links of OneArmed that are outside links for IPv4, sorted.
func (d *Desired) arms() []string {
	arms := slices.DeleteFunc(slices.Sorted(slices.Values(d.OneArmed)), func(name string) bool { return !slices.Contains(d.outside4(), name) })
	return slices.Compact(arms)
}

// outside4 returns the outside links for IPv4.
func (d *Desired) outside4() []string {
	return slices.DeleteFunc(slices.Clone(d.OutsideLinks), func(name string) bool { return slices.Contains(d.Not4, name) })
}

// surelyOutside matches packets that came by an outside link through which no host of a
// subnet comes. any is false if there is no such link.
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

// applyByArm adds the rules of apply for packets that came by an arm.
func (m *mapper) applyByArm(c *nftables.Chain, plain exprs) {
	for _, arm := range m.arms {
		by := join(isUDP, iifname.is(nfnl.LinkKey(arm)))
		m.rule(c, "a source from outside may be spoofed", by, m.isUnsure(), accept)
		for _, u := range m.uplinks {
			m.rule(c, "", by, u.leavesBy(), m.inZone0, m.exempt.hasNot(ipDaddr), plain, goTo(u.mapped))
		}
	}
}

// rememberByArm adds the rules of remember for packets that came by a link that leads both
// inside and outside. Packets that are not from inside go to inbound.
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
