//go:build !(386 || arm || mips || mipsle)

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
	// sourcesSet has the sources that may be spoofed, where they are not those of subnetsSet.
	sourcesSet = "sources"
	// unsureTimeout is longer than any time between two reconciles, at which the
	// daemon renews the flows that live on. unsureSize bounds how many there are.
	unsureTimeout = 2 * time.Hour
	unsureSize    = 1 << 18
)

// flowKey is an original direction: source and destination.
var flowKey = []nftables.SetDatatype{
	nftables.TypeIPAddr, nftables.TypeInetService, nftables.TypeIPAddr, nftables.TypeInetService,
}

// unsure remembers flows that begin with a source of a subnet, by a link that is not the
// way back to it: the source may be spoofed, so nothing is learned from them. They pass;
// a gateway may have good reasons for such packets. The daemon hears of them by the set
// alone: their event says nothing of links, so there is none.
//
// A NAT chain sees the first packet only, with the marks that the user's chains gave it.
func (l *layout) unsure(d Desired, sources []netip.Prefix) {
	l.counters = append(l.counters, unsureCounter)
	name := subnetsSet
	if d.Map == nil || len(sources) != len(ipFamilies[0].of(d.Map.Subnets)) {
		name = sourcesSet
	}
	inside := l.set(name, nftables.TypeIPAddr)
	inside.Interval, inside.elements = true, intervals(sources)
	flows := l.set(elements.UnsureSet, flowKey...)
	flows.HasTimeout, flows.Dynamic, flows.free = true, true, true
	flows.Timeout, flows.Size = unsureTimeout, unsureSize

	found, from := l.regular("no_way_back"), l.regular("from_inside")
	c := l.chain("way_back", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, sourcePriority)
	l.rule(c, "", isUDP, ipSaddr.in(inside), goTo(from))
	flow := elem{key: packetFlow}
	for _, link := range slices.Sorted(slices.Values(d.InsideLinks)) {
		l.rule(from, "the user says that it is inside", isUDP, iifname.is(nfnl.LinkKey(link)), deleteFrom(flows, flow), accept)
	}
	for _, upper := range slices.Sorted(maps.Keys(d.Uppers)) {
		l.rule(from, "the way back is the link below",
			iifname.is(nfnl.LinkKey(upper)), fibSaddrMarkOifname.is(nfnl.LinkKey(d.Uppers[upper])), accept)
	}
	var plain exprs
	if !d.noIPsec {
		plain = metaIPsec.missing(1)
	}
	// A mark may be for the way out alone, with a table that leads nowhere else.
	l.rule(from, "the way back is not the link that it came by", plain, noWayBack, noWayBackUnmarked, forwarded, goTo(found))
	l.rule(from, "an earlier flow may have been spoofed", isUDP, deleteFrom(flows, flow))
	l.rule(found, "nothing is learned from it", isUDP, addTo(flows, flow),
		setCt(expr.CtKeyEVENTMASK, constant(host32(eventDestroy))), counter(unsureCounter), accept)
	l.rule(found, "too many to remember", counter(unsureCounter), drop)
}

// isUnsure matches the flows that unsure remembers, and renews them.
func (l *layout) isUnsure() exprs {
	flows := l.named(elements.UnsureSet)
	return join(isUDP, originalFlow.in(flows), updateIn(flows, elem{key: originalFlow}))
}

// unsureSources are the IPv4 subnets whose hosts must not be spoofed: all whose flows may
// earn permissions, and on a gateway with one arm those with mappings. There are none where
// nobody can tell.
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

const eventDestroy = 1 << 2 // IPCT_DESTROY: no event tells of a new flow
