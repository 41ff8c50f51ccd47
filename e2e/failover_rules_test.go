package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// The user's rules give hosts the first uplink's address on the second one as well, so a child is
// right after packets have moved there, until these rules change. No route changes then, and no
// event tells: the next reconcile finds the child in its own reading of the flows.
//
// Fails when the reconcile does not look for such children, and when it reads all flows once more
// for that.
func TestNFTChildHealsWhenTheRulesChange(t *testing.T) {
	s, second := twoUplinks(t, lab.Options{Rules: bothUplinks})
	s.Must(s.NFT("insert rule ip nat postrouting oifname wan1 snat to 198.51.100.1"))
	s.Serve("--reconcile=1s", "--log-level=debug")
	phone, peer, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 7000)
	ext := s.Contact(phone, peer)
	s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
	s.Arrives(phone, other, ext)
	s.Contact(phone, other)
	ids := s.insideIDs()
	s.looksAfter("route replace default via 198.51.100.254 dev wan1 onlink")
	s.Kill() // its successor heard of no child that began
	s.Serve("--reconcile=1s", "--log-level=debug")
	if after := s.insideIDs(); !slices.Equal(after, ids) {
		t.Fatalf("flows before: %v, after: %v", ids, after)
	}
	looks := func() int { return strings.Count(s.Daemon.Output(), "looked for flows that leave by another link") }
	before := looks()
	s.Must(s.NFT("flush chain ip nat postrouting; add rule ip nat postrouting oifname { wan0, wan1 } masquerade"))
	s.heals(phone, other, second)
	if n := looks(); n != before {
		t.Errorf("all flows were read %d times more", n-before)
	}
}

// otherRules name the outside address, but not for what the host under test sends to its peer.
var otherRules = map[string]string{
	"for another host":        "ip saddr 10.47.11.200 snat to 198.51.100.1",
	"for another destination": "ip daddr 192.0.2.200 snat to 198.51.100.1",
}

// anotherAddress gives the outside link another address.
func (s *scene) anotherAddress() netip.Addr {
	s.T.Helper()
	s.IP(s.Gateway, "address add 198.51.100.9/32 dev wan0")
	s.IP(s.Gateway, "address del 198.51.100.1/24 dev wan0")
	s.IP(s.Gateway, "address replace 198.51.100.9/24 dev wan0")
	s.IP(s.Gateway, "route replace default via 198.51.100.254 dev wan0")
	return netip.MustParseAddr("198.51.100.9")
}

// A masquerade translates the host, and the gateway gets another address. A rule for others names
// the old one: what they send may have it again when it comes back. The host's packets to a port of
// its peer that spoke first recover as all others do.
//
// Fails when a rule that names the old address keeps the children of every host.
func TestNFTChildHealsWhereARuleForOthersNamesItsAddress(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, rule := range otherRules {
		for _, backend := range []string{"auto", "nft", "expect"} {
			t.Run(name+", "+backend, func(t *testing.T) {
				s := play(t, lab.Options{Rules: natChain("srcnat", rule, "masquerade")}, "--reconcile=1h", "--backend="+backend)
				phone, peer, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 7000)
				ext := s.Contact(phone, peer)
				s.Until("another port gets in", func() bool { return s.GetsIn(phone, other, ext) })
				s.Contact(phone, other)
				addr := s.anotherAddress()
				s.heals(phone, other, addr)
				s.heals(phone, peer, addr)
				ext = s.Contact(phone, peer)
				another := s.PeerSocket(lab.PeerA, 7001)
				s.Until("another port gets in again", func() bool { return s.GetsIn(phone, another, ext) })
			})
		}
	}
}

// A rule names the address of the host's own packets: they keep it while it is away, and so do
// those to a port that spoke first. The flows of another host heal by the same look.
//
// Fails when such a child ends.
func TestNFTChildStaysWhereARuleNamesItsAddress(t *testing.T) {
	s := play(t, lab.Options{Inside: 2, Rules: natChain("srcnat", "ip saddr 10.47.11.109 snat to 198.51.100.1", "masquerade")}, "--reconcile=1h")
	peer, other := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 7000)
	phone, second := s.InsideSocket(0, 5060), s.InsideSocket(1, 5062)
	answers := func(host *lab.Socket) {
		ext := s.Contact(host, peer)
		s.Until("another port gets in", func() bool { return s.GetsIn(host, other, ext) })
		s.Contact(host, other)
	}
	answers(phone)
	ids := s.insideIDs()
	answers(second)
	addr := s.anotherAddress()
	s.heals(second, other, addr)
	s.Verified()
	s.stay(ids)
}

// stay checks that the flows of hosts with some IDs are still there.
func (s *scene) stay(ids []string) {
	s.T.Helper()
	after := s.insideIDs()
	for _, id := range ids {
		if !slices.Contains(after, id) {
			s.T.Errorf("flows before: %v, after: %v", ids, after)
		}
	}
}
