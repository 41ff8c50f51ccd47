package gateway

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWayIsTheLongestRouteThatIsNotOutside(t *testing.T) {
	n := Network{
		Links: []Link{
			{Index: 1, Name: "lo", Flags: unix.IFF_LOOPBACK},
			{Index: 2, Name: "wan0", Outside: bothFamilies},
			{Index: 3, Name: "lan0"},
			{Index: 4, Name: "vpn0"},
		},
		Routes: []Route{
			{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Link: 2},
			{Prefix: netip.MustParsePrefix("127.0.0.0/8"), Link: 1},
			{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Link: 4},
			{Prefix: netip.MustParsePrefix("10.47.11.0/24"), Link: 3},
			{Prefix: netip.MustParsePrefix("10.47.0.0/16"), Link: 4},
			{Prefix: netip.MustParsePrefix("2001:db8::/32"), Link: 4},
		},
	}
	for name, way := range map[string]func(netip.Addr) (string, bool){"all routes": n.Way(), "those that are kept": n.Lean().Way()} {
		for a, want := range map[string]string{
			"10.47.11.109": "lan0", "10.47.12.1": "vpn0", "10.1.1.1": "vpn0", "2001:db8::1": "vpn0",
			"203.0.113.5": "", "127.0.0.1": "",
		} {
			if link, ok := way(netip.MustParseAddr(a)); link != want || ok != (want != "") {
				t.Errorf("%s: way to %s is %q, %v, want %q", name, a, link, ok, want)
			}
		}
	}
}

// A router on the Internet has a million routes by outside links.
func TestRoutesByOutsideLinksAreNotKept(t *testing.T) {
	n := Network{
		Links: []Link{{Index: 2, Name: "wan0", Outside: bothFamilies}, {Index: 3, Name: "lan0"}},
		Routes: []Route{
			{Prefix: netip.MustParsePrefix("198.18.0.0/15"), Link: 2},
			{Prefix: netip.MustParsePrefix("10.47.11.0/24"), Link: 3},
		},
	}
	lean := n.Lean()
	if len(lean.Routes) != 1 || lean.Routes[0].Link != 3 || len(n.Routes) != 2 {
		t.Errorf("kept %v of %v", lean.Routes, n.Routes)
	}
	if !lean.SameRoutes(n) || !n.SameRoutes(lean) || !lean.SameRoutes(n.Lean()) {
		t.Error("its routes are others")
	}
	other := n
	other.Routes = append([]Route{{Prefix: netip.MustParsePrefix("198.18.0.0/16"), Link: 2}}, n.Routes[1:]...)
	if lean.SameRoutes(other) || other.Lean().SameRoutes(n) {
		t.Error("another route by an outside link is not seen")
	}
}
