package rules

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

const (
	// sourcesSet has the sources that may be spoofed, if they differ from subnetsSet.
	sourcesSet = "sources"
	// unsureTimeout is longer than any interval between two reconciles, at which the daemon
	// renews the flows that still live. unsureSize limits how many there are.
	unsureTimeout = 2 * time.Hour
	unsureSize    = 1 << 18
)

// flowKey is the key of an original direction: source and destination.
var flowKey = ipFamilies[0].flowKey()

// flowKey is the key of a flow of the family.
func (f *ipFamily) flowKey() []nftables.SetDatatype {
	return []nftables.SetDatatype{f.addr, nftables.TypeInetService, f.addr, nftables.TypeInetService}
}

// unsure remembers IPv4 flows whose first packet has a source in a subnet but came by a
// link that is not the way back to that source. The source may be spoofed, so nothing is
// learned from these flows. They pass; a gateway may have good reasons for such packets.
// The daemon learns of them only from the set: a NEW event does not name the link, so it is
// suppressed.
//
// A NAT chain sees the first packet only, with the marks that the user's chains gave it.
func (l *layout) unsure(d Desired, sources []netip.Prefix) {
	name := subnetsSet
	if d.Map == nil || len(sources) != len(ipFamilies[0].of(d.Map.Subnets)) {
		name = sourcesSet
	}
	inside := l.set(name, nftables.TypeIPAddr)
	inside.Interval, inside.elements = true, intervals(sources)
	from := l.fromInside(d, ipFamilies[0], elements.UnsureSet, nil)
	l.rule(l.wayBack(d), "", isUDP, ipSaddr.in(inside), goTo(from))
}

// wayBack makes the NAT chain that comes before all others. It hides TCP flows where learn hides UDP
// flows.
func (l *layout) wayBack(d Desired) *nftables.Chain {
	c := l.chain("way_back", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, sourcePriority)
	if d.hidesTCP() {
		l.quietTCP(c)
	}
	return c
}

// unsure6 is the same for IPv6, in a filter chain. A NAT chain would put all IPv6 flows of
// the gateway through NAT, which costs each packet more than this one rule.
func (l *layout) unsure6(d Desired) {
	f := ipFamilies[1]
	from := l.fromInside(d, f, elements.Unsure6Set, l.inside(f, d.Subnets))
	c := l.filter("way_back", nftables.ChainHookPrerouting, wayBackPriority)
	l.rule(c, "the first packet of a flow", f.is, lacksStatus(ctConfirmed), isUDP, goTo(from))
}

// fromInside adds a chain that judges first packets by the link that they came by. It adds
// their flows to a set, or removes them. Sources outside the set inside are left alone; if
// inside is nil, the caller has tested the source.
func (l *layout) fromInside(d Desired, f *ipFamily, name string, inside *set) *nftables.Chain {
	l.counters = append(l.counters, unsureCounter)
	flows := l.set(name, f.flowKey()...)
	flows.HasTimeout, flows.Dynamic, flows.free = true, true, true
	flows.Timeout, flows.Size = unsureTimeout, unsureSize

	found, from := l.regular("no_way_back"), l.regular("from_inside")
	flow, ofFamily := elem{key: concat(f.saddr, udpSport, f.daddr, udpDport)}, isUDP
	if inside != nil {
		ofFamily = join(f.is, isUDP)
		l.rule(from, "", f.is, f.saddr.notIn(inside), accept)
	}
	for _, link := range slices.Sorted(slices.Values(d.InsideLinks)) {
		l.rule(from, "the user says that it is inside", ofFamily, iifname.is(nfnl.LinkKey(link)), deleteFrom(flows, flow), accept)
	}
	for _, back := range slices.Sorted(maps.Keys(d.Segments)) {
		l.rule(from, "the way back is in the same segment",
			l.by(d.Segments[back], "segment_"+elements.Identifier(back)), fibSaddrMarkOifname.is(nfnl.LinkKey(back)), ofFamily, deleteFrom(flows, flow), accept)
	}
	var plain exprs
	if !d.noIPsec {
		plain = metaIPsec.missing(1)
	}
	// Test without the mark, too: a mark may be for the way out alone, with a routing table
	// that leads nowhere else.
	l.rule(from, "the way back is not the link that it came by", plain, noWayBack, noWayBackUnmarked, forwarded, goTo(found))
	l.rule(from, "an earlier flow may have been spoofed", ofFamily, deleteFrom(flows, flow))
	l.rule(found, "nothing is learned from it", ofFamily, addTo(flows, flow),
		setCt(expr.CtKeyEVENTMASK, constant(host32(eventDestroy))), counter(unsureCounter), accept)
	l.rule(found, "too many to remember", counter(unsureCounter), drop)
	return from
}

// isUnsure matches flows that unsure remembers, and refreshes their elements.
func (l *layout) isUnsure() exprs {
	flows := l.named(elements.UnsureSet)
	return join(isUDP, originalFlow.in(flows), updateIn(flows, elem{key: originalFlow}))
}

// unsureSources are the IPv4 subnets whose hosts must not be spoofed: all subnets whose
// flows may earn permissions, and on a gateway with an arm the subnets with mappings. It is
// empty if the kernel cannot tell.
func (d *Desired) unsureSources() []netip.Prefix {
	switch {
	case d.noFib || d.noWayBack:
		return nil
	case d.Map != nil || len(d.Helpers) > 0:
		return ipFamilies[0].of(d.Subnets)
	case d.Mapping != nil && len(d.arms()) > 0:
		return ipFamilies[0].of(d.Mapping.Subnets)
	}
	return nil
}

// unsure6Wanted reports whether there are such IPv6 subnets. Only expectations carry IPv6
// permissions.
func (d *Desired) unsure6Wanted() bool {
	return !d.noFib && !d.noWayBack && len(d.Helpers) > 0 && len(ipFamilies[1].of(d.Subnets)) > 0
}

// Events of conntrack (enum ip_conntrack_events). With eventDestroy alone there is no event
// for the new flow.
const (
	eventDestroy = 1 << 2
	eventReply   = 1 << 3
	eventAssured = 1 << 4
)
