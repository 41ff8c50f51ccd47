package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A forward is in the way of an expectation only if it may take a peer's packets.
// The tests set the reconcile to one hour, so changes must take effect without it.

// inChain are rules of a chain of nftables that forwards.
func inChain(rules string) func(s *scene) error {
	return func(s *scene) error {
		return s.NFT(lab.Masquerade + "table ip fw { set provider { type ipv4_addr; flags interval; elements = { 203.0.113.0/24 }; }; " +
			"chain pre { type nat hook prerouting priority dstnat; " + rules + "; }; }")
	}
}

// inPrerouting is a rule of iptables that forwards.
func inPrerouting(variant, rule string) func(s *scene) error {
	return func(s *scene) error {
		return s.IPTables(variant, lab.IPTablesMasquerade+"*nat\n-A PREROUTING -i wan0 -p udp "+rule+"\nCOMMIT\n")
	}
}

// The forward matches only peers in 203.0.113.0/24; other peers get their permission.
//
// Fails when the source match of a forward is not read, or not used.
func TestForwardForSomePeersBarsNoOthers(t *testing.T) {
	t.Parallel() // mostly it waits
	const to = " dnat to 10.47.11.110"
	for name, load := range map[string]func(s *scene) error{
		"nftables, a prefix":  inChain(`iifname "wan0" ip saddr 203.0.113.0/24 udp dport 5060-5069` + to),
		"nftables, a range":   inChain(`ip saddr 203.0.113.1-203.0.113.9 udp dport 5060` + to),
		"nftables, a set":     inChain(`ip saddr { 203.0.113.5, 203.0.113.64/26 } udp dport 5060` + to),
		"nftables, a name":    inChain(`ip saddr @provider udp dport 5060` + to),
		"nftables, 20,000":    inChain(`ip saddr @provider udp dport 5060` + to + `; }; set provider { type ipv4_addr; flags interval; elements = { ` + prefixes(20_000) + ` }`),
		"iptables-nft":        inPrerouting(lab.IPTablesNFT, "-s 203.0.113.0/24 --dport 5060 -j DNAT --to-destination 10.47.11.110"),
		"iptables-legacy":     inPrerouting(lab.IPTablesLegacy, "-s 203.0.113.0/24 --dport 5060 -j DNAT --to-destination 10.47.11.110"),
		"iptables-legacy, to": inPrerouting(lab.IPTablesLegacy, "-s 203.0.113.0/24 --dport 5060 -j DNAT --to-destination 10.47.11.110:5060"),
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
			s.Must(load(s))
			s.Start(stage.Flags(stage.Expect, "--reconcile=1h")...)
			phone, server := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
			other, provider := s.PeerSocket(lab.PeerC, 9), s.PeerSocket(lab.PeerA, 9)
			ext := s.Contact(phone, other)
			s.Stands(phone, other, ext)
			s.Arrives(phone, s.PeerSocket(lab.PeerC, 10), ext)
			s.Contact(phone, provider)
			if p := s.Listed(phone, provider, ext, "refused"); p.Reason != "forwarded" {
				t.Errorf("reason %q", p.Reason)
			}
			s.Arrives(server, s.PeerSocket(lab.PeerA, 10), ext)
			s.Arrives(phone, provider, ext) // its own flow
		})
	}
}

// prefixes are n networks that do not touch.
func prefixes(n int) string {
	var s strings.Builder
	for i := range n {
		fmt.Fprintf(&s, "11.%d.%d.%d/32,", i>>15, i>>7&0xff, i<<1&0xff)
	}
	return s.String()
}

// Beside a firewall that drops DNATed children the map would not help the peers that the
// forward does not match.
//
// Fails when those peers get no expectation.
func TestAutoGivesOthersThanThoseOfAForwardExpectations(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.DropPolicy})
	s.forwardsForProviderAlone("udp dport 5060 dnat to 10.47.11.110")
}

// forwardsForProviderAlone plays with a rule that forwards packets of the provider, peer A, to
// the second host. The provider's permission stands in the map, behind the rule; that of
// another peer by an expectation.
func (s *scene) forwardsForProviderAlone(rule string) {
	s.T.Helper()
	s.Must(inChain(`iifname "wan0" ip saddr 203.0.113.0/24 ` + rule)(s))
	s.Must(s.NFT("insert rule inet filter forward ip daddr 10.47.11.110 accept"))
	s.Start(stage.Flags(stage.Auto, "--reconcile=1h")...)
	s.carried("expect+nft")
	phone, server := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
	other, provider := s.PeerSocket(lab.PeerC, 9), s.PeerSocket(lab.PeerA, 9)
	ext := s.Contact(phone, other)
	if p := s.Listed(phone, other, ext, "standing"); p.Backend != "expect+nft" {
		s.T.Errorf("it stands by %q", p.Backend)
	}
	s.Arrives(phone, s.PeerSocket(lab.PeerC, 10), ext)
	s.Contact(phone, provider)
	if p := s.Listed(phone, provider, ext, "standing"); p.Backend != "nft" {
		s.T.Errorf("the provider's stands by %q", p.Backend)
	}
	s.Arrives(server, s.PeerSocket(lab.PeerA, 10), ext)
}

// The forward's port match is not understood, but its source match is. The forward wins,
// like any other.
//
// Fails when an expectation stands where the forward may match, when none stands where it cannot, and
// when explain says that the packet is lost, which the firewall would drop only if the forward did not
// take it.
func TestAutoLeavesTheWayOfAForwardThatIsNotUnderstood(t *testing.T) {
	stage.NeedsExpect(t)
	for _, rule := range []string{
		"udp dport & 0xf000 != 0x2000 dnat to 10.47.11.110",
		"udp dport & 1 != 1 jump led",
		"ip saddr . udp dport != { 203.0.113.9 . 5070 } dnat to 10.47.11.110",
	} {
		t.Run(rule, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2, Rules: lab.DropPolicy})
			s.Must(s.NFT("table ip fw { chain led { dnat to 10.47.11.110; }; }"))
			s.forwardsForProviderAlone(rule)
			if st := s.Status(); !stage.Warned(st, "a forward is not understood") {
				t.Errorf("warnings: %q", st.Warnings)
			}
			s.explained("203.0.113.5:11", netip.AddrPortFrom(s.Gateway.Addr, 5060), "unknown", "firewall", nowhere)
		})
	}
}

// The sources of a forward are in a named set, which changes and then becomes too long to
// read.
//
// Fails when the set is not read again, and when an unread set counts as empty.
func TestForwardForASetOfPeersFollowsTheSet(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
	s.Must(inChain("ip saddr @provider udp dport 5060 dnat to 10.47.11.110")(s))
	s.Start(stage.Flags(stage.Expect, "--reconcile=1h")...)
	phone, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerC, 9)
	ext := s.Contact(phone, peer)
	s.Stands(phone, peer, ext)
	s.Must(s.NFT("add element ip fw provider { 192.0.2.64/26 }"))
	s.Listed(phone, peer, ext, "refused")
	s.Must(s.NFT("delete element ip fw provider { 192.0.2.64/26 }"))
	s.Stands(phone, peer, ext)
	var long []string
	for i := range 1<<15 + 1 { // more than userrules reads
		long = append(long, fmt.Sprintf("100.%d.%d.%d", 64+i>>15, i>>7&0xff, i&0x7f*2))
	}
	s.Must(s.NFT("add element ip fw provider { " + strings.Join(long, ", ") + " }"))
	s.Listed(phone, peer, ext, "refused")
}

// A UPnP lease moves from one console to the other and back, then ends.
//
// Fails when a permission that was refused because of a forward waits for its next retry.
func TestPermissionFollowsAForwardThatMoves(t *testing.T) {
	t.Parallel() // mostly it waits
	lease := func(to string) string {
		return "flush chain ip upnp prerouting; add rule ip upnp prerouting iifname \"wan0\" udp dport 5060 dnat to " + to
	}
	steps := []struct {
		nft, iptables string
		state, reason string
	}{
		{lease("10.47.11.110:5060"), "-t nat -A PREROUTING -i wan0 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.110:5060", "refused", "forwarded"},
		{lease("10.47.11.109:5060"), "-t nat -R PREROUTING 1 -i wan0 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109:5060", "refused", "forwarded_here"},
		{lease("10.47.11.110:5060"), "-t nat -R PREROUTING 1 -i wan0 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.110:5060", "refused", "forwarded"},
		{"flush chain ip upnp prerouting", "-t nat -F PREROUTING", "standing", ""},
	}
	for _, variant := range []string{"nftables", lab.IPTablesNFT, lab.IPTablesLegacy} {
		t.Run(variant, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
			if variant == "nftables" {
				s.Must(s.NFT(lab.Masquerade + "table ip upnp { chain prerouting { type nat hook prerouting priority dstnat; }; }"))
			} else {
				s.Must(s.IPTables(variant, lab.IPTablesMasquerade))
			}
			s.Start(stage.Flags(stage.Expect, "--reconcile=1h")...)
			phone, server, peer := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 9)
			ext := s.Contact(phone, peer)
			s.Stands(phone, peer, ext)
			for i, step := range steps {
				if variant == "nftables" {
					s.Must(s.NFT(step.nft))
				} else {
					s.iptablesOf(variant, step.iptables)
				}
				s.Until("it is "+step.state+" "+step.reason, func() bool { return s.Listed(phone, peer, ext, step.state).Reason == step.reason })
				to := phone
				if step.reason == "forwarded" {
					to = server
				}
				s.Arrives(to, s.PeerSocket(lab.PeerA, uint16(10+i)), ext)
			}
		})
	}
}

// Without root the daemon cannot know all rules, so it also believes flows. What a flow of a
// known rule showed is forgotten with that rule, though the flow lives on.
//
// Fails when a flow that a known rule explains counts as evidence of an unknown rule.
func TestForwardThatAFlowShowsIsForgottenWithItsRule(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
	s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade))
	s.Must(s.NFT(forward))
	s.Exe = s.unprivileged()
	s.Start(stage.Flags(stage.Expect, "--reconcile=1h")...)
	phone, server, peer := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 9)
	ext := s.Contact(phone, peer)
	s.Listed(phone, peer, ext, "refused")
	user := s.PeerSocket(lab.PeerC, 9)
	s.Arrives(server, user, ext)
	s.readAgain()
	s.Must(s.NFT("delete table ip forwards"))
	s.Stands(phone, peer, ext)
	s.Arrives(server, user, ext) // it lives on
	s.readAgain()
	s.Stands(phone, peer, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 10), ext)
}

// readAgain makes the daemon read all flows.
func (s *scene) readAgain() {
	s.T.Helper()
	if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
		s.T.Fatalf("exit %d, %q", code, out)
	}
}
