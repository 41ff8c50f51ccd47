package daemon

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A verdict is the identifier (docs/control.md) of what becomes of a packet.
type verdict string

const (
	verdictArrives   verdict = "arrives"   // at an inside host
	verdictForwarded verdict = "forwarded" // by a rule of the user's
	verdictGateway   verdict = "gateway"   // a socket of the gateway gets it
	verdictLost      verdict = "lost"
	verdictUnknown   verdict = "unknown"
)

// A step is the identifier (docs/control.md) of a check of the kernel's, in the order of the
// checks (docs/hooks.md).
type step string

const (
	stepAddress     step = "address"     // who has addresses of the packet
	stepFlow        step = "flow"        // in conntrack
	stepExpectation step = "expectation" // at the beginning of a flow, before any rule
	stepForward     step = "forward"     // the user's NAT chains of prerouting
	stepSocket      step = "socket"      // our chain admit asks for one
	stepMap         step = "map"         // our chain admit
	stepChildren    step = "children"    // their number
	stepDiversion   step = "diversion"   // our chain children
	stepFirewall    step = "firewall"    // the user's chains of the prerouting and forward hooks
)

// A result is the identifier (docs/control.md) of what a step does with a packet.
type result string

const (
	resultNone    result = "none"    // nothing: the next step decides
	resultMatches result = "matches" // the step says where the packet goes
	resultPasses  result = "passes"
	resultDrops   result = "drops"
	resultUnknown result = "unknown"
)

// A flowKind says how the forward hook sees a packet that begins a flow to an inside host.
type flowKind string

const (
	ofMap         flowKind = "DNATed (ct status dnat)" // a child of the map
	ofExpectation flowKind = "RELATED"                 // a child of an expectation
	ofForward     flowKind = "forwarded"               // by a rule of the user's
	ofStranger    flowKind = "NEW"                     // neither; only where the gateway routes
)

// Explain says what becomes of a packet that comes from peer by an outside link (port 0: from
// any port that has no flow yet) to the outside endpoint ext, and why (control.Source).
func (s source) Explain(peer, ext netip.AddrPort) (control.Explanation, error) {
	c := packetCase{peer: peer, ext: ext}
	err := s.Permissions(func(p control.Permission) bool {
		switch {
		case p.Ext != ext:
		case p.Peer == peer.Addr() || p.Peers.IsValid() && p.Peers.Contains(peer.Addr()):
			c.claims = append(c.claims, p)
		case len(c.others) < 1:
			c.others = append(c.others, p)
		}
		return true
	})
	if err != nil {
		return control.Explanation{}, err
	}
	if err := s.gather(&c); err != nil {
		return control.Explanation{}, err
	}
	return c.explain(), nil
}

// explain goes through the kernel's checks, in their order.
func (c *packetCase) explain() control.Explanation {
	x := control.Explanation{Peer: c.peer.Addr(), PeerPort: c.peer.Port(), Ext: c.ext}
	to, v := c.steps(func(s step, r result, format string, args ...any) {
		x.Steps = append(x.Steps, control.Step{ID: string(s), Result: string(r), Text: fmt.Sprintf(format, args...)})
	})
	x.To, x.Verdict = to, string(v)
	return x
}

// A teller takes in what a check says of the packet.
type teller func(s step, r result, format string, args ...any)

// steps calls say for each check up to the one that decides, and returns what becomes of the
// packet.
func (c *packetCase) steps(say teller) (to netip.AddrPort, v verdict) {
	switch {
	case !c.owned && !c.routed && c.forward == nil:
		say(stepAddress, resultDrops, "%v is no address of this gateway, and no inside link leads to it", c.ext.Addr())
		return to, verdictLost
	case c.martian():
		say(stepAddress, resultDrops, "%v is no source of a packet from outside: the kernel drops such a packet", c.peer.Addr())
		return to, verdictLost
	case c.inside:
		say(stepAddress, resultDrops, "%v is in an enabled subnet: a packet with this source that comes from outside is spoofed", c.peer.Addr())
		return to, verdictLost
	}
	if c.routed {
		say(stepAddress, resultPasses, "the packet is for a host behind this gateway, and its source is outside")
	} else {
		say(stepAddress, resultPasses, "the packet is for this gateway, and its source is outside")
	}
	switch f := c.flow; {
	case f != nil && f.ReplySrc == cone.EndpointFrom(c.peer) && c.local(f.Src.Addr.Netip()):
		say(stepFlow, resultMatches, "it answers a flow of the gateway itself")
		return f.Src.Netip(), verdictGateway
	case f != nil && f.ReplySrc == cone.EndpointFrom(c.peer):
		say(stepFlow, resultMatches, "it answers the flow of %v to %v: it is ESTABLISHED, and needs no permission", f.Src, f.Dst)
		return f.Src.Netip(), verdictArrives
	case f != nil && c.local(f.ReplySrc.Addr.Netip()) && c.served:
		say(stepFlow, resultMatches, "it belongs to a flow of this peer to a socket of the gateway")
		return f.ReplySrc.Netip(), verdictGateway
	case f != nil && c.local(f.ReplySrc.Addr.Netip()):
		say(stepFlow, resultDrops, "it belongs to a flow of this peer that ends at the gateway, where no socket waits")
		return to, verdictLost
	case f != nil && f.Status.Has(cone.StatusSeenReply):
		say(stepFlow, resultMatches, "it belongs to a flow of this peer that %v has answered: it is ESTABLISHED", f.ReplySrc)
		return f.ReplySrc.Netip(), verdictArrives
	case f != nil:
		say(stepFlow, resultMatches, "it belongs to a flow of this peer to %v, which has not answered", f.ReplySrc)
		return c.filter(say, f.ReplySrc.Netip(), c.kindOf(f))
	case c.peer.Port() == 0:
		say(stepFlow, resultNone, "a port without a flow is meant")
	default:
		say(stepFlow, resultNone, "conntrack has no flow between the two endpoints")
	}
	return c.begin(say)
}

// begin goes through the checks of a packet that begins a flow.
func (c *packetCase) begin(say teller) (to netip.AddrPort, v verdict) {
	by := func(carrier cone.Carriers) *control.Permission {
		i := slices.IndexFunc(c.claims, func(p control.Permission) bool {
			return p.State == cone.StateStanding.String() && slices.Contains(strings.Split(p.Backend, "+"), carrier.String())
		})
		if i < 0 {
			return nil
		}
		return &c.claims[i]
	}
	kind := ofMap
	switch p := by(cone.ByExpectation); {
	case p == nil:
		say(stepExpectation, resultNone, "no permission for this peer stands as an expectation")
	case p == by(cone.ByMap) && c.forward == nil:
		say(stepExpectation, resultPasses, "an expectation of the permission of %v for %s makes it RELATED, and the map says where it goes", p.Int, peersOf(p))
		kind = ofExpectation
	default:
		return c.byExpectation(say, p)
	}
	switch r := c.forward; {
	case r == nil:
		say(stepForward, resultNone, "no rule of yours forwards it")
	case r.Astray:
		say(stepForward, resultNone, "a rule of yours forwards it if it comes by another link than the one that has %v, and so no expectation stands: %s", c.ext.Addr(), r.Text)
		c.forward = nil
	case !r.Certain():
		say(stepForward, resultUnknown, "a rule of yours may forward it: %s", r.Text)
	default:
		say(stepForward, resultMatches, "a rule of yours forwards it: %s", r.Text)
		if to = c.forwardsTo(); to.IsValid() && !c.local(to.Addr()) {
			if a, dropper := c.firewall(to.Addr(), ofForward); a == userrules.Dropped {
				return c.dropped(say, to, ofForward, dropper)
			}
		}
		return to, verdictForwarded
	}
	if c.served {
		say(stepSocket, resultMatches, "a socket of the gateway waits for it")
		return to, verdictGateway
	}
	say(stepSocket, resultNone, "no socket of the gateway waits for it")
	switch p := by(cone.ByMap); {
	case p != nil:
		return c.byMap(say, p, kind)
	case c.routed && c.forward == nil:
		say(stepMap, resultNone, "no permission admits it%s, so your firewall alone decides", c.maybe())
		return c.filter(say, c.ext, ofStranger)
	}
	c.whyNot(say)
	if c.forward != nil {
		return to, verdictUnknown
	}
	return to, verdictLost
}

// byExpectation goes on with a packet that an expectation translates.
func (c *packetCase) byExpectation(say teller, p *control.Permission) (to netip.AddrPort, v verdict) {
	say(stepExpectation, resultMatches, "a permission of %v for %s stands as an expectation", p.Int, peersOf(p))
	if n := c.most(*p); c.full(p) {
		say(stepChildren, resultDrops, "the peer has %s, and max_children allows %d", control.Several(p.Children, "flow"), n)
		return to, verdictLost
	}
	c.sayChildren(say, p)
	if c.diverts(p, say) {
		return to, verdictLost
	}
	if c.local(p.Int.Addr()) {
		return p.Int, verdictGateway // the forward hook does not see it
	}
	return c.filter(say, p.Int, ofExpectation)
}

// byMap goes on with a packet that a permission in the map admits, unless a rule of the user's
// forwards it.
func (c *packetCase) byMap(say teller, p *control.Permission, kind flowKind) (to netip.AddrPort, v verdict) {
	say(stepMap, resultMatches, "a permission of %v for %s stands in the map", p.Int, peersOf(p))
	switch n := c.most(*p); {
	case c.full(p) && p.Peers.IsValid():
		say(stepChildren, resultUnknown, "the peers have %s, and max_children allows %d: the kernel may let more in for a moment", control.Several(p.Children, "flow"), n)
		return to, verdictUnknown
	case c.full(p):
		say(stepChildren, resultDrops, "the peer has %s, and max_children allows %d", control.Several(p.Children, "flow"), n)
		return to, verdictLost
	}
	c.sayChildren(say, p)
	if c.diverts(p, say) {
		if c.forward != nil {
			return to, verdictUnknown
		}
		return to, verdictLost
	}
	if to, v = c.filter(say, p.Int, kind); c.forward != nil && c.forwardsTo() != p.Int {
		return netip.AddrPort{}, verdictUnknown
	}
	return to, v
}

// forwardsTo returns the endpoint to which the forward leads the packet, if it is known.
func (c *packetCase) forwardsTo() netip.AddrPort { return c.forward.LeadsTo(c.ext) }

// diverts reports whether no child of the permission's host gets in from the peer's port, and
// says why.
func (c *packetCase) diverts(p *control.Permission, say teller) bool {
	for _, d := range c.diverted {
		if d.Takes(p.Int.Addr(), c.peer) {
			say(stepDiversion, resultDrops, "a rule of yours takes what %v sends to port %d of the peer, and would not see it as a part of this flow: %s",
				p.Int.Addr(), c.peer.Port(), d.Text)
			return true
		}
	}
	return false
}

// kindOf returns how the forward hook sees the packets of a flow from outside that nobody has
// answered.
func (c *packetCase) kindOf(f *cone.Flow) flowKind {
	switch {
	case f.Status.Has(cone.StatusExpected):
		return ofExpectation
	case f.Status.Has(cone.StatusDstNAT) && !f.Labelled && c.forward != nil && c.forwardsTo() == f.ReplySrc.Netip():
		return ofForward
	case f.Status.Has(cone.StatusDstNAT):
		return ofMap
	}
	return ofStranger
}

// full reports whether p has as many children as it may have.
func (c *packetCase) full(p *control.Permission) bool {
	n := c.most(*p)
	return n > 0 && p.Children >= n
}

func (c *packetCase) sayChildren(say teller, p *control.Permission) {
	if n := c.most(*p); n > 0 {
		say(stepChildren, resultPasses, "the peer has %d of %s", p.Children, control.Several(n, "flow"))
	} else {
		say(stepChildren, resultPasses, "the peer has %s, and max_children sets no limit", control.Several(p.Children, "flow"))
	}
}

// whyNot says why no permission admits the packet.
func (c *packetCase) whyNot(say teller) {
	switch {
	case len(c.claims) > 0:
		p := c.claims[0]
		say(stepMap, resultDrops, "the permission of %v for %s is inactive: it is %s", p.Int, peersOf(&p), control.Inactive(p))
	case len(c.others) > 0:
		say(stepMap, resultDrops, "%v has this outside endpoint, and did not send to %v, or too long ago%s", c.others[0].Int, c.peer.Addr(), c.maybe())
	default:
		say(stepMap, resultDrops, "no host of an enabled subnet has a permission on this outside endpoint%s", c.maybe())
	}
}

// maybe says that the daemon may not know of a permission yet.
func (c *packetCase) maybe() string {
	if c.unseen == 0 {
		return ""
	}
	return fmt.Sprintf(" (a flow of the last %v may have given one: events are lean)", max(c.unseen.Round(time.Second), time.Second))
}

// filter asks the user's chains about a packet to an inside host.
func (c *packetCase) filter(say teller, to netip.AddrPort, kind flowKind) (netip.AddrPort, verdict) {
	switch a, dropper := c.firewall(to.Addr(), kind); a {
	case userrules.Accepted:
		say(stepFirewall, resultPasses, "your firewall lets %s flows to %v pass", kind, to.Addr())
		return to, verdictArrives
	case userrules.Dropped:
		return c.dropped(say, to, kind, dropper)
	}
	say(stepFirewall, resultUnknown, "your rules do not tell whether %s flows to %v pass", kind, to.Addr())
	return to, verdictUnknown
}

// dropped says that a chain drops the packet.
func (c *packetCase) dropped(say teller, to netip.AddrPort, kind flowKind, by string) (netip.AddrPort, verdict) {
	say(stepFirewall, resultDrops, "%s drops %s flows to %v", cmp.Or(by, "your firewall"), kind, to.Addr())
	return netip.AddrPort{}, verdictLost
}

// peersOf names the peers of a permission.
func peersOf(p *control.Permission) string {
	if p.Peers.IsValid() {
		return p.Peers.String()
	}
	return p.Peer.String()
}
