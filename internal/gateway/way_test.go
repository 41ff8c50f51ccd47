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
			{Index: 2, Name: "wan0", Outside: true},
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
	way := n.Way()
	for range 2 { // found, and kept
		for a, want := range map[string]string{
			"10.47.11.109": "lan0", "10.47.12.1": "vpn0", "10.1.1.1": "vpn0", "2001:db8::1": "vpn0",
			"203.0.113.5": "", "127.0.0.1": "",
		} {
			if link, ok := way(netip.MustParseAddr(a)); link != want || ok != (want != "") {
				t.Errorf("way to %s is %q, %v, want %q", a, link, ok, want)
			}
		}
	}
	a := netip.MustParseAddr("10.0.0.0")
	for range 3 * mostWays {
		if link, _ := way(a); link == "" {
			t.Fatalf("no way to %v", a)
		}
		a = a.Next()
	}
}
