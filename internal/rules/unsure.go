//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/rules/elements"
)

const (
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
func (l *layout) unsure(d Desired, subnets []netip.Prefix) {
	l.counters = append(l.counters, unsureCounter)
	inside := l.set(subnetsSet, nftables.TypeIPAddr)
	inside.Interval, inside.elements = true, intervals(subnets)
	flows := l.set(elements.UnsureSet, flowKey...)
	flows.HasTimeout, flows.Dynamic, flows.free = true, true, true
	flows.Timeout, flows.Size = unsureTimeout, unsureSize

	found, from := &nftables.Chain{Table: l.table, Name: "no_way_back"}, &nftables.Chain{Table: l.table, Name: "from_inside"}
	l.chains = append(l.chains, found, from)
	c := l.chain("way_back", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, sourcePriority)
	test := noWayBack
	if !d.noIPsec {
		test = join(noSecurityPath, noWayBack)
	}
	l.rule(c, "", join(isUDP, packetSource, in(inside), goTo(from)))
	for _, upper := range slices.Sorted(maps.Keys(d.Uppers)) {
		l.rule(from, "the way back is the link below", join(
			iifname, is(linkKey(upper)), wayBack, is(linkKey(d.Uppers[upper])), accept))
	}
	l.rule(from, "the way back is not the link that it came by", join(test, forwarded, goTo(found)))
	l.rule(from, "an earlier flow may have been spoofed", join(isUDP, packetFlow, remember(opDelete)))
	l.rule(found, "nothing is learned from it", join(isUDP, packetFlow,
		remember(unix.NFT_DYNSET_OP_ADD), withoutNewEvent, count(unsureCounter), accept))
	l.rule(found, "too many to remember", drop(unsureCounter))
}

// remember adds the flow in reg to the set, or does with it what else op says.
func remember(op uint32) piece {
	return piece{&expr.Dynset{SrcRegKey: reg, SetName: elements.UnsureSet, Operation: op}}
}

const opDelete = 2 // NFT_DYNSET_OP_DELETE

// withoutNewEvent leaves the event of the flow's end alone.
var withoutNewEvent = piece{
	&expr.Immediate{Register: reg, Data: ne32(1 << 2)}, // IPCT_DESTROY
	&expr.Ct{Key: expr.CtKeyEVENTMASK, Register: reg, SourceRegister: true},
}

// isUnsure matches the flows that unsure remembers, and renews them.
var isUnsure = join(isUDP, originalFlow, piece{&expr.Lookup{SourceRegister: reg, SetName: elements.UnsureSet}}, originalFlow,
	remember(unix.NFT_DYNSET_OP_UPDATE))
