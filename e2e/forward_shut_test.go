package e2e

import (
	"net/netip"
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
		"others are open": {loadOneToOne, accepts("ip daddr 10.47.11.109 tcp dport 443 accept", "ip daddr 10.47.11.110 udp dport 5060 accept")},
		"the map passes":  {loadOneToOne, accepts("ct label 126 accept")},
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
	s := newScene(t, lab.Options{Rules: lab.NoRules})
	s.Must(loadOneToOne(s))
	s.Must(s.NFT(lab.DropPolicy + `table ip inward { chain post { type nat hook postrouting priority srcnat + 1; oifname "lan0" ct status dnat masquerade; }; }
table inet filter { chain forwarded { }; }
insert rule inet filter forward jump forwarded
`))
	s.Serve(stage.Auto[0], "--reconcile=1h")
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
}

// The same for IPv6 behind source NAT.
func TestForwardOverIPv6ThatTheFirewallDropsLeavesTheExpectation(t *testing.T) {
	ownMode(t)
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: lab.DropPolicy + `table ip6 nat {
	chain post { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }
	chain pre { type nat hook prerouting priority dstnat; iifname "wan0" dnat to 2001:db8:47::109; }
}
`})
	s.Start("--subnet", lab.InsideNet6.String(), "--reconcile=1h")
	phone, peer := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5060), s.Socket(s.Outside.Namespace, lab.Peer6A, 5060)
	ext := s.Contact(phone, peer)
	s.Stands(phone, peer, ext)
	s.Arrives(phone, s.Socket(s.Outside.Namespace, lab.Peer6A, 7000), ext)
	s.Lost(phone, s.Socket(s.Outside.Namespace, lab.Peer6B, 7000), ext, peer)
}
