package cone

import (
	"net/netip"
	"slices"
	"testing"
)

// Strays returns a flow once for each peer, and again when the topology changed.
func TestStraysAreTranslatedFlowsToTheInternet(t *testing.T) {
	outbound := func(peer string, s Status) *Flow {
		return &Flow{ID: 1, Status: s, Src: ep("10.47.11.109:5060"), Dst: ep(peer), ReplySrc: ep(peer), ReplyDst: ep("10.66.0.2:5060")}
	}
	topology := Topology{Routes: []Route{{netip.MustParsePrefix("192.0.2.0/24"), true}}}
	m := New(testPolicy)
	m.SetTopology(0, topology)
	for _, f := range []*Flow{
		outbound("192.0.2.5:5060", StatusSrcNAT),                // it is outside
		outbound("172.20.0.5:5060", StatusSrcNAT),               // private
		outbound("100.64.0.5:5060", StatusSrcNAT),               // shared
		outbound("10.47.11.110:5060", StatusSrcNAT),             // enabled
		outbound("203.0.113.7:5060", 0),                         // not translated
		outbound("203.0.113.8:5060", StatusSrcNAT|StatusDstNAT), // to a forward
		outbound("203.0.113.5:5060", StatusSrcNAT),              // one
		outbound("203.0.113.5:5061", StatusSrcNAT),              // the same peer
		outbound("203.0.113.6:5060", StatusSrcNAT),              // two
		{ID: 1, Status: StatusSrcNAT, Src: ep("10.47.99.1:5060"), // nobody's
			Dst: ep("203.0.113.9:1"), ReplySrc: ep("203.0.113.9:1"), ReplyDst: ep("10.66.0.2:1")},
	} {
		m.FlowSeen(0, f)
	}
	if all := m.Strays(); len(all) != 2 || all[0].Dst != ep("203.0.113.5:5060") || all[1].Dst != ep("203.0.113.6:5060") {
		t.Errorf("strays %v", all)
	}
	m.FlowSeen(0, outbound("203.0.113.5:5062", StatusSrcNAT))
	if m.HasStrays() {
		t.Error("a peer is told twice")
	}
	m.SetTopology(0, topology)
	m.FlowSeen(0, outbound("203.0.113.5:5062", StatusSrcNAT))
	if !m.HasStrays() {
		t.Error("a peer is not told again when the topology changed")
	}
}

// Fails when the link of a stray is not named, or is after the stray was taken.
func TestStraysNameTheirLinks(t *testing.T) {
	m := New(testPolicy)
	m.SetTopology(0, Topology{})
	if links := m.StrayLinks(); links != nil {
		t.Errorf("%q without a stray", links)
	}
	for _, peer := range []string{"203.0.113.5:5060", "203.0.113.6:5060", "192.0.2.5:5060", "198.51.100.5:5060"} {
		m.FlowSeen(0, &Flow{ID: 1, Status: StatusSrcNAT, Src: ep("10.47.11.109:5060"), Dst: ep(peer), ReplySrc: ep(peer), ReplyDst: ep("10.66.0.2:5060")})
	}
	if links := m.StrayLinks(); links != nil {
		t.Errorf("%q, and nothing knows the links", links)
	}
	m.SetLinkLookup(func(peer netip.Addr) (string, bool) {
		switch peer.As4()[0] {
		case 203:
			return "vpn0", true
		case 192:
			return "vpn1", true
		}
		return "", false
	})
	if links := m.StrayLinks(); !slices.Equal(links, []string{"vpn0", "vpn1"}) {
		t.Errorf("%q", links)
	}
	m.Strays()
	if links := m.StrayLinks(); links != nil {
		t.Errorf("%q after the strays were taken", links)
	}
}

func TestStraysAreBounded(t *testing.T) {
	m := New(testPolicy)
	m.SetTopology(0, Topology{})
	for i := range 3 * mostStrayPeers {
		peer := Endpoint{AddrFrom(netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), byte(i >> 8), byte(i)})), 5060}
		m.FlowSeen(0, &Flow{Status: StatusSrcNAT, Src: ep("10.47.11.109:5060"), Dst: peer, ReplySrc: peer, ReplyDst: ep("10.66.0.2:5060")})
		if i%100 == 0 {
			if n := len(m.Strays()); n > mostStrays {
				t.Fatalf("%d at a time", n)
			}
		}
	}
	if n := len(m.strays.peers); n > mostStrayPeers {
		t.Errorf("%d peers", n)
	}
}

// The route to a peer goes, perhaps with all outside routes except those of another link.
// It may come back. A route by an inside link means that the peer is no longer outside.
//
// Fails when a permission ends because no route leads to its peer, while others lead
// outside.
func TestPermissionOutlivesTheRouteToItsPeer(t *testing.T) {
	route := func(prefix string, outside bool) Route { return Route{netip.MustParsePrefix(prefix), outside} }
	uplink := route("198.51.100.0/24", true)
	m := New(testPolicy)
	m.SetTopology(0, Topology{Routes: []Route{uplink, route("203.0.113.0/24", true)}})
	m.FlowSeen(0, &Flow{ID: 1, Status: StatusSrcNAT, Src: ep("10.47.11.109:5060"), Dst: ep("203.0.113.5:5060"), ReplySrc: ep("203.0.113.5:5060"), ReplyDst: ep("198.51.100.1:5060")})
	for _, step := range []struct {
		routes   []Route
		standing int
	}{
		{[]Route{uplink}, 1},
		{[]Route{uplink, route("203.0.113.0/24", true)}, 1},
		{[]Route{uplink, route("203.0.113.0/24", false)}, 0},
	} {
		m.SetTopology(0, Topology{Routes: step.routes})
		m.SetPolicy(0, testPolicy)
		if n := m.Stats().Standing; n != step.standing {
			t.Errorf("%d stand with the routes %v", n, step.routes)
		}
	}
}
