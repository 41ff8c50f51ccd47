package e2e

import (
	"errors"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// What hosts send to the addresses in a set of nftables or ipset leaves by the second uplink, as with the
// sets that dnsmasq fills. The peer of a child enters such a set.
//
// Fails when nobody asks the kernel whether the set has the peer, or when that ends children of others.
func TestNFTChildHealsWhenItsPeerEntersASet(t *testing.T) {
	t.Parallel() // mostly it waits
	nft := func(set, rule string) func(s *scene) error {
		return func(s *scene) error {
			return s.NFT("table inet marks { " + set + "; }; chain pre { type filter hook prerouting priority mangle; " + rule + "; }; }")
		}
	}
	ipset := func(variant, create, match string) func(s *scene) error {
		return func(s *scene) error {
			_, err := s.Gateway.Output("ipset", append([]string{"create", "routed"}, strings.Fields(create)...)...)
			return errors.Join(err, s.IPTables(variant, "*mangle\n-A PREROUTING -i lan0 -m set "+match+" -j MARK --set-mark 7\nCOMMIT\n"))
		}
	}
	const byAddr = `iifname "lan0" ip daddr @routed meta mark set 7`
	for name, tc := range map[string]struct {
		mark    func(s *scene) error
		element string
	}{
		"without timeouts":      {nft("set routed { type ipv4_addr", byAddr), "203.0.113.5"},
		"with timeouts":         {nft("set routed { type ipv4_addr; flags timeout", byAddr), "203.0.113.5 timeout 1h"},
		"of networks":           {nft("set routed { type ipv4_addr; flags interval, timeout", byAddr), "203.0.113.4/31 timeout 1h"},
		"filled by packets":     {nft("set routed { type ipv4_addr; flags dynamic; size 128", byAddr), "203.0.113.5"},
		"of hosts and peers":    {nft("set routed { type ipv4_addr . ipv4_addr; flags timeout", `ip saddr . ip daddr @routed meta mark set 7`), "10.47.11.109 . 203.0.113.5 timeout 1h"},
		"of networks and ports": {nft("set routed { type ipv4_addr . inet_service; flags interval, timeout", `ip daddr . udp dport @routed meta mark set 7`), "203.0.113.4/31 . 5060-5069 timeout 1h"},
		"a map":                 {nft("map routed { type ipv4_addr : mark; flags timeout", `meta mark set ip daddr map @routed`), "203.0.113.5 timeout 1h : 7"},
		"a map for others":      {nft("map routed { type ipv4_addr : mark; flags timeout", `meta mark set ip daddr map @routed`), "* timeout 1h : 7"},
		"of ipset":              {ipset(lab.IPTablesNFT, "hash:ip timeout 3600", "--match-set routed dst"), "203.0.113.5"},
		"of ipset, with ports":  {ipset(lab.IPTablesNFT, "hash:ip,port,net", "--match-set routed src,dst,dst"), "10.47.11.109,udp:5060,203.0.113.4/31"},
		"of ipset, legacy":      {ipset(lab.IPTablesLegacy, "hash:net", "--match-set routed dst"), "203.0.113.4/31"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, second := twoUplinks(t, lab.Options{Rules: bothUplinks})
			s.Must(tc.mark(s))
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
			s.IP(s.Gateway, "rule add fwmark 7 table 109")
			s.Serve("--reconcile=1s")
			phone, peer, other := s.InsideSocket(0, 4444), s.PeerSocket(lab.PeerA, 5061), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, peer)
			s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
			s.Arrives(phone, other, ext)
			if from := s.Contact(phone, other); from != ext {
				t.Fatalf("the answer left as %v, not %v", from, ext)
			}
			s.Contact(phone, s.PeerSocket(lab.PeerB, 5061))
			elsewhere := s.PeerSocket(lab.PeerB, 5060) // it never enters the set
			s.Until("another peer gets in", func() bool { return s.GetsIn(phone, elsewhere, ext) })
			if strings.HasPrefix(name, "of ipset") {
				_, err := s.Gateway.Output("ipset", "add", "routed", tc.element)
				s.Must(err)
			} else {
				s.Must(s.NFT("add element inet marks routed { " + tc.element + " }"))
			}
			s.heals(phone, other, second)
			if from := s.Contact(phone, elsewhere); from != ext && name != "a map for others" {
				t.Errorf("to another peer the answer leaves as %v, not %v", from, ext)
			}
		})
	}
}
