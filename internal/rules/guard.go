package rules

import (
	"fmt"
	"maps"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// beforeConntrack returns the chain that every packet meets before conntrack. It is one for
// all that must be done there: a second chain costs each packet more than rules do.
func (l *layout) beforeConntrack() *nftables.Chain {
	const name = "before_conntrack"
	if i := slices.IndexFunc(l.chains, func(c *nftables.Chain) bool { return c.Name == name }); i >= 0 {
		return l.chains[i]
	}
	return l.filter(name, nftables.ChainHookPrerouting, rawPriority)
}

// spoofed drops packets from outside with the source of an inside host: they would earn
// that host a permission, or keep one alive. It lets pass hosts that are routed through an
// outside link, packets that came through IPsec, and packets to the gateway, which the
// user's rules judge. Where the way back depends on something that only the answers have,
// such as a mark, this chain cannot decide. Then the caller does not set Desired.Spoofed,
// and unsure does the work, as it does for Desired.Published.
func (l *layout) spoofed(d Desired) {
	l.counters = append(l.counters, spoofedCounter)
	c := l.beforeConntrack()
	if len(d.Subnets) > fewPrefixes {
		l.rule(c, "", l.outside(iifname, false), accept)
	}
	test := join(isUDP, noWayBack)
	if !d.noIPsec {
		test = join(isUDP, metaIPsec.missing(1), noWayBack)
	}
	found := l.regular("no_way_back_outside")
	for _, p := range d.Subnets {
		// Test the source first: it excludes nearly all packets.
		l.rule(c, "the way back is another link", saddrIn(p), l.outside(iifname, true), test, goTo(found))
	}
	// One rule for each link, because a rule holds at most 128 expressions
	// (NFT_RULE_MAXEXPRS), and nft 1.0.6 cannot look up the result of fib in a set.
	for _, name := range l.links {
		if slices.Contains(d.OneArmed, name) && !slices.Contains(d.Far, name) { // hosts routed by it are inside
			continue
		}
		l.rule(found, "the way back is outside, too", fibSaddrMarkOifname.is(nfnl.LinkKey(name)), accept)
	}
	for _, f := range ipFamilies {
		if slices.ContainsFunc(d.Published, f.has) {
			l.rule(found, "where it is led says which way is back", f.is, l.addrIn(f.daddr, "published"+f.name, f, d.Published), accept)
		}
	}
	l.rule(found, "the way back is inside", forwarded, counter(spoofedCounter), drop)
}

// Up to fewPrefixes prefixes are faster to test than the link.
const fewPrefixes = 4

// inZone counts the first packets of flows that no expectation admits because they come in a
// conntrack zone: an expectation stands in the zone of the reply direction, here zone 0.
func (l *layout) inZone(d Desired) {
	if len(d.InZone) == 0 {
		return
	}
	l.counters = append(l.counters, unzonedCounter)
	c := l.filter("in_zone", nftables.ChainHookPrerouting, wayBackPriority)
	for _, f := range familiesOf(d.InZone) {
		l.rule(c, "no expectation stands in a zone", f.is, zoneIsNot0, lacksStatus(ctExpected|ctConfirmed), isUDP,
			l.outside(iifname, true), f.daddr.in(l.addrSet("zoned"+f.name, f, d.InZone)), counter(unzonedCounter))
	}
}

// portZero drops packets that would match an anchor: packets with port 0 on one side
// between a subnet and elsewhere, and those to the gateway. It tests the port first,
// because hardly any packet has port 0. If the firewall filters bridged packets, this hook
// sees those, too, and cannot tell which of them leave the bridge. On a bridge without an
// address of the gateway, all do stay whose source is not reached by the bridge: they pass,
// and past conntrack, so that they match no anchor either.
func (l *layout) portZero(d Desired) {
	l.counters = append(l.counters, zeroCounter)
	like := l.regular("like_an_anchor")
	c := l.beforeConntrack()
	l.rule(c, "", udpSport.is(be16(0)), isUDP, jump(like))
	l.rule(c, "", udpDport.is(be16(0)), isUDP, jump(like))
	if d.Self && !d.noFib {
		l.rule(like, "no packet may match an anchor", toGateway, counter(zeroCounter), drop)
	}
	if len(d.Bridges) > 0 && !d.noFib {
		l.rule(like, "it stays on the bridge", iifname.in(l.linkSet(bridgesSet, d.Bridges)), noWayBack, notrack, accept)
	}
	for _, f := range familiesOf(d.Subnets) {
		inside := l.inside(f, d.Subnets)
		for _, way := range []exprs{
			join(f.saddr.in(inside), f.daddr.notIn(inside)),
			join(f.saddr.notIn(inside), f.daddr.in(inside)),
		} {
			l.rule(like, "no packet may match an anchor", f.is, way, counter(zeroCounter), drop)
		}
	}
}

// guard adds the guard chain for the families served, which have enabled subnets.
func (l *layout) guard(served []*ipFamily) {
	if len(served) == 0 {
		return
	}
	l.counters = append(l.counters, guardCounter)
	guard := l.filter("guard", nftables.ChainHookInput, guardPriority)
	l.rule(guard, "conntrack knows it", notNew, accept)
	l.rule(guard, "", notUDP, accept)
	l.rule(guard, "", l.outside(iifname, false), accept)
	l.rule(guard, "a socket waits for it", hasSocket, accept)
	l.rule(guard, "it would keep the peer from the inside host", onlyOf(served), counter(guardCounter), drop)
}

// children counts the first packets of children, and judges those of flows that our
// expectations let in. These flows have a master with a helper of ours. A flow that the user's
// own helper expects may come from anywhere. Only unanswered flows and ICMP errors have the
// state related.
func (l *layout) children(d Desired, served []*ipFamily) {
	var children *nftables.Chain
	if len(d.Helpers) > 0 || d.countsAdmitted() || d.divertsAdmitted() {
		children = l.filter("children", nftables.ChainHookForward, childPriority)
	}
	if d.countsAdmitted() || d.divertsAdmitted() {
		l.judgeAdmitted(children, d)
	}
	if len(d.Helpers) == 0 {
		return
	}
	l.counters = append(l.counters, spoofedCounter, zeroCounter, expectedCounter)
	if d.MaxChildren > 0 {
		l.counters = append(l.counters, childCounter)
	}
	child := l.regular("child")
	l.judge(child, d, served)
	v4 := ipFamilies[0]
	leads := d.Map != nil && len(v4.of(d.Subnets)) > 0
	if leads {
		l.counters = append(l.counters, guardCounter)
		l.rule(child, "the map has no such permission", v4.is, lacksStatus(ctDstNAT), v4.daddr.notIn(l.inside(v4, d.Subnets)),
			counter(guardCounter), drop)
	}
	l.divert(child, d.Diverted, served, true, drop)
	l.rule(child, "it goes on to the user's firewall", counter(expectedCounter))
	if d.countsExpected() {
		l.rule(child, "", goTo(l.countInto(expectedCounter, d.Subnets)))
	}
	l.childrenOf(children, d.Helpers, served, child)
	if d.Self || leads {
		l.ownChildren(d, leads)
	}
	if d.Self && !d.noFib {
		c := l.filter("own_source", nftables.ChainHookForward, childPriority)
		l.rule(c, "", notNew, accept)
		l.rule(c, "the source is the gateway, which did not send it", l.outside(oifname, true), isUDP, ofGateway, counter(spoofedCounter), drop)
	}
}

// ownChildren judges the first packets of children to the gateway itself. If it is no inside host,
// the map has no permission for such a packet, and the user's firewall, which may accept what is
// RELATED, must not let it in. leads says that the map leads children.
func (l *layout) ownChildren(d Desired, leads bool) {
	c := l.filter("own_children", nftables.ChainHookInput, childPriority)
	own := l.regular("own_child")
	families := ipFamilies[:1]
	if d.Self {
		families = ipFamilies
		// Packets that own_child lets pass are not counted: they do not reach the user's
		// forward hook. A packet that comes by a bridge to the gateway leaves the bridge.
		d.Bridges = nil
		l.judge(own, d, ipFamilies)
	}
	l.childrenOf(c, d.Helpers, families, own)
	if !leads {
		return
	}
	l.counters = append(l.counters, guardCounter)
	if d.Self {
		l.rule(own, "a program of the gateway waits for it", hasSocket, accept)
	}
	l.rule(own, "the map has no such permission", ipFamilies[0].is, counter(guardCounter), drop)
}

// judge lets child drop the first packets of children that are not allowed.
func (l *layout) judge(child *nftables.Chain, d Desired, served []*ipFamily) {
	fake := l.notOutside(d.Segments, d.Bridges)
	if len(d.Bridges) == 0 {
		l.rule(child, "not by an outside link: the peer's address is faked", fake, counter(spoofedCounter), drop)
	} else {
		bridges := l.linkSet(bridgesSet, d.Bridges)
		l.rule(child, "not by an outside link: the peer's address is faked", fake, iifname.notIn(bridges), counter(spoofedCounter), drop)
		for _, name := range slices.Compact(slices.Sorted(slices.Values(d.Bridges))) {
			l.rule(child, "it does not stay on the bridge: the peer's address is faked",
				fake, iifname.is(nfnl.LinkKey(name)), oifname.isNot(nfnl.LinkKey(name)), counter(spoofedCounter), drop)
		}
	}
	for _, f := range served {
		links, family := d.Not4, "IPv4"
		if f.addr == nftables.TypeIP6Addr {
			links, family = d.Not6, "IPv6"
		}
		for _, name := range slices.Sorted(slices.Values(links)) {
			for _, by := range []operand{iifname, metaSdifname} {
				l.rule(child, "no outside link for "+family+": the peer's address is faked",
					f.is, by.is(nfnl.LinkKey(name)), counter(spoofedCounter), drop)
			}
		}
	}
	for _, name := range slices.Sorted(slices.Values(d.Partial)) {
		l.rule(child, "the peer is not behind it", notBehind(name, !d.noForwardFib), counter(spoofedCounter), drop)
	}
	l.rule(child, "it would look like an anchor", udpSport.is(be16(0)), isUDP, counter(zeroCounter), drop)
	if d.MaxChildren > 0 {
		for _, f := range served {
			// Each element keeps the limit that it was made with.
			name := fmt.Sprintf("children%s_%d", f.name, d.MaxChildren)
			children := l.named(name)
			if children == nil {
				children = l.set(name, f.addr, f.addr, nftables.TypeInetService)
				children.Dynamic, children.free, children.Size = true, true, childrenSize
			}
			l.rule(child, "flows of one peer to one outside endpoint",
				f.is, isUDP, addTo(children, elem{key: f.key, limit: ctCountOver(d.MaxChildren)}), counter(childCounter), drop)
		}
	}
}

// childrenOf lets c, a chain on a hook, send the first packets of children to child.
func (l *layout) childrenOf(c *nftables.Chain, helpers []string, served []*ipFamily, child *nftables.Chain) {
	l.rule(c, "", ctState.isNot(host32(expr.CtStateBitRELATED)), accept)
	for _, helper := range helpers {
		// Only the first packet is expected and not yet confirmed.
		l.rule(c, "the first packet of a child",
			onlyOf(served), statusIs(ctExpected, ctExpected|ctConfirmed), isUDP, ctHelper.is(helperName(helper)), goTo(child))
	}
	for _, f := range served {
		for _, port := range []operand{ctOriginalProtoSrc, ctOriginalProtoDst} {
			// Only our anchors are assured without a reply: no packet sets that status.
			l.rule(c, "an ICMP error about an anchor", statusIs(ctAssured, ctSeenReply|ctAssured),
				metaL4proto.is([]byte{f.icmp}), port.is(be16(0)), counter(zeroCounter), drop)
		}
	}
}

// notBehind matches packets from a link of Desired.Partial whose peer is not reached by
// that link. If told is false the kernel cannot decide, and all packets from the link
// match.
func notBehind(link string, told bool) exprs {
	if !told {
		return iifname.is(nfnl.LinkKey(link))
	}
	return join(iifname.is(nfnl.LinkKey(link)), noWayBack)
}

// notOutside matches packets that came by no outside link, as the forward hook sees them:
// for a link in a VRF iifname is the VRF, and sdifname is the link itself. Links of one
// segment count as the same link, except bridges, for which the caller has rules.
func (l *layout) notOutside(segments map[string][]string, bridges []string) (test exprs) {
	shared := map[string]bool{}
	for back, others := range segments {
		all := append([]string{back}, others...)
		if slices.ContainsFunc(all, func(link string) bool { return slices.Contains(l.links, link) }) {
			for _, link := range all {
				shared[link] = !slices.Contains(bridges, link)
			}
		}
	}
	for _, name := range []operand{iifname, metaSdifname} {
		test = join(test, l.outside(name, false))
		for _, link := range slices.Sorted(maps.Keys(shared)) {
			if shared[link] && !slices.Contains(l.links, link) {
				test = join(test, name.isNot(nfnl.LinkKey(link)))
			}
		}
	}
	return test
}
