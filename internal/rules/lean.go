package rules

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/conenatd/conenatd/internal/rules/elements"
)

// eventsLater are the events of a flow after its first packet. They stay in its event mask,
// for programs that begin to listen later. The other events may come with the first packet,
// and then they would bring back the report of the flow.
const eventsLater = eventDestroy | eventReply | eventAssured

// quiet reports whether rules can hide flows that can have no permission.
func (d *Desired) quiet() bool { return d.Quiet || d.leans() }

// leans reports whether rules can hide flows whose permission the kernel learned.
func (d *Desired) leans() bool { return d.learns() && d.Map.Lean }

// hidesTCP reports whether the chain way_back hides TCP flows. Where the kernel learns nothing, the
// chain quiet does.
func (d *Desired) hidesTCP() bool { return d.learns() && d.quiet() }

func (d *Desired) learns() bool { return d.Map != nil && d.Map.Learn }

// lean returns the chain that keeps the kernel from reporting a UDP flow whose permission it
// learned, while the daemon wants that. It finds flows in its dumps.
func (l *layout) lean() *nftables.Chain {
	c := l.regular("not_reported")
	l.rule(c, "the daemon finds it in a dump", l.isHidden(elements.LeanSet), hideBeginning())
	return c
}

// nobodyAsks returns the chain that does the same for a UDP flow that can have no permission.
func (l *layout) nobodyAsks() *nftables.Chain {
	c := l.regular("of_no_interest")
	l.rule(c, "nobody needs to know", l.isHidden(elements.QuietSet), hideBeginning())
	return c
}

// quietTCP adds a rule that does the same for TCP flows, which the daemon ignores. c is a NAT
// chain, which sees only first packets.
func (l *layout) quietTCP(c *nftables.Chain) {
	l.rule(c, "nobody needs to know", isTCP, l.isHidden(elements.QuietSet), hideBeginning())
}

// quiet hides what can have no permission where the kernel learns none, and the chain learn is
// missing. With mappings, the daemon must hear of all UDP flows.
func (l *layout) quiet(d Desired) {
	c := l.chain("quiet", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, sourcePriority)
	l.quietTCP(c)
	if d.Mapping != nil {
		return
	}
	ports := l.set(excludedPeerSet, nftables.TypeInetService)
	ports.setPorts(d.ExcludePeerPorts)
	// The daemon must hear of children and forwards of the user's.
	l.rule(c, "nobody needs to know", isUDP, l.outside(iifname, false), l.isHidden(elements.QuietSet), ctReplyProtoSrc.in(ports), hideBeginning())
}

// isHidden matches packets of the protocols whose flows are hidden now.
func (l *layout) isHidden(name string) exprs { return metaL4proto.in(l.protocols(name)) }

// protocols returns a set of protocols for which something holds for a time (elements.Hidden,
// elements.Alive). It makes the set if the table does not have it yet.
func (l *layout) protocols(name string) *set {
	s := l.named(name)
	if s == nil {
		s = l.set(name, nftables.TypeInetProto)
		s.HasTimeout, s.free = true, true
	}
	return s
}

func hideBeginning() exprs { return setCt(expr.CtKeyEVENTMASK, constant(host32(eventsLater))) }
