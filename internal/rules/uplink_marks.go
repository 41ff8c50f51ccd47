package rules

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/conenatd/conenatd/internal/nfnl"
)

const (
	// After the user's packet marks (mangle) and after NAT, when the destination is the
	// inside host, and before the packet is routed.
	restorePriority = -50
	// After the user's connmarks, and before learn, which passes the connmark on.
	markPriority = 280
)

// uplinkMarks marks the flows of subnets with the uplink that they leave or come by, and
// copies the mark to their packets from inside before these are routed. A flow or packet
// that already has a mark in these bits keeps it.
//
// Each uplink has its own rules with constants: before Linux 6.13 the kernel cannot copy
// some bits of one mark into another.
func (l *layout) uplinkMarks(m *UplinkMarks, subnets []netip.Prefix) {
	mask, none := host32(m.Mask), host32(0)
	restore := l.filter("restore_uplink", nftables.ChainHookPrerouting, restorePriority)
	mark := l.filter("mark_uplink", nftables.ChainHookPostrouting, markPriority)
	back, came, left := l.regular("back_by_uplink"), l.regular("came_by_uplink"), l.regular("left_by_uplink")
	l.rule(restore, "", notUDP, accept)
	l.rule(mark, "", notUDP, accept)
	l.rule(mark, "it has its mark", ctMark.and(mask).isNot(none), accept)
	for _, f := range familiesOf(subnets) {
		inside := l.inside(f, subnets)
		l.rule(restore, "from inside", f.is, f.saddr.in(inside), goTo(back))
		l.rule(restore, "to the inside, by a forward or a permission", f.is, f.daddr.in(inside), ctMark.and(mask).is(none), goTo(came))
		l.rule(mark, "from inside", f.is, f.daddr.notIn(inside), f.opener.in(inside), goTo(left))
	}
	l.rule(back, "the user's rules chose", metaMark.and(mask).isNot(none), accept)
	for i, name := range m.Links {
		bits, link := m.Mark(i), nfnl.LinkKey(name)
		l.rule(back, "", ctMark.and(mask).is(host32(bits)), setMetaMark(metaMark.or(bits)))
		l.rule(came, "", iifname.is(link), setCt(expr.CtKeyMARK, ctMark.or(bits)))
		l.rule(left, "", oifname.is(link), setCt(expr.CtKeyMARK, ctMark.or(bits)))
	}
}

// inside returns the set of the subnets of a family.
func (l *layout) inside(f *ipFamily, subnets []netip.Prefix) *set {
	return l.addrSet(subnetsSet+f.name, f, subnets)
}
