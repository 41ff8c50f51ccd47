package e2e

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// Children heal over IPv6 behind source NAT as TestNFTChildHealsWhenTheWayOutsideChanges says of IPv4.
//
// Fails when only IPv4 children are looked at.
func TestChildOverIPv6HealsWhenTheWayOutsideChanges(t *testing.T) {
	ownMode(t)
	t.Parallel() // mostly it waits
	for name, change := range map[string][]string{
		"by route":        {"-6 route replace default via 2001:db8:2::fe dev wan1"},
		"another address": {"address add 2001:db8:3::1/64 dev wan0 nodad", "address del 2001:db8:1::1/64 dev wan0", "-6 route replace default via 2001:db8:3::fe dev wan0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, lab.Options{IPv6: true, Rules: lab.NoRules + `table ip6 nat {
	chain postrouting {
		type nat hook postrouting priority srcnat;
		oifname { "wan0", "wan1" } masquerade
	}
}
`})
			s.AddLink("wan1", "198.51.100.129")
			for i, outside := range []string{"eth0", "wan1"} {
				s.IP(s.Gateway, fmt.Sprintf("address add 2001:db8:%d::1/64 dev wan%d nodad", i+1, i))
				s.IP(s.Outside, fmt.Sprintf("address add 2001:db8:%d::fe/64 dev %s nodad", i+1, outside))
			}
			s.IP(s.Outside, "address add 2001:db8:3::fe/64 dev eth0 nodad")
			s.IP(s.Gateway, "-6 route replace default via 2001:db8:1::fe dev wan0")
			s.IP(s.Gateway, "-6 route add default via 2001:db8:2::fe dev wan1 metric 2000")
			s.Start("--subnet", lab.InsideNet6.String(), "--reconcile=1h")
			phone, peer := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5060), s.Socket(s.Outside.Namespace, lab.Peer6A, 5060)
			other := s.Socket(s.Outside.Namespace, lab.Peer6A, 7000)
			ext := s.Contact(phone, peer)
			s.Stands(phone, peer, ext)
			s.Arrives(phone, other, ext)
			if from := s.Contact(phone, other); from != ext {
				t.Fatalf("the answer left as %v, not %v", from, ext)
			}
			for _, c := range change {
				s.IP(s.Gateway, c)
			}
			now := netip.MustParseAddr(map[string]string{"by route": "2001:db8:2::1", "another address": "2001:db8:3::1"}[name])
			t.Logf("healed after %v", s.heals(phone, other, now))
		})
	}
}
