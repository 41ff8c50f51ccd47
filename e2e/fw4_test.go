package e2e

import (
	"os"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// OpenWrt's fw4 reloads by one transaction, which flushes its table and fills it again.
//
// Fails when a permission ends by that, or lets in somebody else, so that the service in
// deploy/openwrt would have to do something.
func TestReloadOfFW4LeavesPermissions(t *testing.T) {
	rules, err := os.ReadFile("../internal/userrules/testdata/firewalls/fw4.nft")
	if err != nil {
		t.Fatal(err)
	}
	s := play(t, lab.Options{Rules: string(rules)})
	console, proxy := s.InsideSocket(0, 3074), s.PeerSocket(lab.PeerA, 3074)
	stranger := s.PeerSocket(lab.PeerB, 3074)
	ext := s.Contact(console, proxy)
	s.Stands(console, proxy, ext)
	early := s.PeerSocket(lab.PeerA, 5070)
	s.Arrives(console, early, ext)

	s.Must(s.NFT("flush table inet fw4\n" + string(rules)))
	s.Arrives(console, early, ext)
	s.Arrives(console, s.PeerSocket(lab.PeerA, 5071), ext)
	s.Lost(console, stranger, ext, proxy)
	s.Verified()
}
