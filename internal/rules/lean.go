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

// lean returns the chain that keeps the kernel from reporting a UDP flow while the daemon
// wants that. It finds flows in its dumps.
func (l *layout) lean() *nftables.Chain {
	c := l.regular("not_reported")
	l.rule(c, "the daemon finds it in a dump", l.isLean(), hideBeginning())
	return c
}

// leanTCP adds a rule that does the same for TCP flows, which the daemon ignores. c is a NAT
// chain, which sees only first packets.
func (l *layout) leanTCP(c *nftables.Chain) {
	l.rule(c, "nobody needs to know", isTCP, l.isLean(), hideBeginning())
}

// isLean matches packets of the protocols whose flows are hidden now.
func (l *layout) isLean() exprs {
	on := l.named(elements.LeanSet)
	if on == nil {
		on = l.set(elements.LeanSet, nftables.TypeInetProto)
		on.HasTimeout, on.free = true, true
	}
	return metaL4proto.in(on)
}

func hideBeginning() exprs { return setCt(expr.CtKeyEVENTMASK, constant(host32(eventsLater))) }
