package daemon

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/gateway"
)

// A translated flow left by guest0, and the reconcile did not take that for an outside link. Flows by vpn0
// wait for its look.
//
// Fails when a flow by one link silences the warning of another, when a link is called none of the outside
// while the first look at it is due or runs, and when it is not afterwards.
func TestLinkThatWaitsForItsLookSilencesNoOther(t *testing.T) {
	subnet := netip.MustParsePrefix("10.47.11.0/24")
	m := cone.New(cone.Policy{Subnets: []cone.Subnet{{Prefix: subnet}}})
	m.SetTopology(0, cone.Topology{Routes: []cone.Route{{Prefix: netip.MustParsePrefix("0.0.0.0/0")}}})
	links := map[netip.Addr]string{netip.MustParseAddr("203.0.113.5"): "guest0", netip.MustParseAddr("203.0.113.7"): "guest0", netip.MustParseAddr("203.0.113.6"): "vpn0"}
	m.SetLinkLookup(func(peer netip.Addr) (string, bool) { name, ok := links[peer]; return name, ok })
	l := &loop{shared: &shared{}, engine: &engine.Engine{Model: m}, network: gateway.Network{Links: []gateway.Link{{Name: "guest0"}, {Name: "vpn0"}}}}
	sees := func(id uint32, peer string) {
		remote := cone.EndpointFrom(netip.MustParseAddrPort(peer))
		m.FlowSeen(0, &cone.Flow{
			ID: id, Status: cone.StatusSrcNAT, Src: cone.EndpointFrom(netip.MustParseAddrPort("10.47.11.109:5060")), Dst: remote,
			ReplySrc: remote, ReplyDst: cone.EndpointFrom(netip.MustParseAddrPort("10.66.0.2:5060")),
		})
	}
	warned := func(when string, want ...string) {
		t.Helper()
		var out warnings
		l.warnElsewhere(&out)
		var got []string
		for _, w := range out {
			got = append(got, w.About)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: warned of %q, want %q", when, got, want)
		}
	}
	sees(1, "203.0.113.5:5060")
	warned("a look is due")
	l.takeStrays()
	warned("the look runs")
	l.judge(nil)
	warned("the look is over", "guest0")
	sees(3, "203.0.113.7:5060")
	warned("a second look at the link is due", "guest0")
	l.takeStrays()
	warned("the second look at the link runs", "guest0")
	l.judge(nil)
	sees(2, "203.0.113.6:5060")
	warned("another look is due", "guest0")
	l.takeStrays()
	warned("the other look runs", "guest0")
	l.judge([]string{"vpn0"})
	warned("the other look shows an outside link", "guest0")
}
