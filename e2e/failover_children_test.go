package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

const deadMeanwhile = "the daemon is dead meanwhile"

// Another port of a peer spoke first, and the inside host goes on sending to it: all that belongs
// to the child. When the way outside changes, these packets recover as the host's own flow does,
// which a masquerade ends. The peer still sends to the old address for a while.
//
// Fails when nobody ends the child, and where the old uplink still works, when the permission
// stays and lets the peer make it again.
func TestNFTChildHealsWhenTheWayOutsideChanges(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, tc := range map[string]struct {
		change []string // commands of ip
		addr   string
		gone   bool // the old address
	}{
		"by route":                        {[]string{"route replace default via 198.51.100.254 dev wan1 onlink"}, "198.51.100.129", false},
		"link down":                       {[]string{"link set wan0 down"}, "198.51.100.129", false},
		"by rule":                         {[]string{"rule add iif lan0 table 109"}, "198.51.100.129", false},
		"address moves to another uplink": {[]string{"address del 198.51.100.1/24 dev wan0"}, "198.51.100.129", true},
		"another address": {[]string{
			"address add 198.51.100.9/32 dev wan0", "address del 198.51.100.1/24 dev wan0", "address replace 198.51.100.9/24 dev wan0",
			"route replace default via 198.51.100.254 dev wan0",
		}, "198.51.100.9", true},
		"another link": {[]string{"link del wan0"}, "198.51.100.129", true},
	} {
		for mode, args := range map[string][]string{
			"auto": nil, "expect": {"--backend=expect"}, "nft": {"--backend=nft", "--learn=false"}, "mapping": {mapped},
			"every peer": {"--filtering=endpoint_independent"}, "a group": {"--peer-group=203.0.113.0/29"}, deadMeanwhile: nil,
		} {
			if mode != "auto" && mode != deadMeanwhile && name != "by rule" && name != "another address" {
				continue // two cases show the same for each mode
			}
			t.Run(name+", "+mode, func(t *testing.T) {
				t.Parallel()
				s, _ := twoUplinks(t, lab.Options{Rules: bothUplinks})
				s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
				s.Serve(append(args, "--reconcile=1h")...)
				s.Until("both uplinks are known", func() bool { return len(s.Status().Outside) == 2 })
				phone, peer, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 7000)
				ext := s.Contact(phone, peer)
				s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
				s.Arrives(phone, other, ext)
				if from := s.Contact(phone, other); from != ext {
					t.Fatalf("the answer left as %v, not %v", from, ext)
				}
				if mode == deadMeanwhile {
					s.Kill()
				}
				for _, change := range tc.change {
					s.IP(s.Gateway, change)
				}
				if name == "another link" {
					s.IP(s.Outside, "address replace 198.51.100.254/32 dev wan1") // it was lost with the link
				}
				if mode == deadMeanwhile {
					s.Serve("--reconcile=1h")
				}
				addr := netip.MustParseAddr(tc.addr)
				t.Logf("healed after %v", s.heals(phone, other, addr))
				if !tc.gone {
					s.Until("no permission stands at the old address", func() bool {
						return !slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.Ext == ext })
					})
					late := s.PeerSocket(lab.PeerA, 7002)
					s.Must(late.Send(ext, stage.Payload("to the old address")))
					if from := s.Contact(phone, late); from.Addr() != addr {
						t.Fatalf("to a port that sent to the old address it leaves as %v", from)
					}
				}
				s.heals(phone, peer, addr)
				ext = s.Contact(phone, peer)
				another := s.PeerSocket(lab.PeerA, 7001)
				s.Until("another port gets in again", func() bool { return s.GetsIn(phone, another, ext) })
			})
		}
	}
}

// The same where it is less plain by which link packets leave, or what the rules do there.
//
// Fails when several next hops keep a child at a link that is down, when marks that no packet has
// are taken into account, and when a rule of which it is not known whether it matches hides that
// no outcome is the old address.
func TestNFTChildHealsWhereWaysAreLessPlain(t *testing.T) {
	t.Parallel() // mostly it waits
	const hops = "route replace default nexthop via 198.51.100.254 dev wan0 onlink nexthop via 198.51.100.254 dev wan1 onlink"
	toTheOther := []string{"route replace default via 198.51.100.254 dev wan1 onlink"}
	rules := func(s string) string {
		return "table ip nat { chain post { type nat hook postrouting priority srcnat; " + s + "; }; }"
	}
	for name, tc := range map[string]struct {
		rules        string
		hops         bool
		untranslated bool // by the second uplink
		change       []string
	}{
		"wg-quick": {bothUplinks, false, false, []string{
			"route add default via 198.51.100.254 dev wan1 onlink table 51820",
			"rule add not fwmark 51820 table 51820", "rule add table main suppress_prefixlength 0",
		}},
		"one of several next hops": {bothUplinks, true, false, nil},
		"from the LAN alone":       {rules(`iifname "lan0" oifname "wan*" masquerade`), false, false, toTheOther},
		"IPsec is exempt":          {rules(`oifname "wan*" rt ipsec exists return; oifname "wan*" masquerade`), false, false, toTheOther},
		"a mark is exempt":         {rules(`meta mark & 0x80000 == 0x80000 return; oifname "wan*" masquerade`), false, false, toTheOther},
		"an uplink without NAT":    {lab.Masquerade, false, true, toTheOther},
		"a connmark is exempt":     {rules(`ct mark 0x99 accept; oifname "wan*" masquerade`), false, false, toTheOther},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, second := twoUplinks(t, lab.Options{Rules: tc.rules})
			if tc.hops {
				s.IP(s.Gateway, hops)
			}
			s.Serve("--reconcile=1h")
			phone, peer, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 7000)
			ext := s.Contact(phone, peer)
			s.Arrives(phone, other, ext)
			s.Contact(phone, other)
			switch {
			case tc.hops && ext.Addr() == second:
				second = netip.MustParseAddr("198.51.100.1")
				tc.change = []string{"link set wan1 down"}
			case tc.hops:
				tc.change = []string{"link set wan0 down"}
			}
			for _, c := range tc.change {
				s.IP(s.Gateway, c)
			}
			if tc.untranslated {
				second = phone.Addr().Addr()
			}
			s.heals(phone, other, second)
		})
	}
}

// After a failover the user's rules give hosts the first uplink's address on the second as well. What
// ended because its address was wrong comes back.
//
// Fails when only a change of routes lets flows give such permissions again.
func TestNFTPermissionComesBackWithTheRules(t *testing.T) {
	s, second := twoUplinks(t, lab.Options{Rules: bothUplinks})
	s.Serve("--reconcile=1h")
	phone, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, peer)
	stands := func() bool {
		return slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.Ext == ext })
	}
	s.Until("a permission stands", stands)
	s.IP(s.Gateway, "route replace default via 198.51.100.254 dev wan1 onlink")
	s.heals(phone, peer, second)
	s.Until("it ends", func() bool { return !stands() })
	s.Must(s.NFT("insert rule ip nat postrouting oifname wan1 snat to 198.51.100.1"))
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5060")
	s.Must(err)
	if again := s.Contact(phone, peer); again != ext {
		t.Fatalf("the host has %v, want %v", again, ext)
	}
	s.Until("it stands again", stands)
}

// A route changes that no flow uses. Children live on, and their permissions stand, where the
// outside address is not that of the link by which packets leave, and was not before.
//
// Fails when an address that masquerade took from another link is taken for a wrong one, and
// when one packet's way is taken for that of all ports.
func TestNFTChildStaysWhenAnotherRouteChanges(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, prepare := range map[string]func(s *scene){
		"the uplink has no address": func(s *scene) {
			s.IP(s.Gateway, "address add 198.51.100.1/32 dev lo")
			s.IP(s.Gateway, "address del 198.51.100.1/24 dev wan0")
			s.IP(s.Gateway, "route replace default via 198.51.100.254 dev wan0 onlink")
			s.IP(s.Gateway, "link del wan1")
		},
		"one address on both uplinks": func(s *scene) { s.IP(s.Gateway, "address add 198.51.100.1/32 dev wan1") },
		"an address on lo for some ports": func(s *scene) {
			s.IP(s.Gateway, "address add 198.51.100.9/32 dev lo")
			s.IP(s.Outside, "route replace 198.51.100.9/32 via 198.51.100.1")
			s.Must(s.NFT("insert rule ip nat postrouting oifname wan0 udp sport 5060 snat to 198.51.100.9"))
		},
		"several next hops, by ports": func(s *scene) {
			s.sysctl("net/ipv4/fib_multipath_hash_policy", "1")
			s.IP(s.Gateway, "route replace default nexthop via 198.51.100.254 dev wan0 onlink nexthop via 198.51.100.254 dev wan1 onlink")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, _ := twoUplinks(t, lab.Options{Rules: bothUplinks})
			prepare(s)
			s.Serve("--reconcile=1h", "--log-level=debug")
			var phones, others []*lab.Socket
			var exts []netip.AddrPort
			peer := s.PeerSocket(lab.PeerA, 5060)
			for i := range uint16(6) {
				phone, other := s.InsideSocket(0, 5060+i), s.PeerSocket(lab.PeerA, 7000+i)
				ext := s.Contact(phone, peer)
				s.Arrives(phone, other, ext)
				s.Contact(phone, other) // the child is answered
				phones, others, exts = append(phones, phone), append(others, other), append(exts, ext)
			}
			standing, ids := s.Status().Permissions.Standing, s.insideIDs()
			s.looksAfter("route add 192.0.2.128/25 via 10.47.11.109 dev lan0")
			if now := s.Status().Permissions.Standing; now != standing {
				t.Errorf("%d permissions stand of %d", now, standing)
			}
			if after := s.insideIDs(); !slices.Equal(after, ids) {
				t.Errorf("flows before: %v, after: %v", ids, after)
			}
			for i := range phones {
				s.Arrives(phones[i], others[i], exts[i])
				s.Arrives(phones[i], s.PeerSocket(lab.PeerA, 7100+uint16(i)), exts[i])
			}
		})
	}
}

// A routing rule leads what hosts send to some ports of peers by another uplink. Where a port of
// the peer speaks first, to the address of the other uplink, the host's packets to it leave as
// they would without the child; and the permission stays, for ports that go the same way.
//
// Fails when a child with a wrong address is not noticed as it begins, when its permission ends,
// and when another child does.
func TestNFTRoutingRuleForPortsOutweighsAChild(t *testing.T) {
	t.Parallel() // mostly it waits
	first, second := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.129")
	for name, tc := range map[string]struct {
		own, other uint16 // ports of the peer that the host sent to, and that speaks first
		addr       netip.Addr
		right      uint16 // another port that speaks first
	}{
		"the host sends by the default route": {5070, 5060, second, 5071},
		"the host sends by the rule":          {5060, 5070, first, 5061},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, _ := twoUplinks(t, lab.Options{Rules: bothUplinks})
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
			s.IP(s.Gateway, "rule add iif lan0 ipproto udp dport 5060-5069 table 109")
			s.Serve("--reconcile=1h")
			phone, peer := s.InsideSocket(0, 4444), s.PeerSocket(lab.PeerA, tc.own)
			right, other := s.PeerSocket(lab.PeerA, tc.right), s.PeerSocket(lab.PeerA, tc.other)
			ext := s.Contact(phone, peer)
			s.Arrives(phone, right, ext)
			s.Contact(phone, right)
			s.Arrives(phone, other, ext)
			s.heals(phone, other, tc.addr)
			s.Arrives(phone, right, ext)
			s.Arrives(phone, s.PeerSocket(lab.PeerA, tc.right+1), ext)
		})
	}
}

// The same where rules mark what hosts send to some ports, packet by packet, and routing rules select
// by the mark.
//
// Fails when each mark that a routing rule selects by counts as one of the packet, and when one
// counts that another packet gets.
func TestNFTMarkForPortsOutweighsAChild(t *testing.T) {
	t.Parallel() // mostly it waits
	nft := func(rules string) func(s *scene) error {
		return func(s *scene) error {
			return s.NFT("table inet marks { chain some { udp dport 5060-5069 meta mark set 7; }; " +
				"chain pre { type filter hook prerouting priority mangle; " + rules + "; }; }")
		}
	}
	ipt := func(variant, rules string) func(s *scene) error {
		return func(s *scene) error {
			return s.IPTables(variant, "*mangle\n:some -\n-A PREROUTING "+rules+"\nCOMMIT\n")
		}
	}
	const byPort = "-i lan0 -p udp --dport 5060:5069 -j MARK --set-mark 7"
	for name, tc := range map[string]struct {
		mark func(s *scene) error
		args []string
	}{
		"by nftables":          {nft(`iifname "lan0" udp dport 5060-5069 meta mark set 7`), nil},
		"by nftables, expect":  {nft(`iifname "lan0" udp dport 5060-5069 meta mark set 7`), []string{"--backend=expect"}},
		"by a map":             {nft(`meta mark set udp dport map { 5060-5069 : 7, 5070-5079 : 8 }`), nil},
		"behind a jump":        {nft(`ip saddr 10.47.11.0/24 jump some`), nil},
		"without another mark": {nft(`meta mark 0 iifname "lan0" udp dport { 5060, 5061 } meta mark set 7`), nil},
		"saved for the flow":   {nft(`meta mark set ct mark; iifname "lan0" udp dport 5060-5069 meta mark set 7; ct mark set meta mark`), nil},
		"by iptables-nft":      {ipt(lab.IPTablesNFT, byPort), nil},
		"by iptables-legacy":   {ipt(lab.IPTablesLegacy, byPort), nil},
		"by iptables-legacy, in a chain": {
			ipt(lab.IPTablesLegacy, "-i lan0 -p udp -m multiport --dports 5060,5061 -j some\n-A some -m mark --mark 0 -j MARK --set-xmark 7/0xf"), nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, second := twoUplinks(t, lab.Options{Rules: bothUplinks})
			s.Must(tc.mark(s))
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
			s.IP(s.Gateway, "rule add fwmark 7/0xf table 109")
			s.Serve(append(tc.args, "--reconcile=1h")...)
			phone, peer := s.InsideSocket(0, 4444), s.PeerSocket(lab.PeerA, 5090)
			right, other := s.PeerSocket(lab.PeerA, 5091), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, peer)
			s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
			s.Arrives(phone, right, ext)
			s.Contact(phone, right)
			s.Arrives(phone, other, ext)
			s.heals(phone, other, second)
			s.Arrives(phone, right, ext)
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
		})
	}
}

// What hosts send to some ports leaves by the second uplink, and so does what answers a flow that came
// by it, because its connmark says so. A child on the second uplink stays, though its host's packets
// to that port would leave by the first without it.
//
// Fails when the connmark of a child counts as 0, as that of a new flow is, and when its host's
// packets count as new.
func TestNFTConnmarkKeepsAChildOnItsUplink(t *testing.T) {
	t.Parallel() // mostly it waits
	const saved = `iifname "wan1" ct mark set 7; iifname "lan0" meta mark set ct mark; `
	for name, rules := range map[string]string{
		"restored":      saved + `iifname "lan0" udp dport 5060 meta mark set 7`,
		"for new flows": saved + `iifname "lan0" ct state new meta mark set 0; iifname "lan0" udp dport 5060 meta mark set 7`,
		"of a flow":     `iifname "wan1" ct mark set 8; iifname "lan0" meta mark set 0; iifname "lan0" ct mark 8 meta mark set 7; iifname "lan0" udp dport 5060 meta mark set 7`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, second := twoUplinks(t, lab.Options{Rules: bothUplinks})
			s.Must(s.NFT("table inet marks { chain pre { type filter hook prerouting priority mangle; " + rules + "; }; }"))
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
			s.IP(s.Gateway, "rule add fwmark 7 table 109")
			s.Serve("--reconcile=1h", "--log-level=debug")
			phone, peer, other := s.InsideSocket(0, 4444), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5090)
			ext := s.Contact(phone, peer)
			if ext.Addr() != second {
				t.Fatalf("it left as %v", ext)
			}
			s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
			s.IP(s.Outside, "route replace 198.51.100.129/32 dev wan1")
			s.Arrives(phone, other, ext)
			if from := s.Contact(phone, other); from != ext {
				t.Fatalf("the answer left as %v, not %v", from, ext)
			}
			ids := s.insideIDs()
			s.looksAfter("route add 192.0.2.128/25 via 10.47.11.109 dev lan0")
			if after := s.insideIDs(); !slices.Equal(after, ids) {
				t.Errorf("flows before: %v, after: %v", ids, after)
			}
			if from := s.Contact(phone, other); from != ext {
				t.Errorf("the answer leaves as %v, not %v", from, ext)
			}
		})
	}
}

// Many children begin at once, and the last has a wrong address.
//
// Fails when only the first are looked at.
func TestNFTWrongChildAmongManyEnds(t *testing.T) {
	s, second := twoUplinks(t, lab.Options{Rules: bothUplinks})
	s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
	s.IP(s.Gateway, "rule add iif lan0 ipproto udp dport 5060 table 109")
	s.Serve("--reconcile=1h")
	phone, peer := s.InsideSocket(0, 4444), s.PeerSocket(lab.PeerA, 5070)
	ext := s.Contact(phone, peer)
	s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
	var peers []*lab.Socket
	for i := range uint16(150) {
		peers = append(peers, s.PeerSocket(lab.PeerA, 7000+i))
	}
	last := s.PeerSocket(lab.PeerA, 5060)
	for _, p := range append(peers, last) {
		s.Must(p.Send(ext, stage.Payload("at once")))
	}
	s.heals(phone, last, second)
}

// looksAfter changes routes and waits until the daemon has looked at flows because of that.
func (s *scene) looksAfter(change string) {
	s.T.Helper()
	last := func(message string) int { return strings.LastIndex(s.Daemon.Output(), message) }
	const changed, looked = "routes changed", "looked for flows that leave by another link"
	before := last(changed)
	s.IP(s.Gateway, change)
	s.Until("it looked at flows", func() bool {
		return last(changed) > before && last(looked) > last(changed)
	})
}

// forSeveralPeers are flags that give permissions for several peers.
var forSeveralPeers = map[string][]string{
	"every peer": {"--filtering=endpoint_independent"},
	"a group":    {"--peer-group=203.0.113.0/24"},
}

// The way to one peer moves to another uplink. What others may send by the same permission still
// gets in.
//
// Fails when a permission for several peers ends with the way to one of them.
func TestNFTWayToOnePeerLeavesOthersAlone(t *testing.T) {
	for name, args := range forSeveralPeers {
		t.Run(name, func(t *testing.T) {
			s, _ := twoUplinks(t, lab.Options{Rules: bothUplinks})
			s.Serve(append(args, "--reconcile=1s", "--log-level=debug")...)
			phone, peer, moved := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
			ext := s.Contact(phone, peer)
			s.Contact(phone, moved)
			s.Arrives(phone, s.PeerSocket(lab.PeerB, 7000), ext)
			s.looksAfter("route add " + lab.PeerB.String() + "/32 via 198.51.100.254 dev wan1 onlink")
			s.heals(phone, moved, netip.MustParseAddr("198.51.100.129"))
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 7000), ext)
		})
	}
}

// Peers came in by a wide permission, and their host answers them. It sends of its own to another
// one alone, and the way to that moves to another uplink. The permission stays for the others.
//
// Fails when only what the host sends of its own says whether an address is right.
func TestNFTWayToOnePeerLeavesChildrenAlone(t *testing.T) {
	for name, args := range forSeveralPeers {
		t.Run(name, func(t *testing.T) {
			s, second := twoUplinks(t, lab.Options{Rules: bothUplinks})
			s.Serve(append(args, "--reconcile=1s", "--log-level=debug")...)
			console, server, player := s.InsideSocket(0, 3074), s.PeerSocket(lab.PeerB, 5060), s.PeerSocket(lab.PeerA, 7000)
			ext := s.Contact(console, server)
			s.Arrives(console, player, ext)
			s.Contact(console, player)
			s.looksAfter("route add " + lab.PeerB.String() + "/32 via 198.51.100.254 dev wan1 onlink")
			s.heals(console, server, second)
			s.looksAfter("route add 192.0.2.128/25 via 10.47.11.109 dev lan0")
			s.Arrives(console, s.PeerSocket(lab.PeerA, 7001), ext)
		})
	}
}

// Two ports of a host have permissions for a peer and children. A routing rule moves what one of
// them sends to another uplink. The permission of the other stays, though it only answers a child.
//
// Fails when permissions of one host for one peer are judged by one of them.
func TestNFTWayOfOnePortLeavesTheOtherAlone(t *testing.T) {
	s, second := twoUplinks(t, lab.Options{Rules: bothUplinks})
	s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
	s.Serve("--reconcile=1h", "--log-level=debug")
	moved, stays := s.InsideSocket(0, 4000), s.InsideSocket(0, 4100)
	peer, other := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 7000)
	s.Contact(moved, peer)
	ext := s.Contact(stays, peer)
	s.Arrives(stays, other, ext)
	s.Contact(stays, other)
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "4100", "--orig-port-dst", "5060")
	s.Must(err)
	s.looksAfter("rule add iif lan0 ipproto udp sport 4000 table 109")
	s.heals(moved, peer, second)
	s.looksAfter("route add 192.0.2.128/25 via 10.47.11.109 dev lan0")
	s.Arrives(stays, s.PeerSocket(lab.PeerA, 7001), ext)
}

// A host has a permission for each of two groups of peers, at one outside address. The way to one
// group moves to another uplink: the permission for it ends, and the other stays.
//
// Fails when both are judged by one of them.
func TestNFTWayToOneGroupLeavesTheOtherAlone(t *testing.T) {
	groups := []string{"--peer-group=203.0.113.0/24", "--peer-group=192.0.2.0/24"}
	for _, moved := range []string{"203.0.113.0/24", "192.0.2.0/24"} {
		t.Run(moved, func(t *testing.T) {
			s, _ := twoUplinks(t, lab.Options{Rules: bothUplinks})
			s.Serve(append(groups, "--reconcile=1s")...)
			phone := s.InsideSocket(0, 5060)
			peers := []*lab.Socket{s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerC, 5060)}
			ext := s.Contact(phone, peers[0])
			s.Contact(phone, peers[1])
			s.IP(s.Gateway, "route add "+moved+" via 198.51.100.254 dev wan1 onlink")
			stands := func(group string) bool {
				return slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.Ext == ext && p.Peers.String() == group })
			}
			s.Until("the permission for the group that moved ends", func() bool { return !stands(moved) })
			for _, peer := range peers {
				if group := netip.PrefixFrom(peer.Addr().Addr(), 24).Masked().String(); group != moved && !stands(group) {
					t.Errorf("the permission for %s ended, too", group)
				}
			}
		})
	}
}
