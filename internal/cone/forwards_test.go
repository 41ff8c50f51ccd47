package cone

import (
	"net/netip"
	"testing"
)

// forwardsPort is a rule that forwards one outside port for everybody to one endpoint.
func forwardsPort(port uint16, to Endpoint) func(Permission) Forwarding {
	return func(p Permission) Forwarding {
		switch {
		case p.Ext.Port != port:
			return NotForwarded
		case p.Int == to:
			return ForwardedHere
		}
		return ForwardedElsewhere
	}
}

// elsewhere is a rule that forwards everything to an unknown endpoint.
func elsewhere(Permission) Forwarding { return ForwardedElsewhere }

// When a forward goes, a permission that was refused for it stands at once, before the
// retry. One that leads to the permission's own endpoint is a forward, too.
//
// Fails when only permissions that stand are placed again.
func TestPermissionStandsAtOnceWhenTheForwardGoes(t *testing.T) {
	const in = "10.47.11.109:5060"
	d := newDesk(t, nil)
	d.m.SetForwards(0, forwardsPort(5060, ep("10.47.11.110:5060")), true)
	f := d.open(1, in, "203.0.113.5:9")
	d.want()
	refused := func(want Reason) {
		t.Helper()
		d.carry()
		d.want()
		if v := d.view(in); v.State != StateRefused || v.Reason != want {
			t.Errorf("%v, %v, want %v", v.State, v.Reason, want)
		}
	}
	refused(ReasonForwarded)
	d.m.SetForwards(2, forwardsPort(5060, ep(in)), true)
	refused(ReasonForwardedHere)
	d.m.SetForwards(3, forwardsPort(5060, ep("10.47.11.110:5060")), true)
	refused(ReasonForwarded)
	d.m.SetForwards(4, nil, true)
	d.carry()
	d.want(in)
	d.m.SetForwards(4, forwardsPort(5060, ep(in)), true)
	refused(ReasonForwardedHere)
	d.m.SetForwards(4, nil, true)
	d.carry()
	d.want(in)
	// Another reason for which it does not stand remains.
	d.m.Revoke(5, func(Permission) bool { return true })
	d.m.SetForwards(5, nil, true)
	d.carry()
	d.want()
	d.gone(6, f)
}

// The firewall opens for a forward to the permission's own endpoint, and closes again. While it
// drops what the forward takes, the permission stands.
//
// Fails when a permission that was refused meanwhile waits for the retry, and when what the firewall
// drops does not matter.
func TestPermissionStandsAtOnceWhenTheFirewallCloses(t *testing.T) {
	const in = "10.47.11.109:5060"
	d := newDesk(t, nil)
	d.m.SetForwards(0, forwardsPort(5060, ep(in)), true)
	closed := testPolicy
	closed.Shut = []Shut{{Peers: netip.MustParsePrefix("203.0.113.0/24"), Hosts: netip.MustParsePrefix("10.47.11.108/30"), Ports: PortRange{5060, 5061}}}
	d.m.SetPolicy(0, closed)
	f := d.open(1, in, "203.0.113.5:9")
	d.carry()
	d.want(in)
	d.m.SetPolicy(2, testPolicy)
	d.carry()
	d.want()
	if v := d.view(in); v.State != StateRefused || v.Reason != ReasonForwardedHere {
		t.Errorf("%v, %v while the firewall is open", v.State, v.Reason)
	}
	d.m.SetPolicy(3, closed)
	d.carry()
	d.want(in)
	d.gone(4, f)
}

// A flow may show a forward whose rule is unknown. A flow that a known rule explains shows
// nothing, in whatever order rule and flow are read, for as long as the flow lives.
//
// Fails when such a flow is kept as evidence in either order.
func TestForwardIsForgottenWithTheRuleThatExplainedIt(t *testing.T) {
	const in, ext, other = "10.47.11.109:5060", "198.51.100.1:5060", "10.47.11.110:5060"
	rule := forwardsPort(5060, ep(other))
	for name, ruleFirst := range map[string]bool{"the rule first": true, "the flow first": false} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, nil)
			if ruleFirst {
				d.m.SetForwards(0, rule, false)
			}
			led, _ := d.dnat(1, "192.0.2.77:9", ext, other, StatusSeenReply)
			d.m.SetForwards(2, rule, false)
			f := d.open(3, in, "203.0.113.5:9")
			d.want()
			d.m.SetForwards(4, nil, false)
			d.carry()
			d.want(in)
			d.snapshot(5, f, led)
			d.seen(6, led)
			d.want(in)
			// A later flow that no rule explains is evidence again, even with the same
			// identifier.
			d.gone(7, led)
			d.seen(7, led)
			d.want()
		})
	}
}

// A dump shows a child for the first time long after its forward was noticed: at a slow start, or
// after its event was lost. It may be older than the forward, so it ends unless it is answered.
//
// Fails when the child stays, when an answered one ends, and when a child ends that an event reports,
// which the forward left to the permission.
func TestChildThatADumpShowsFirstEndsIfItsForwardMayTakeIt(t *testing.T) {
	const in, ext = "10.47.11.109:5060", "198.51.100.1:5060"
	for name, tc := range map[string]struct {
		status Status
		event  bool
		want   []OpKind
	}{
		"a dump":              {0, false, []OpKind{DropUnanswered}},
		"a dump, answered":    {StatusSeenReply, false, nil},
		"an event and a dump": {0, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, mapped)
			f := d.open(0, in, "203.0.113.5:9")
			d.m.SetForwards(1, forwardsPort(5060, ep("10.47.11.110:5060")), true)
			d.carry()
			now := 1 + eventsLate
			child := &Flow{
				ID: 99, Status: StatusDstNAT | tc.status, Labelled: d.m.policy.Labels,
				Src: ep("203.0.113.5:77"), Dst: ep(ext), ReplySrc: ep(in), ReplyDst: ep("203.0.113.5:77"),
			}
			if tc.event {
				d.wantOps("the event", d.seen(now, child))
			}
			d.wantOps("the dump", d.snapshot(now, child, f), tc.want...)
		})
	}
}
