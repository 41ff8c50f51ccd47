package cone

import (
	"net/netip"
	"slices"
	"testing"
)

// The gateway of a VPN that has no default route: vpn0 is no outside link. lan0 and
// lan1 lead to enabled subnets.
func TestWhyAPeerIsNotOutside(t *testing.T) {
	p := testPolicy
	p.Subnets = append(slices.Clip(p.Subnets), Subnet{Prefix: netip.MustParsePrefix("10.47.12.0/24")},
		Subnet{Prefix: netip.MustParsePrefix("2001:db8:47::/64"), Routed: true})
	topology := Topology{Routes: []Route{
		{netip.MustParsePrefix("198.51.100.0/24"), true},
		{netip.MustParsePrefix("10.0.0.0/8"), false},
		{netip.MustParsePrefix("172.16.0.0/12"), false},
		{netip.MustParsePrefix("203.0.113.0/24"), false},
		{netip.MustParsePrefix("2001:db8:5::/64"), false},
	}}
	way := func(peer netip.Addr) (string, bool) {
		for prefix, link := range map[string]string{
			"10.47.11.0/24": "lan0", "10.47.12.0/24": "lan1", "10.9.0.0/16": "lan1", "172.16.0.0/12": "vpn0",
			"203.0.113.0/24": "vpn0", "2001:db8:5::/64": "vpn0", "2001:db8:47::/64": "lan0",
		} {
			if netip.MustParsePrefix(prefix).Contains(peer) {
				return link, true
			}
		}
		return "", false
	}
	for name, tc := range map[string]struct {
		peer, ext  string
		want       Reason
		translated uint64 // of vpn0
	}{
		"on the Internet":              {"203.0.113.5:5060", "10.8.0.2:5060", ReasonNotOutside, 1},
		"in the VPN":                   {"172.16.0.9:5060", "10.8.0.2:5060", ReasonNotOutside, 0},
		"in an enabled subnet":         {"10.47.12.20:5060", "10.47.12.1:5060", ReasonPeerInside, 0},
		"behind a host of an inside":   {"10.9.0.20:5060", "10.47.12.1:5060", ReasonPeerInside, 0},
		"nowhere":                      {"192.0.2.5:5060", "198.51.100.1:5060", ReasonNoRoute, 0},
		"excluded for a better reason": {"203.0.113.5:53", "10.8.0.2:5060", ReasonExcludedPeerPort, 0},
	} {
		t.Run(name, func(t *testing.T) {
			m := New(p)
			m.SetTopology(0, topology)
			m.SetLinkLookup(way)
			f := Flow{
				ID: 1, Status: StatusSrcNAT,
				Src: ep("10.47.11.109:5060"), Dst: ep(tc.peer), ReplySrc: ep(tc.peer), ReplyDst: ep(tc.ext),
			}
			m.FlowSeen(0, &f)
			for r, n := range m.Stats().Skipped {
				if (n == 1) != (Reason(r) == tc.want) {
					t.Errorf("skipped %d for %q, want it for %q", n, Reason(r), tc.want)
				}
			}
			flows := uint64(0)
			if tc.want == ReasonNotOutside {
				flows = 1
			}
			if n := m.Elsewhere()["vpn0"]; n.Flows != flows || n.Translated != tc.translated {
				t.Errorf("by vpn0: %+v", n)
			}
		})
	}
	t.Run("routed", func(t *testing.T) {
		m := New(p)
		m.SetTopology(0, topology)
		m.SetLinkLookup(way)
		in, peer := ep("[2001:db8:47::109]:5060"), ep("[2001:db8:5::5]:5060")
		m.FlowSeen(0, &Flow{ID: 1, Src: in, Dst: peer, ReplySrc: peer, ReplyDst: in})
		if n := m.Elsewhere()["vpn0"]; n.Flows != 1 || n.Translated != 0 {
			t.Errorf("by vpn0: %+v", n)
		}
	})
}

func TestLinksThatComeAndGoDoNotUseUpMemory(t *testing.T) {
	m := New(testPolicy)
	m.SetTopology(0, Topology{})
	link := ""
	m.SetLinkLookup(func(peer netip.Addr) (string, bool) {
		if peer == ep("203.0.113.5:1").Addr.Netip() {
			return link, true
		}
		return "lan0", true
	})
	const n = 1000
	for range n {
		link += "v"
		m.FlowSeen(0, &Flow{
			Status: StatusSrcNAT,
			Src:    ep("10.47.11.109:5060"), Dst: ep("203.0.113.5:5060"),
			ReplySrc: ep("203.0.113.5:5060"), ReplyDst: ep("10.8.0.2:5060"),
		})
	}
	if got := len(m.Elsewhere()); got > mostLinks || m.Stats().Skipped[ReasonNotOutside] != n {
		t.Errorf("%d links, skipped %d", got, m.Stats().Skipped[ReasonNotOutside])
	}
}

func TestUntranslatedSubnet(t *testing.T) {
	m := New(testPolicy)
	m.SetTopology(0, testTopology)
	see := func(port string, ext string, s Status) {
		m.FlowSeen(0, &Flow{
			Status: s, Src: ep("10.47.11.109:" + port), Dst: ep("203.0.113.5:5060"),
			ReplySrc: ep("203.0.113.5:5060"), ReplyDst: ep(ext + ":" + port),
		})
	}
	see("1", "198.51.100.1", StatusSrcNAT)
	if all := m.Untranslated(); len(all) != 0 {
		t.Errorf("untranslated: %v", all)
	}
	see("2", "10.47.11.109", 0)
	see("3", "10.47.11.109", 0)
	all := m.Untranslated()
	if len(all) != 1 || all[0].Flows != 2 || !all[0].Subnet.Contains(ep("10.47.11.109:1").Addr.Netip()) {
		t.Errorf("untranslated: %v", all)
	}
	// Some are, so it is on purpose that others are not.
	see("4", "198.51.100.1", StatusSrcNAT)
	if all := m.Untranslated(); len(all) != 0 {
		t.Errorf("untranslated: %v", all)
	}
}
