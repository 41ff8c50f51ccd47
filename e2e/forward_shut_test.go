package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A forward leads to the host that has the permission, and the firewall drops what it forwards: 1:1
// NAT behind a firewall that accepts RELATED alone. The host's peers get in by expectations.

// oneToOne is 1:1 NAT for the first host.
const oneToOne = `table ip one { chain post { type nat hook postrouting priority srcnat - 1; ip saddr 10.47.11.109 oifname "wan0" snat to 198.51.100.2; }
	chain pre { type nat hook prerouting priority dstnat; ip daddr 198.51.100.2 dnat to 10.47.11.109; }; }
`

func loadOneToOne(s *scene) error {
	s.IP(s.Gateway, "address add 198.51.100.2/24 dev wan0")
	return s.NFT(oneToOne + lab.Masquerade)
}

// netmapped gives the hosts from 10.47.11.108 on the addresses from 198.51.100.8 on.
const netmapped = "snat ip prefix to ip saddr map { 10.47.11.108/30 : 198.51.100.8/30 }"

// loadNetmap adds these addresses and loads rules.
func loadNetmap(load ...func(s *scene) error) func(s *scene) error {
	return func(s *scene) error {
		for _, addr := range []string{"198.51.100.9", "198.51.100.10"} {
			s.IP(s.Gateway, "address add "+addr+"/32 dev wan0")
		}
		for _, l := range load {
			if err := l(s); err != nil {
				return err
			}
		}
		return nil
	}
}

func byNFTForward(rule string) func(s *scene) error {
	return func(s *scene) error {
		return s.NFT(`table ip fw { chain pre { type nat hook prerouting priority dstnat; iifname "wan0" ` + rule + "; }; }\n")
	}
}

func byNetmap(variant string) func(s *scene) error {
	return func(s *scene) error {
		return s.IPTables(variant, `*nat
-A PREROUTING -i wan0 -d 198.51.100.8/30 -j NETMAP --to 10.47.11.108/30
-A POSTROUTING -o wan0 -s 10.47.11.108/30 -j NETMAP --to 198.51.100.8/30
COMMIT
`)
	}
}

// accepts adds rules to the forward chain of lab.DropPolicy, before the others.
func accepts(rules ...string) func(s *scene) {
	return func(s *scene) {
		for _, r := range rules {
			s.Must(s.NFT("insert rule inet filter forward " + r))
		}
	}
}

// Fails when the forward keeps the expectation away although the firewall drops what it forwards.
func TestForwardThatTheFirewallDropsLeavesTheExpectation(t *testing.T) {
	ownMode(t)
	stage.NeedsExpect(t)
	t.Parallel() // mostly it waits
	const to = " dnat to 10.47.11.109"
	for name, tc := range map[string]struct {
		load func(s *scene) error
		also func(s *scene)
	}{
		"1:1 NAT":         {load: loadOneToOne},
		"a port":          {load: inChain(`iifname "wan0" udp dport 5060` + to)},
		"a DMZ host":      {load: inChain(`iifname "wan0"` + to)},
		"iptables-nft":    {load: inPrerouting(lab.IPTablesNFT, "--dport 5060 -j DNAT --to-destination 10.47.11.109")},
		"iptables-legacy": {load: inPrerouting(lab.IPTablesLegacy, "--dport 5060 -j DNAT --to-destination 10.47.11.109:5060")},
		"prefixes":        {load: loadNetmap(byNFT(netmapped), byNFTForward("dnat ip prefix to ip daddr map { 198.51.100.8/30 : 10.47.11.108/30 }"))},
		"a prefix":        {load: loadNetmap(byNFT(netmapped), byNFTForward("ip daddr 198.51.100.8/30 dnat prefix to 10.47.11.108/30"))},
		"NETMAP":          {load: loadNetmap(byNetmap(lab.IPTablesNFT))},
		"legacy's NETMAP": {load: loadNetmap(byNetmap(lab.IPTablesLegacy))},
		"others are open": {loadOneToOne, accepts("ip daddr 10.47.11.109 tcp dport 443 accept", "ip daddr 10.47.11.110 udp dport 5060 accept")},
		"the map passes":  {loadOneToOne, accepts("ct label 126 accept")},
		"other ports":     {loadOneToOne, accepts("ip daddr 10.47.11.109 udp dport { 53, 10000-20000 } accept")},
		"its other ports": {loadNetmap(byNetmap(lab.IPTablesNFT)), accepts("ip daddr 10.47.11.109 udp dport 53 accept", "ip daddr 10.47.11.108 accept")},
		"other peers":     {loadOneToOne, accepts("ip saddr 192.0.2.0/24 ip daddr 10.47.11.109 accept")},
		"multiport": {loadOneToOne, func(s *scene) {
			s.Must(s.IPTables(lab.IPTablesNFT, "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -i lan0 -j ACCEPT\n-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n"+
				"-A FORWARD -d 10.47.11.109 -p udp -m multiport --dports 53,10000:20000 -j ACCEPT\nCOMMIT\n"))
			accepts("ip daddr 10.47.11.109 accept")(s)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, mode := range [][]string{stage.Auto, stage.Expect} {
				t.Run(mode[0][2:], func(t *testing.T) {
					s := newScene(t, lab.Options{Rules: lab.NoRules})
					s.Must(tc.load(s))
					s.Must(s.NFT(lab.DropPolicy))
					if tc.also != nil {
						tc.also(s)
					}
					s.Start(stage.Flags(mode, "--reconcile=1h")...)
					phone, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
					ext := s.Contact(phone, peer)
					if p := s.Listed(phone, peer, ext, "standing"); p.Reason != "" {
						t.Errorf("list has %+v", p)
					}
					s.Arrives(phone, s.PeerSocket(lab.PeerA, 7000), ext)
					s.Lost(phone, s.PeerSocket(stranger, 7000), ext, peer)
					s.Verified()
					if st := s.Status(); len(st.Warnings) > 0 && name != "a DMZ host" {
						t.Errorf("warnings: %q", st.Warnings)
					}
				})
			}
		})
	}
}

// The user opens the port, and closes it again. While it is open, the forward wins: the host gets the
// packets with the source that rules give them.
//
// Fails when what the firewall lets through is read at the start alone.
func TestForwardWinsOnceTheFirewallLetsItThrough(t *testing.T) {
	ownMode(t)
	stage.NeedsExpect(t)
	for _, mode := range [][]string{stage.Auto, stage.Expect} {
		t.Run(mode[0], func(t *testing.T) {
			s := newScene(t, lab.Options{Rules: lab.NoRules})
			s.Must(loadOneToOne(s))
			s.Must(s.NFT(lab.DropPolicy + `table ip inward { chain post { type nat hook postrouting priority srcnat + 1; oifname "lan0" ct status dnat masquerade; }; }
table inet filter { chain forwarded { }; }
insert rule inet filter forward jump forwarded
`))
			s.Serve(append(slices.Clone(mode), "--reconcile=1h")...)
			phone, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, peer)
			reason := func(want string) func() bool {
				return func() bool { p := s.List(); return len(p) == 1 && p[0].Reason == want }
			}
			s.Until("an expectation carries it", reason(""))
			child := s.PeerSocket(lab.PeerA, 7000)
			s.Arrives(phone, child, ext)

			s.Must(s.NFT("add rule inet filter forwarded ip daddr 10.47.11.109 udp dport 5060 accept"))
			s.Until("the forward takes it", reason("forwarded_here"))
			for _, from := range []*lab.Socket{child, s.PeerSocket(lab.PeerA, 7001)} {
				p := stage.Payload("by the forward")
				s.Must(from.Send(ext, p))
				if source, err := phone.Expect(p); err != nil || source.Addr() != netip.MustParseAddr("10.47.11.1") {
					t.Errorf("%v, %v", source, err)
				}
			}

			s.Must(s.NFT("flush chain inet filter forwarded"))
			s.Until("an expectation carries it again", reason(""))
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 7002), ext)
			s.Lost(phone, s.PeerSocket(stranger, 7000), ext, peer)
		})
	}
}

// Ports of the pool on the address of masquerades are nobody's but those of mappings, if 1:1 NAT
// forwards all ports of other addresses.
//
// Fails when the pool counts as forwarded.
func TestOneToOneNATLeavesThePoolToOthers(t *testing.T) {
	for name, load := range map[string]func(s *scene) error{
		"a host":   loadOneToOne,
		"prefixes": loadNetmap(byNFT(netmapped, "masquerade"), byNFTForward("ip daddr 198.51.100.8/30 dnat prefix to 10.47.11.108/30")),
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Rules: lab.NoRules})
			s.Must(load(s))
			s.Serve(stage.Auto[0], mapped)
			if st := s.Status(); len(st.Warnings) > 0 {
				t.Errorf("warnings: %q", st.Warnings)
			}
		})
	}
}

// Prefix translation of IPv6 (NPTv6), which forwards all ports of a prefix, and a masquerade.
func TestForwardOverIPv6ThatTheFirewallDropsLeavesTheExpectation(t *testing.T) {
	ownMode(t)
	stage.NeedsExpect(t)
	for name, rules := range map[string][2]string{
		"a host":   {"masquerade", "dnat to 2001:db8:47::109"},
		"prefixes": {"snat ip6 prefix to ip6 saddr map { 2001:db8:47::/64 : 2001:db8:fffe::/64 }", "dnat ip6 prefix to ip6 daddr map { 2001:db8:fffe::/64 : 2001:db8:47::/64 }"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{IPv6: true, Rules: fmt.Sprintf(`%s table ip6 nat {
				chain post { type nat hook postrouting priority srcnat; oifname "wan0" %s; }
				chain pre { type nat hook prerouting priority dstnat; iifname "wan0" %s; }
			}`, lab.DropPolicy, rules[0], rules[1])})
			s.IP(s.Outside, "route add 2001:db8:fffe::/64 via 2001:db8:ffff::1")
			s.admitsOverIPv6()
		})
	}
}

// admitsOverIPv6 starts a daemon, and shows that a peer gets in from another port, and a stranger does not.
func (s *scene) admitsOverIPv6() {
	s.T.Helper()
	s.Start("--subnet", lab.InsideNet6.String(), "--reconcile=1h")
	phone, peer := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5060), s.Socket(s.Outside.Namespace, lab.Peer6A, 5060)
	ext := s.Contact(phone, peer)
	s.Stands(phone, peer, ext)
	s.Arrives(phone, s.Socket(s.Outside.Namespace, lab.Peer6A, 7000), ext)
	s.Lost(phone, s.Socket(s.Outside.Namespace, lab.Peer6B, 7000), ext, peer)
}
