package gateway

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// sidesNetwork has wan0 with the default route of both families, lan0 and guest0 with
// networks, and vpn0 with a route.
func sidesNetwork() Network {
	p := netip.MustParsePrefix
	return Network{
		Links: []Link{
			{Index: 1, Name: "lo", Flags: unix.IFF_LOOPBACK},
			{Index: 2, Name: "wan0"},
			{Index: 3, Name: "lan0"},
			{Index: 4, Name: "guest0"},
			{Index: 5, Name: "vpn0"},
			{Index: 6, Name: "vrrp0", Kind: "macvlan", Lower: 2},
			{Index: 7, Name: "wan0.9", Kind: "vlan", Lower: 2},
			{Index: 8, Name: "shim0", Kind: "macvlan", Lower: 3},
		},
		Addrs: []Addr{
			{Prefix: p("198.51.100.1/24"), Link: 2},
			{Prefix: p("10.47.11.1/24"), Link: 3},
			{Prefix: p("2001:db8:47::1/64"), Link: 3},
			{Prefix: p("10.47.12.1/24"), Link: 4},
			{Prefix: p("10.66.0.2/32"), Link: 5},
			{Prefix: p("198.51.100.10/32"), Link: 6},
		},
		Routes: []Route{
			{Prefix: p("0.0.0.0/0"), Link: 2},
			{Prefix: p("::/0"), Link: 2},
			{Prefix: p("198.51.100.0/24"), Link: 2},
			{Prefix: p("10.47.11.0/24"), Link: 3},
			{Prefix: p("2001:db8:47::/64"), Link: 3},
			{Prefix: p("10.47.12.0/24"), Link: 4},
			{Prefix: p("203.0.113.0/24"), Link: 5},
		},
	}
}

func prefixesOf(all ...string) (ps []netip.Prefix) {
	for _, s := range all {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

func TestMarkTellsOutsideFromInside(t *testing.T) {
	lan, lan6 := "10.47.11.0/24", "2001:db8:47::/64"
	route := func(prefix string, link int) Route {
		return Route{Prefix: netip.MustParsePrefix(prefix), Link: link, Table: 254}
	}
	for name, tc := range map[string]struct {
		sides   Sides
		routes  []Route // more
		without int     // link without default routes
		// Links as name, families, cause: "+" is inside, "~" is far, "-" has an unused default.
		want string
	}{
		"default route": {
			sides: Sides{Subnets: prefixesOf(lan)},
			want:  "wan0/IPv4 and IPv6 lan0+ vrrp0/IPv4 and IPv6",
		},
		"named": {
			sides: Sides{Subnets: prefixesOf(lan), Outside: []string{"vpn0"}, Inside: []string{"vrrp0"}},
			want:  "wan0/IPv4 and IPv6 lan0+ vpn0/IPv4 and IPv6 vrrp0+",
		},
		"a rule and a flow": {
			sides: Sides{Subnets: prefixesOf(lan), RuledNAT: []string{"vpn0"}, SeenNAT: []string{"guest0"}}, routes: []Route{route("192.0.2.0/24", 4)},
			want: "wan0/IPv4 and IPv6 lan0+ guest0/IPv4 vpn0/IPv4 vrrp0/IPv4 and IPv6",
		},
		"a rule and a flow towards a network of the gateway's": {
			sides: Sides{Subnets: prefixesOf(lan), RuledNAT: []string{"guest0"}, SeenNAT: []string{"guest0"}},
			want:  "wan0/IPv4 and IPv6 lan0+ vrrp0/IPv4 and IPv6",
		},
		"the user's word against a rule": {
			sides: Sides{Subnets: prefixesOf(lan), RuledNAT: []string{"vpn0"}, Inside: []string{"vpn0", "wan0"}},
			want:  "wan0+- lan0+ vpn0+",
		},
		"advertised to the LAN": {
			sides: Sides{Subnets: prefixesOf(lan)}, routes: []Route{route("::/0", 3), route("0.0.0.0/0", 2)}, without: 2,
			want: "wan0/IPv4 and IPv6 lan0+- vrrp0/IPv4 and IPv6",
		},
		"advertised to a LAN with IPv6": {
			sides: Sides{Subnets: prefixesOf(lan, lan6)}, routes: []Route{route("::/0", 3), route("0.0.0.0/0", 2)}, without: 2,
			want: "wan0/IPv4 and IPv6 lan0/IPv6+ vrrp0/IPv4 and IPv6 shim0/IPv6",
		},
		"a backup in the LAN": {
			sides: Sides{Subnets: prefixesOf(lan)}, routes: []Route{route("0.0.0.0/0", 3)},
			want: "wan0/IPv4 and IPv6 lan0+- vrrp0/IPv4 and IPv6",
		},
		"a backup in the LAN, in use": {
			sides: Sides{Subnets: prefixesOf(lan), SeenNAT: []string{"lan0"}}, routes: []Route{route("0.0.0.0/0", 3)},
			want: "wan0/IPv4 and IPv6 lan0/IPv4+ vrrp0/IPv4 and IPv6 shim0/IPv4",
		},
		"a backup in the LAN of a named uplink that is away": {
			sides: Sides{Subnets: prefixesOf(lan), Outside: []string{"ppp0"}}, routes: []Route{route("0.0.0.0/0", 3)}, without: 2,
			want: "lan0+-",
		},
		"one arm": {
			sides: Sides{Subnets: prefixesOf(lan)}, routes: []Route{route("0.0.0.0/0", 3), route("::/0", 3)}, without: 2,
			want: "lan0/IPv4+- shim0/IPv4",
		},
		"one arm, hosts beyond": {
			sides: Sides{Subnets: prefixesOf("10.47.99.0/24")}, routes: []Route{route("0.0.0.0/0", 3)}, without: 2,
			want: "lan0/IPv4 and IPv6~ shim0/IPv4 and IPv6",
		},
		"a part of the LAN": {
			sides: Sides{Subnets: prefixesOf("10.47.11.96/27")}, routes: []Route{route("0.0.0.0/0", 3)},
			want: "wan0/IPv4 and IPv6 lan0+- vrrp0/IPv4 and IPv6",
		},
		"more than the LAN": {
			sides: Sides{Subnets: prefixesOf("10.0.0.0/8")}, routes: []Route{route("0.0.0.0/0", 3)},
			want: "wan0/IPv4 and IPv6 lan0+- guest0+ vrrp0/IPv4 and IPv6",
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := sidesNetwork()
			n.Routes = slices.DeleteFunc(n.Routes, func(r Route) bool { return r.Link == tc.without && isDefault(r.Prefix) })
			n.Routes = append(n.Routes, tc.routes...)
			n.Mark(Sides{Outside: []string{"guest0"}, RuledNAT: []string{"lan0"}}) // which the next one must not remember
			n.Mark(tc.sides)
			var got []string
			for _, l := range n.Links {
				text := l.Name
				if l.Outside != 0 {
					text += "/" + l.Outside.String()
				}
				if (l.Outside != 0) != (l.Cause != NoCause) {
					t.Errorf("%s is outside for %v, because %q", l.Name, l.Outside, l.Cause)
				}
				for sign, is := range map[string]bool{"+": l.Inside, "~": l.Far && l.Name != "wan0"} {
					if is {
						text += sign
					}
				}
				if l.Unused != 0 {
					text += "-"
				}
				if text != l.Name {
					got = append(got, text)
				}
			}
			if s := strings.Join(got, " "); s != tc.want {
				t.Errorf("got  %s\nwant %s", s, tc.want)
			}
		})
	}
}

// Fails when an outside link without an address is doubtful only while its routes are known.
func TestTheSameLinksAreDoubtfulWithoutRoutes(t *testing.T) {
	n := sidesNetwork()
	n.Addrs = slices.DeleteFunc(n.Addrs, func(a Addr) bool { return a.Link == 5 })
	n.Mark(Sides{Subnets: prefixesOf("10.47.11.0/24"), RuledNAT: []string{"vpn0"}})
	names := func(links []Link) (names []string) {
		for _, l := range links {
			names = append(names, l.Name)
		}
		return names
	}
	full, lean := names(n.Doubtful()), names(n.Lean().Doubtful())
	if !slices.Contains(full, "vpn0") || !slices.Equal(full, lean) {
		t.Errorf("doubtful are %q, and without routes by outside links %q", full, lean)
	}
}

// A flow to the Internet shows an outside link, but not a flow to what may be a further inside
// network.
func TestShowsOutside(t *testing.T) {
	n := sidesNetwork()
	n.Routes = append(n.Routes, Route{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Link: 3}, Route{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Link: 3})
	n.Addrs = append(n.Addrs, Addr{Prefix: netip.MustParsePrefix("198.51.200.1/24"), Link: 4})
	n.Mark(Sides{Subnets: prefixesOf("10.47.11.0/24")})
	for _, tc := range []struct {
		link, peer string
		want       bool
	}{
		{"vpn0", "203.0.113.5", true},
		{"vpn0", "172.20.0.5", false},
		{"vpn0", "100.64.0.5", false},
		{"guest0", "10.47.12.20", false},
		{"guest0", "198.51.200.20", false}, // in its own network
		{"lo", "203.0.113.5", false},
		{"lan0", "203.0.113.5", true}, // by its default route
		{"lan0", "192.0.2.5", false},  // by a route to somewhere inside
	} {
		l := n.Links[slices.IndexFunc(n.Links, func(l Link) bool { return l.Name == tc.link })]
		if got := n.ShowsOutside(l, netip.MustParseAddr(tc.peer)); got != tc.want {
			t.Errorf("%s to %s: %v", tc.link, tc.peer, got)
		}
	}
}
