package cone

import (
	"net/netip"
	"testing"
	"time"
)

// selfDesk is a desk on a gateway with several addresses that serves itself.
func selfDesk(t *testing.T, change func(*Policy)) *desk {
	d := newDesk(t, func(p *Policy) {
		p.Self4, p.Self6 = true, true
		if change != nil {
			change(p)
		}
	})
	topology := testTopology
	for _, a := range []string{"198.51.100.1", "198.51.100.2", "2001:db8:ffff::1"} {
		topology.Local = append(topology.Local, netip.MustParseAddr(a))
	}
	topology.Routes = append(topology.Routes, Route{Prefix: netip.MustParsePrefix("::/0"), Outside: true})
	d.m.SetTopology(0, topology)
	return d
}

// send lets an address of the gateway send to peer, untranslated.
func (d *desk) send(now time.Duration, own, peer string) *Flow {
	d.id++
	f := &Flow{ID: d.id, Src: ep(own), Dst: ep(peer), ReplySrc: ep(peer), ReplyDst: ep(own)}
	d.m.FlowSeen(now, f)
	d.carry()
	return f
}

// refused tells the model that the permission of f does not stand for a reason.
func (d *desk) refused(now time.Duration, f *Flow, r Reason) {
	d.m.Refused(now, Permission{Key: Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr}, Int: f.Src}, r, true)
	d.carry()
}

// Fails when an address of the gateway gets no permission, or gets one towards a peer that
// is not outside; and when two addresses count as two hosts.
func TestTheGatewayIsOneHost(t *testing.T) {
	d := selfDesk(t, func(p *Policy) { p.Limits.PerHost = 2 })
	d.send(0, "198.51.100.1:53000", "203.0.113.5:53")
	d.send(0, "198.51.100.1:5060", "198.51.100.2:5060") // itself
	d.send(0, "198.51.100.1:5060", "10.47.11.109:5060") // an inside host
	d.want()
	d.send(0, "198.51.100.1:5060", "203.0.113.5:5060")
	d.send(0, "[2001:db8:ffff::1]:5060", "[2001:db8:5::5]:5060")
	d.send(0, "198.51.100.2:5060", "203.0.113.5:5060")
	d.open(0, "10.47.11.109:5062", "203.0.113.5:5060")
	d.want("198.51.100.1:5060", "[2001:db8:ffff::1]:5060", "10.47.11.109:5062")

	p := d.m.policy.Policy
	p.Self6 = false
	d.m.SetPolicy(0, p)
	d.carry()
	d.m.Tick(time.Minute/2, 100)
	d.carry()
	d.want("198.51.100.1:5060", "198.51.100.2:5060", "10.47.11.109:5062")
	d.m.SetTopology(time.Minute/2, testTopology)
	d.carry()
	d.want("198.51.100.1:5060", "10.47.11.109:5062")
}

// Expectations carry the permissions of the gateway itself, translated or not. If they
// cannot, nothing does.
//
// Fails when the map carries one.
func TestTheMapCarriesNothingOfTheGateways(t *testing.T) {
	d := selfDesk(t, choose(ChooseMap))
	f := d.translated("198.51.100.2:5060", "203.0.113.5:5060")
	d.m.FlowSeen(0, f)
	d.carry()
	d.send(0, "198.51.100.1:5070", "203.0.113.5:5060")
	d.want("198.51.100.1:5070", "198.51.100.2:5060")
	for k, by := range d.by {
		if by != ByExpectation {
			t.Errorf("%v stands by %v", k, by)
		}
	}
	d.m.Failed(0, Permission{Key: Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr}, Int: f.Src}, ByExpectation, ReasonTableFull)
	d.carry()
	if n := d.m.Stats().Standing; n != 1 {
		t.Errorf("%d stand after the expectation of one failed", n)
	}
}

// The gateway and an inside host want the same outside endpoint and peer.
//
// Fails when a claim refused for a socket keeps the socket's own from standing, when a flow
// of the gateway that has no socket takes an inside host's permission, and when it keeps
// it.
func TestTheGatewayAndAnInsideHostOnOnePort(t *testing.T) {
	const own, host, peer, again = "198.51.100.1:5060", "10.47.11.109:5060", "203.0.113.5:5060", "203.0.113.5:5061"
	t.Run("the host was refused for the socket", func(t *testing.T) {
		d := selfDesk(t, nil)
		d.refused(0, d.open(0, host, again), ReasonLocalSocket)
		d.send(0, own, peer)
		d.want(own)
	})
	t.Run("the host was refused for the socket, which sends by another address", func(t *testing.T) {
		d := selfDesk(t, nil)
		d.refused(0, d.open(0, host, again), ReasonLocalSocket)
		d.open(0, "198.51.100.2:5060", peer)
		d.want("198.51.100.2:5060")
	})
	t.Run("the host is refused later", func(t *testing.T) {
		d := selfDesk(t, nil)
		f := d.open(0, host, again)
		d.send(0, own, peer)
		d.want(host)
		d.refused(0, f, ReasonLocalSocket)
		d.want(own)
	})
	t.Run("the gateway's stays without a flow", func(t *testing.T) {
		d := selfDesk(t, nil)
		d.gone(0, d.send(0, own, peer))
		d.open(0, host, again)
		d.want(own)
	})
	t.Run("the gateway has no socket for it", func(t *testing.T) {
		d := selfDesk(t, nil)
		d.refused(0, d.send(0, own, peer), ReasonNoSocket)
		d.open(0, host, again)
		d.want(host)
	})
}

// A DESTROY event names no master, and this child was not translated.
//
// Fails when the end of a child is taken for the end of an early packet's flow: the model
// still counts the child, and drops the next one as over the limit.
func TestChildrenOfTheGatewayEnd(t *testing.T) {
	const own = "198.51.100.1:5060"
	d := selfDesk(t, func(p *Policy) { p.Limits.Children = 1 })
	f := d.send(0, own, "203.0.113.5:5060")
	for _, from := range []string{"203.0.113.5:6000", "203.0.113.5:6001"} {
		child := Flow{
			Status: StatusExpected, Src: ep(from), Dst: ep(own), ReplySrc: ep(own), ReplyDst: ep(from),
			MasterSrc: Endpoint{Addr: f.Src.Addr}, MasterDst: Endpoint{f.ReplySrc.Addr, f.Src.Port},
		}
		end, kinds := d.inbound(0, child)
		d.wantOps("a child", kinds)
		if n := d.view(own).Children; n != 1 {
			t.Errorf("%d children, want 1", n)
		}
		end.MasterSrc, end.MasterDst = Endpoint{}, Endpoint{}
		d.gone(0, end)
		if n := d.view(own).Children; n != 0 {
			t.Errorf("%d children after the end, want 0", n)
		}
	}
}

// The rule that counts what passes looks at the forward hook alone.
//
// Fails when a flow that somebody else's helper expected for the gateway counts as passed.
func TestExpectedFlowsToTheGatewayPassNoForwardHook(t *testing.T) {
	d := newDesk(t, nil)
	from := ep("203.0.113.5:6000")
	for in, want := range map[string]uint64{"198.51.100.1:5060": 0, "10.47.11.109:5060": 1} {
		d.inbound(0, Flow{
			Status: StatusExpected, Src: from, Dst: ep(in), ReplySrc: ep(in), ReplyDst: from,
			MasterSrc: ep("10.47.11.109:69"), MasterDst: ep("203.0.113.5:69"),
		})
		if got := d.m.Passed().Expected; got != want {
			t.Errorf("to %s: %d counted, want %d", in, got, want)
		}
		clear(d.m.passes)
	}
}
