package daemon

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Fails when an explanation hides that the daemon may not know of a permission yet.
func TestExplanationSaysWhatLeanEventsHide(t *testing.T) {
	c := packetCase{
		peer: netip.MustParseAddrPort("203.0.113.5:0"), ext: netip.MustParseAddrPort("198.51.100.1:5060"),
		owned: true, local: func(netip.Addr) bool { return false },
	}
	last := func() string {
		x := c.explain()
		return x.Steps[len(x.Steps)-1].Text
	}
	if got := last(); strings.Contains(got, "lean") {
		t.Errorf("while all events are told: %q", got)
	}
	c.unseen = 3 * time.Second
	if got := last(); !strings.Contains(got, "a flow of the last 3s may have given one") {
		t.Errorf("while events are lean: %q", got)
	}
}

// Fails when a packet arrives whose source the kernel takes from nobody, though anybody may send.
func TestNoPacketComesFromAMartian(t *testing.T) {
	gateway := netip.MustParseAddr("198.51.100.1")
	anybody := control.Permission{
		Int: netip.MustParseAddrPort("10.47.11.109:5060"), Ext: netip.AddrPortFrom(gateway, 5060),
		Peers: netip.MustParsePrefix("0.0.0.0/0"), State: cone.StateStanding.String(), Backend: cone.ByMap.String(),
	}
	for peer, want := range map[string]verdict{
		"203.0.113.5": verdictArrives, "169.254.1.1": verdictArrives, "240.1.2.3": verdictArrives,
		"198.51.100.1": verdictLost, "127.0.0.1": verdictLost, "224.0.0.1": verdictLost,
		"255.255.255.255": verdictLost, "0.0.0.0": verdictLost, "0.1.2.3": verdictLost,
	} {
		c := packetCase{
			peer: netip.AddrPortFrom(netip.MustParseAddr(peer), 0), ext: anybody.Ext, owned: true,
			local:  func(a netip.Addr) bool { return a == gateway },
			claims: []control.Permission{anybody}, most: func(control.Permission) int { return 16 },
			firewall: func(netip.Addr, flowKind) (userrules.Answer, string) { return userrules.Accepted, "" },
		}
		x := c.explain()
		if last := x.Steps[len(x.Steps)-1]; x.Verdict != string(want) || want == verdictLost && last.ID != string(stepAddress) {
			t.Errorf("%s: %s by %+v, want %s", peer, x.Verdict, last, want)
		}
	}
}

// Fails when an explanation says that an expectation beside the map leads the packet.
func TestMapLeadsBesideAnExpectation(t *testing.T) {
	p := control.Permission{
		Int: netip.MustParseAddrPort("10.47.11.109:5060"), Ext: netip.MustParseAddrPort("198.51.100.1:5060"),
		Peer: netip.MustParseAddr("203.0.113.5"), State: cone.StateStanding.String(), Backend: cone.AllCarriers.String(),
	}
	c := packetCase{
		peer: netip.AddrPortFrom(p.Peer, 0), ext: p.Ext, owned: true, local: func(netip.Addr) bool { return false },
		claims: []control.Permission{p}, most: func(control.Permission) int { return 16 },
		firewall: func(_ netip.Addr, kind flowKind) (userrules.Answer, string) {
			if kind == ofExpectation {
				return userrules.Accepted, ""
			}
			return userrules.Dropped, ""
		},
	}
	x := c.explain()
	var steps []string
	for _, s := range x.Steps {
		steps = append(steps, s.ID+" "+s.Result)
	}
	want := []string{"address passes", "flow none", "expectation passes", "forward none", "socket none", "map matches", "children passes", "firewall passes"}
	if !slices.Equal(steps, want) || x.To != p.Int {
		t.Errorf("%v to %v, want %v", steps, x.To, want)
	}
}
