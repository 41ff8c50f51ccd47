//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"fmt"
	"maps"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// spoofed drops what comes from outside with the source of a host that is inside: it
// would earn that host a permission, or keep one alive. A host that is reached by an
// outside link is not spoofed, nor is one that comes through IPsec, and what is for the
// gateway is the user's to judge. Where the way back depends on what only the answers have,
// nobody can tell here: then the caller does not set Desired.Spoofed, and unsure does what is
// needed.
func (l *layout) spoofed(d Desired) {
	l.counters = append(l.counters, spoofedCounter)
	c := l.filter("spoofed", nftables.ChainHookPrerouting, rawPriority)
	if len(d.Subnets) > fewPrefixes {
		l.rule(c, "", l.outside(iifname, false), accept)
	}
	test := join(isUDP, noWayBack)
	if !d.noIPsec {
		test = join(isUDP, metaIPsec.missing(1), noWayBack)
	}
	found := l.regular("no_way_back_outside")
	for _, p := range d.Subnets {
		// The source comes first, for it sorts out nearly all packets.
		l.rule(c, "the way back is another link", saddrIn(p), l.outside(iifname, true), test, goTo(found))
	}
	// One rule each, for a rule has room for 128 expressions (NFT_RULE_MAXEXPRS), and nft
	// 1.0.6 cannot look up what fib finds in a set.
	for _, name := range l.links {
		if slices.Contains(d.OneArmed, name) && !slices.Contains(d.Far, name) { // who is reached by it is inside
			continue
		}
		l.rule(found, "the way back is outside, too", fibSaddrMarkOifname.is(nfnl.LinkKey(name)), accept)
	}
	l.rule(found, "the way back is inside", forwarded, counter(spoofedCounter), drop)
}

// fewPrefixes are tested quicker than a link.
const fewPrefixes = 4

// portZero drops what would match an anchor: packets between a subnet and elsewhere with
// port 0 on one side, and those to the gateway. It asks for the port first, for hardly a
// packet has that.
func (l *layout) portZero(d Desired) {
	l.counters = append(l.counters, zeroCounter)
	like := l.regular("like_an_anchor")
	c := l.filter("port_zero", nftables.ChainHookPrerouting, rawPriority)
	l.rule(c, "", udpSport.is(be16(0)), isUDP, goTo(like))
	l.rule(c, "", udpDport.is(be16(0)), isUDP, goTo(like))
	if d.Self && !d.noFib {
		l.rule(like, "no packet may match an anchor", toGateway, counter(zeroCounter), drop)
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

// guard serves the families of subnets that are enabled.
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

// children judges the first packets of flows that our expectations let in. Those have a
// master with a helper of ours; what a helper of the user's expects may come from
// anywhere. Only flows without an answer, and ICMP errors, are related.
func (l *layout) children(d Desired, served []*ipFamily) {
	l.counters = append(l.counters, spoofedCounter, zeroCounter, expectedCounter)
	if d.MaxChildren > 0 {
		l.counters = append(l.counters, childCounter)
	}
	child := l.judge("child", d, served)
	l.rule(child, "it goes on to the user's firewall", counter(expectedCounter))
	l.childrenOf("children", nftables.ChainHookForward, d.Helpers, served, child)
	if !d.Self {
		return
	}
	// What it lets pass does not count: the user's forward hook does not see it. What comes by
	// a bridge to the gateway does not stay on it.
	own := d
	own.Bridges = nil
	l.childrenOf("own_children", nftables.ChainHookInput, d.Helpers, ipFamilies, l.judge("own_child", own, ipFamilies))
	if !d.noFib {
		c := l.filter("own_source", nftables.ChainHookForward, childPriority)
		l.rule(c, "", notNew, accept)
		l.rule(c, "the source is the gateway, which did not send it", l.outside(oifname, true), isUDP, ofGateway, counter(spoofedCounter), drop)
	}
}

// judge returns a chain that drops first packets of children that must not be.
func (l *layout) judge(name string, d Desired, served []*ipFamily) *nftables.Chain {
	child := l.regular(name)
	fake := l.notOutside(d.Uppers)
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
			kids := l.named(name)
			if kids == nil {
				kids = l.set(name, f.addr, f.addr, nftables.TypeInetService)
				kids.Dynamic, kids.free = true, true
			}
			l.rule(child, "flows of one peer to one outside endpoint",
				f.is, isUDP, addTo(kids, elem{key: f.key, limit: ctCountOver(d.MaxChildren)}), counter(childCounter), drop)
		}
	}
	return child
}

// childrenOf adds the chain of a hook that leads the first packets of children to child.
func (l *layout) childrenOf(name string, hook *nftables.ChainHook, helpers []string, served []*ipFamily, child *nftables.Chain) {
	c := l.filter(name, hook, childPriority)
	l.rule(c, "", ctState.isNot(host32(expr.CtStateBitRELATED)), accept)
	for _, helper := range helpers {
		// The first packet has the one bit and not yet the other.
		l.rule(c, "the first packet of a child",
			onlyOf(served), statusIs(ctExpected, ctExpected|ctConfirmed), isUDP, ctHelper.is(helperName(helper)), goTo(child))
	}
	for _, f := range served {
		for _, port := range []operand{ctOriginalProtoSrc, ctOriginalProtoDst} {
			// No packet makes a flow assured that has no reply.
			l.rule(c, "an ICMP error about an anchor", statusIs(ctAssured, ctSeenReply|ctAssured),
				metaL4proto.is([]byte{f.icmp}), port.is(be16(0)), counter(zeroCounter), drop)
		}
	}
}

// notBehind matches packets by a link of Desired.Partial from peers who are not behind it, or
// all by it where nobody can tell.
func notBehind(link string, told bool) exprs {
	if !told {
		return iifname.is(nfnl.LinkKey(link))
	}
	return join(iifname.is(nfnl.LinkKey(link)), noWayBack)
}

// notOutside matches what the forward hook sees of packets that came by no outside link:
// of a link in a VRF it is the name of that, and the link's own apart. Links that share
// a network are as good as each other.
func (l *layout) notOutside(uppers map[string]string) (test exprs) {
	shared := map[string]bool{}
	for upper, lower := range uppers {
		if slices.Contains(l.links, upper) != slices.Contains(l.links, lower) {
			shared[upper], shared[lower] = true, true
		}
	}
	for _, name := range []operand{iifname, metaSdifname} {
		test = join(test, l.outside(name, false))
		for _, link := range slices.Sorted(maps.Keys(shared)) {
			if !slices.Contains(l.links, link) {
				test = join(test, name.isNot(nfnl.LinkKey(link)))
			}
		}
	}
	return test
}
