package e2e

import (
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
