package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Outside addresses that depend on the host or on the destination, and mappings.

// withAddresses returns a scene whose gateway has 198.51.100.8 to .11 on wan0 besides .1.
func withAddresses(t *testing.T, load func(s *scene) error) *scene {
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
	for _, addr := range []string{"198.51.100.8", "198.51.100.9", "198.51.100.10", "198.51.100.11"} {
		s.IP(s.Gateway, "addr add "+addr+"/32 dev wan0")
	}
	s.Must(load(s))
	return s
}

// byNFT and byIPTables load source NAT rules for packets that leave by wan0.
func byNFT(rules ...string) func(s *scene) error {
	return func(s *scene) error { return s.NFT(natChain("srcnat", rules...)) }
}

func byIPTables(variant string, rules ...string) func(s *scene) error {
	return func(s *scene) error {
		return s.IPTables(variant, "*nat\n-A POSTROUTING -o wan0 "+strings.Join(rules, "\n-A POSTROUTING -o wan0 ")+"\nCOMMIT\n")
	}
}

// Two hosts send from one port, and the rules give each its own outside address. Fails when
// the second one, whose port the first one has on its address, gets a port of the pool there.
func TestNFTHostKeepsTheAddressThatItsRuleGives(t *testing.T) {
	byHost := []string{"-s 10.47.11.110 -j SNAT --to-source 198.51.100.9", "-j MASQUERADE"}
	for name, tc := range map[string]struct {
		load func(s *scene) error
		want string
	}{
		"a rule for a host":       {byNFT("ip saddr 10.47.11.110 snat to 198.51.100.9", "masquerade"), "198.51.100.9"},
		"two addresses":           {byNFT("ip saddr 10.47.11.110 snat to 198.51.100.9", "snat to 198.51.100.8"), "198.51.100.9"},
		"a map":                   {byNFT("snat to ip saddr map { 10.47.11.109 : 198.51.100.8, 10.47.11.110 : 198.51.100.9 }"), "198.51.100.9"},
		"a prefix for a prefix":   {byNFT("snat ip prefix to ip saddr map { 10.47.11.108/30 : 198.51.100.8/30 }"), "198.51.100.10"},
		"iptables-nft":            {byIPTables(lab.IPTablesNFT, byHost...), "198.51.100.9"},
		"iptables-legacy":         {byIPTables(lab.IPTablesLegacy, byHost...), "198.51.100.9"},
		"a host untranslated":     {byNFT("ip saddr 10.47.11.0-10.47.11.109 masquerade"), "10.47.11.110"},
		"iptables-legacy, NETMAP": {byIPTables(lab.IPTablesLegacy, "-s 10.47.11.108/30 -j NETMAP --to 198.51.100.8/30"), "198.51.100.10"},
	} {
		t.Run(name, func(t *testing.T) {
			s := withAddresses(t, tc.load)
			s.Serve(stage.Auto[0], mapped)
			peer, host := s.PeerSocket(lab.PeerA, 5060), s.InsideSocket(1, 3074)
			first := s.Contact(s.InsideSocket(0, 3074), peer)
			ext := s.Contact(host, peer)
			if ext.Addr().String() != tc.want || ext.Addr() == first.Addr() {
				t.Errorf("they leave as %v and %v, want %s for the second one", first, ext, tc.want)
			}
			if tc.want != "10.47.11.110" {
				s.Arrives(host, s.PeerSocket(lab.PeerA, 5070), ext)
			}
			if w := s.Status().Warnings; len(w) > 0 {
				t.Errorf("warnings %q", w)
			}
		})
	}
}

// The rules change while conenatd runs. Fails when they are looked at only at the start.
func TestNFTHostKeepsTheAddressOfALaterRule(t *testing.T) {
	s := withAddresses(t, byNFT("masquerade"))
	s.Serve(stage.Auto[0], mapped)
	peer := s.PeerSocket(lab.PeerA, 5060)
	s.Contact(s.InsideSocket(0, 3074), peer)
	s.Must(s.NFT(`insert rule ip nat postrouting oifname "wan0" ip saddr 10.47.11.110 snat to 198.51.100.9`))
	s.Until("the rules know", func() bool {
		list, err := s.Gateway.Output("nft", "list", "chain", "ip", "conenat", "unmapped_wan0")
		s.Must(err)
		return !strings.Contains(list, "all have one address")
	})
	if ext := s.Contact(s.InsideSocket(1, 3074), peer); ext.Addr().String() != "198.51.100.9" {
		t.Errorf("it leaves as %v", ext)
	}
}

// A rule gives one destination another address, as a SIP trunk may demand, or leaves it
// untranslated, like a network behind a VPN router. Fails when a mapping from another
// destination decides.
func TestNFTMappingLeavesDestinationsWithAnotherAddress(t *testing.T) {
	const trunk, itself = "198.51.100.9", "10.47.11.109"
	for name, tc := range map[string]struct {
		load   func(s *scene) error
		want   string
		warned bool
	}{
		"nftables":                 {byNFT("ip daddr 203.0.113.6 snat to "+trunk, "masquerade"), trunk, false},
		"a set":                    {byNFT("ip daddr { 203.0.113.6, 203.0.113.8/30 } snat to "+trunk, "masquerade"), trunk, false},
		"iptables-legacy":          {byIPTables(lab.IPTablesLegacy, "-d 203.0.113.6 -j SNAT --to-source "+trunk, "-j MASQUERADE"), trunk, false},
		"by port":                  {byNFT("udp dport 5061 snat to "+trunk, "masquerade"), "", true},
		"accepted":                 {byNFT("ip daddr 203.0.113.6/31 accept", "masquerade"), itself, false},
		"all but a few":            {byNFT("ip daddr != 203.0.113.6/31 masquerade"), itself, false},
		"all but a set":            {byNFT("ip daddr != { 203.0.113.6, 203.0.113.8/30 } masquerade"), itself, false},
		"iptables-nft, returned":   {byIPTables(lab.IPTablesNFT, "-d 203.0.113.6/31 -j RETURN", "-j MASQUERADE"), itself, false},
		"iptables-legacy, all but": {byIPTables(lab.IPTablesLegacy, "! -d 203.0.113.6/31 -j MASQUERADE"), itself, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := withAddresses(t, tc.load)
			s.Serve(stage.Auto[0], mapped)
			phone, other := s.InsideSocket(0, 3074), s.PeerSocket(lab.PeerA, 5060)
			usual := s.Contact(phone, other)
			if !tc.warned {
				ext := s.Contact(phone, s.PeerSocket(lab.PeerB, 5060))
				if ext.Addr().String() != tc.want || ext.Addr() == usual.Addr() {
					t.Errorf("it leaves as %v, want %s, and elsewhere as %v", ext, tc.want, usual)
				}
				if tc.want == trunk {
					s.Arrives(phone, s.PeerSocket(lab.PeerB, 5070), ext)
				}
			}
			second := s.InsideSocket(1, 3074) // the pool is as good as without that rule
			if got := s.Contact(second, other); !tc.warned && !inPool(got) {
				t.Errorf("the second host leaves as %v", got)
			}
			if got := s.warns("mapping_exempt"); got != tc.warned {
				t.Errorf("warnings %q", s.Status().Warnings)
			}
		})
	}
}

// A rule gives hosts another outside address while both addresses stay on the link. As without
// conenatd, new flows have the address that the rules give now, and flows that live keep theirs.
//
// Fails when a mapping keeps the old address as long as it lives; when a living flow, answered
// or not, teaches the kernel that address again; and when a newcomer is moved to it.
func TestNFTMappingFollowsARuleToAnotherAddress(t *testing.T) {
	const all = `oifname "wan0" `
	for name, tc := range map[string]struct {
		before, after string
		want          string // addresses that the first host may have
		other         string // likewise of the second one, which sends from the same port
	}{
		"another address":        {"snat to 198.51.100.8", "snat to 198.51.100.9", "198.51.100.9", "198.51.100.9"},
		"no masquerade any more": {"masquerade", "snat to 198.51.100.9", "198.51.100.9", "198.51.100.9"},
		"a masquerade":           {"snat to 198.51.100.8", "masquerade", "198.51.100.1", "198.51.100.1"},
		"a rule for one host": {
			"masquerade", "ip saddr 10.47.11.109 snat to 198.51.100.9; add rule ip nat postrouting " + all + "masquerade",
			"198.51.100.9", "198.51.100.1",
		},
		"no rule for the host":   {"masquerade", "ip saddr 10.47.11.110 masquerade", "10.47.11.109", "198.51.100.1"},
		"no rule any more":       {"masquerade", "accept", "10.47.11.109", "10.47.11.110"},
		"no table any more":      {"snat to 198.51.100.8", "", "10.47.11.109", "10.47.11.110"},
		"a pool without the old": {"snat to 198.51.100.8", "snat to 198.51.100.10-198.51.100.11 persistent", "198.51.100.10 198.51.100.11", "198.51.100.10 198.51.100.11"},
	} {
		for _, answered := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, answered %v", name, answered), func(t *testing.T) {
				t.Parallel() // mostly it waits
				s := withAddresses(t, byNFT(tc.before))
				s.Serve(stage.Auto[0], mapped)
				old := s.PeerSocket(lab.PeerA, 5060)
				one, two := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074)
				ext := s.Contact(one, old)
				if answered {
					s.Arrives(one, old, ext)
				}
				s.Stands(one, old, ext)
				change := "delete table ip nat"
				if tc.after != "" {
					change = "flush chain ip nat postrouting; add rule ip nat postrouting " + all + tc.after
				}
				s.Must(s.NFT(change))
				port := uint16(6000)
				contact := func(host *lab.Socket) string {
					port++
					s.Contact(one, old) // it never falls silent
					peer, err := s.Outside.Socket(lab.PeerB, port)
					s.Must(err)
					defer peer.Close()
					return s.Contact(host, peer).Addr().String()
				}
				s.Until("new flows have the new address", func() bool { return oneOf(tc.want, contact(one)) })
				for range 20 {
					if got := contact(one); !oneOf(tc.want, got) {
						t.Fatalf("a new flow leaves by %s again, want %s", got, tc.want)
					}
				}
				if got := contact(two); !oneOf(tc.other, got) {
					t.Errorf("the other host leaves by %s, want %s", got, tc.other)
				}
				if got := s.Contact(one, old); got != ext {
					t.Errorf("the old flow left as %v, and leaves as %v", ext, got)
				}
				s.Stands(one, old, ext) // with its flow
			})
		}
	}
}

// oneOf reports whether got is one of the words.
func oneOf(words, got string) bool { return slices.Contains(strings.Fields(words), got) }

// A host reaches another one by hairpinning before it sent anything outside, and then from another
// port, once its address is known. The other one has an outside address of its own.
//
// Fails when a hairpinned flow gives its host a mapping on the address of the host that it went to,
// or does not use the address of its own host although that is known.
func TestNFTHairpinLeavesHostsTheirAddress(t *testing.T) {
	for name, tc := range map[string]struct {
		load func(s *scene) error
		want string // address of the second host; empty for any but the first one's
	}{
		"1:1 NAT":                 {byNFT("ip saddr 10.47.11.109 snat to 198.51.100.8", "masquerade"), "198.51.100.1"},
		"the other way":           {byNFT("ip saddr 10.47.11.110 snat to 198.51.100.8", "masquerade"), "198.51.100.8"},
		"a prefix for a prefix":   {byNFT("snat ip prefix to ip saddr map { 10.47.11.108/30 : 198.51.100.8/30 }"), "198.51.100.10"},
		"a range, persistent":     {byNFT("snat to 198.51.100.8-198.51.100.11 persistent"), ""},
		"iptables-nft":            {byIPTables(lab.IPTablesNFT, "-s 10.47.11.109 -j SNAT --to-source 198.51.100.8", "-j MASQUERADE"), "198.51.100.1"},
		"iptables-legacy, NETMAP": {byIPTables(lab.IPTablesLegacy, "-s 10.47.11.108/30 -j NETMAP --to 198.51.100.8/30"), "198.51.100.10"},
		"a host untranslated":     {byNFT("ip saddr 10.47.11.0-10.47.11.109 masquerade"), "10.47.11.110"},
	} {
		t.Run(name, func(t *testing.T) {
			s := withAddresses(t, tc.load)
			peer, owner, host := s.PeerSocket(lab.PeerA, 5060), s.InsideSocket(0, 5060), s.InsideSocket(1, 7000)
			if tc.want == "" {
				tc.want = s.Contact(host, peer).Addr().String()
				s.Must(s.Flush())
			}
			s.Serve(stage.Auto[0], mapped, "--hairpin")
			to := s.Contact(owner, peer)
			s.hairpins(host, owner, to)
			s.hairpins(host, owner, to) // a later packet of that flow
			ext := s.Contact(host, peer)
			if ext.Addr().String() != tc.want {
				t.Errorf("after hairpinning it leaves as %v, want %s", ext, tc.want)
			}
			s.hairpins(host, owner, to)
			if ext := s.Contact(host, peer); ext.Addr().String() != tc.want {
				t.Errorf("after another hairpinned packet it leaves as %v, want %s", ext, tc.want)
			}
			if tc.want == "10.47.11.110" {
				return
			}
			next := s.InsideSocket(1, 7001)
			if seen, ext := s.hairpins(next, owner, to), s.Contact(next, peer); seen != ext || ext.Addr().String() != tc.want {
				t.Errorf("from another port it hairpins as %v and leaves as %v, want %s", seen, ext, tc.want)
			}
			// The same port as the owner's, on another address.
			same := s.InsideSocket(1, 5060)
			if seen, ext := s.hairpins(same, owner, to), s.Contact(same, peer); seen != ext || ext.Port() != 5060 {
				t.Errorf("from the owner's port it hairpins as %v and leaves as %v", seen, ext)
			}
		})
	}
}

// hairpins sends a packet from an inside host to an outside endpoint of another one and returns the
// source that this one sees. An answer to it arrives.
func (s *scene) hairpins(from, owner *lab.Socket, to netip.AddrPort) netip.AddrPort {
	s.T.Helper()
	p := stage.Payload("hairpin")
	s.Must(from.Send(to, p))
	seen, err := owner.Expect(p)
	s.Must(err)
	s.Must(owner.Send(seen, p+" answer"))
	if back, err := from.Expect(p + " answer"); err != nil || back != to {
		s.T.Errorf("the answer to %v arrives from %v (%v), want %v", seen, back, err, to)
	}
	return seen
}

// The same with rules that choose the ports of hosts.
//
// Fails when a hairpinned flow has the address of the host that it goes to, or gives its host a
// mapping.
func TestNFTHairpinOfChosenPortsLeavesHostsTheirAddress(t *testing.T) {
	for name, tc := range map[string]struct {
		load func(s *scene) error
		want string
	}{
		"a rule for the owner": {byNFT("ip saddr 10.47.11.109 snat to 198.51.100.8", "masquerade to :20000-29999"), "198.51.100.1"},
		"a rule for the host":  {byNFT("ip saddr 10.47.11.110 snat to 198.51.100.8:20000-29999", "masquerade"), "198.51.100.8"},
		"rules for all":        {byNFT("ip saddr 10.47.11.110 snat to 198.51.100.8 random", "masquerade random"), "198.51.100.8"},
		"iptables-legacy":      {byIPTables(lab.IPTablesLegacy, "-s 10.47.11.109 -j SNAT --to-source 198.51.100.8", "-p udp -j MASQUERADE --to-ports 20000-29999"), "198.51.100.1"},
		"one address":          {byNFT("masquerade to :20000-29999"), "198.51.100.1"},
	} {
		t.Run(name, func(t *testing.T) {
			s := withAddresses(t, tc.load)
			peer, owner, host := s.PeerSocket(lab.PeerA, 5060), s.InsideSocket(0, 5060), s.InsideSocket(1, 7000)
			s.Serve(stage.Auto[0], mapped, "--hairpin")
			to := s.Contact(owner, peer)
			inside, known := netip.MustParseAddr("10.47.11.1"), netip.MustParseAddr(tc.want)
			unknown := inside
			if to.Addr() == known { // all have one address
				unknown = known
			}
			if seen := s.hairpins(host, owner, to); seen.Addr() != unknown {
				t.Errorf("before its address is known it hairpins as %v, want %v", seen, unknown)
			}
			ext := s.Contact(host, peer)
			if ext.Addr() != known {
				t.Errorf("after hairpinning it leaves as %v, want %v", ext, known)
			}
			next := s.InsideSocket(1, 7001) // it has no mapping
			if seen, ext := s.hairpins(next, owner, to), s.Contact(next, peer); seen.Addr() != known || ext.Addr() != known {
				t.Errorf("from another port it hairpins as %v and leaves as %v, want %v", seen, ext, known)
			}
		})
	}
}

// A rule of the user's reflects a forward: hosts reach it at the outside address, with an address of
// the gateway as their source. Such a flow is older than the mapping of the host that the forward
// leads to.
//
// Fails when that flow gives its host a mapping on an address that is not its own.
func TestNFTReflectedFlowTeachesNoOtherAddress(t *testing.T) {
	for name, tc := range map[string]struct{ reflect, forward, source string }{
		"the inside address":     {"masquerade", "198.51.100.1", "10.47.11.1"},
		"the address of another": {"snat to 198.51.100.8", "198.51.100.8", "198.51.100.8"},
	} {
		t.Run(name, func(t *testing.T) {
			s := withAddresses(t, func(s *scene) error {
				return s.NFT(natChain("srcnat", "ip saddr 10.47.11.109 snat to "+tc.forward, "masquerade") +
					"add rule ip nat postrouting ip saddr 10.47.11.0/24 ip daddr 10.47.11.0/24 " + tc.reflect +
					"\nadd chain ip nat prerouting { type nat hook prerouting priority dstnat; }" +
					"\nadd rule ip nat prerouting ip daddr " + tc.forward + " udp dport 5060 dnat to 10.47.11.109")
			})
			peer, owner, host := s.PeerSocket(lab.PeerA, 5060), s.InsideSocket(0, 5060), s.InsideSocket(1, 7000)
			to := netip.AddrPortFrom(netip.MustParseAddr(tc.forward), 5060)
			send := func() {
				p := stage.Payload("reflected")
				s.Must(host.Send(to, p))
				if seen, err := owner.Expect(p); err != nil || seen.Addr().String() != tc.source {
					t.Fatal(seen, err)
				}
			}
			send()
			s.Serve(stage.Auto[0], mapped, "--hairpin")
			if ext := s.Contact(owner, peer); ext != to {
				t.Fatal(ext)
			}
			if ext := s.Contact(s.InsideSocket(1, 8000), peer); ext.Addr().String() != "198.51.100.1" { // its address is known
				t.Fatal(ext)
			}
			send()
			if ext := s.Contact(host, peer); ext.Addr().String() != "198.51.100.1" {
				t.Errorf("it leaves as %v", ext)
			}
		})
	}
}
