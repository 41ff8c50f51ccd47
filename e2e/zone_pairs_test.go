package e2e

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Conntrack zones for both directions, one for each uplink.

const twoZones = `table ip nat { chain post { type nat hook postrouting priority srcnat; oifname { "wan0", "wan1" } masquerade; }; }
table inet zones { chain c { type filter hook prerouting priority raw
	iifname "wan0" ct zone set 1
	iifname "wan1" ct zone set 2
`

// Each host has the zone of its uplink.
//
// Fails when an expectation stands in another zone than packets of its uplink have.
func TestZoneOfEachUplink(t *testing.T) {
	stage.NeedsExpect(t)
	s := bothLinks(t, "198.18.7.2", func(s *scene) error {
		return s.NFT(twoZones + `iifname "lan0" ip saddr 10.47.11.109 ct zone set 1
			iifname "lan0" ip saddr 10.47.11.110 ct zone set 2
		}; }`)
	})
	s.Serve(stage.Auto[0], "--reconcile=1s", "--log-level=debug")
	one, two, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 6060)
	first, second := s.Contact(one, proxy), s.Contact(two, proxy)
	for _, x := range []struct {
		in   *lab.Socket
		ext  netip.AddrPort
		zone uint16
	}{{one, first, 1}, {two, second, 2}} {
		if p := s.Listed(x.in, proxy, x.ext, "standing"); p.Zone != x.zone || p.Backend != "expect" {
			t.Errorf("%+v", p)
		}
		s.Arrives(x.in, s.PeerSocket(lab.PeerA, 5070+x.zone), x.ext)
	}
	s.looksAfter("route add 192.0.2.128/25 via 10.47.11.109 dev lan0")
	if w := s.Status().Warnings; len(w) > 0 {
		t.Errorf("%q", w)
	}
}

// Two networks have the same addresses: each has a zone, an uplink and a link of its own, and a rule
// leads packets of the second uplink to the second network. The way back to all of them is the link
// of the first, so status says that the other must be named inside.
//
// Fails when that is not told, and when the ways of the first network show that what the second one
// sends has a wrong address.
func TestTenantsWithZonesOfBothDirections(t *testing.T) {
	stage.NeedsExpect(t)
	const inside = "name it in inside"
	for name, flags := range map[string][]string{"told": nil, "inside": {"--inside=guest0"}} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Guest: true, Rules: lab.NoRules})
			s.AddLink("wan1", "198.18.7.2")
			s.IP(s.Guest, "address add 10.47.11.109/32 dev lo")
			for _, args := range []string{
				"route add default via 198.51.100.254 dev wan1 onlink table 102", "rule add iif guest0 table 102",
				"route add 10.47.11.0/24 via " + s.Guest.Addr.String() + " dev guest0 table 103", "rule add iif wan1 table 103",
			} {
				s.IP(s.Gateway, args)
			}
			for _, link := range []string{"all", "guest0", "wan1"} {
				s.sysctl("net.ipv4.conf."+link+".rp_filter", "0")
			}
			s.Must(s.NFT(twoZones + `iifname "lan0" ct zone set 1
				iifname "guest0" ct zone set 2
			}; }`))
			s.Serve(append([]string{stage.Auto[0], "--reconcile=1s", "--log-level=debug"}, flags...)...)
			proxy := s.PeerSocket(lab.PeerA, 6060)
			one, two := s.InsideSocket(0, 5060), s.Socket(s.Guest.Namespace, s.Inside(0).Addr, 5060)
			first, second := s.Contact(one, proxy), s.Contact(two, proxy)
			s.Listed(one, proxy, first, "standing")
			if flags == nil {
				s.Until("it is told", func() bool { return s.warns(inside) })
				return
			}
			s.looksAfter("route add 192.0.2.128/25 via 10.47.11.109 dev lan0")
			if p := s.Listed(two, proxy, second, "standing"); p.Zone != 2 {
				t.Errorf("%+v", p)
			}
			s.Arrives(one, s.PeerSocket(lab.PeerA, 5070), first)
			s.Arrives(two, s.PeerSocket(lab.PeerA, 5071), second)
			if s.warns(inside) {
				t.Errorf("%q", s.Status().Warnings)
			}
		})
	}
}

// Where the map admits nothing, in a zone of both directions, status has one finding, and it says what
// helps. Without permissions there is nothing to say.
//
// Fails when it has none, or two, and when it leaves out what helps.
func TestNFTZoneOfBothDirectionsIsTold(t *testing.T) {
	const zone = `table inet zones { chain c { type filter hook prerouting priority raw; iifname { "lan0", "wan0" } ct zone set 250; }; }
`
	const auto, open = `set backend = "auto"`, "leave out filtering"
	for flags, tc := range map[string]struct {
		finding string
		helps   []string
	}{
		"--backend=nft":                                        {"no_carrier", []string{auto}},
		"--filtering=endpoint_independent":                     {"zone_of_both", []string{open}},
		"--backend=nft --filtering=endpoint_independent":       {"zone_of_both", []string{auto, open}},
		"--backend=nft --filtering=address_and_port_dependent": {},
	} {
		t.Run(flags, func(t *testing.T) {
			s := play(t, lab.Options{Rules: lab.Masquerade + zone}, append(strings.Fields(flags), mapped, "--reconcile=1s")...)
			s.Contact(s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060))
			s.Until("its zone is known", func() bool { return s.Status().Tables.Mapping.NotApplied["conntrack_zone"] > 0 })
			if tc.finding != "" {
				s.Until("it is told", func() bool { return s.warns("a conntrack zone for both directions") })
			}
			var found []string
			for _, f := range s.Status().Findings {
				if f.ID == "no_carrier" || f.ID == "zone_of_both" {
					found = append(found, f.ID)
				}
			}
			if strings.Join(found, " ") != tc.finding {
				t.Errorf("found %q, want %q", found, tc.finding)
			}
			if tc.finding != "" {
				for _, helps := range append(tc.helps, "ct original zone set") {
					if !s.warns(helps) {
						t.Errorf("nobody says %q: %q", helps, s.Status().Warnings)
					}
				}
			}
		})
	}
}
