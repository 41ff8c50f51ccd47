package e2e

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// Without the sign of life that it renews, the kernel would learn nothing an hour after the start.
func TestNFTDaemonRenewsItsSignOfLife(t *testing.T) {
	s := play(t, lab.Options{}, "--lifetime=10h", "--reconcile=1s") // new tables have one for an hour
	s.Until("the daemon renews its sign of life", func() bool {
		list, err := s.Gateway.Output("nft", "list", "set", "ip", "conenat", "alive")
		return err == nil && strings.Contains(list, "timeout 10h expires 9h5")
	})
}

// A daemon that was killed long ago: the kernel learns nothing more, and the next daemon
// goes on.
//
// Fails when tables learn for ever that nobody attends any more.
func TestNFTTablesOfADeadDaemonLearnForALimitedTime(t *testing.T) {
	s := play(t, lab.Options{Inside: 2})
	proxy := s.PeerSocket(lab.PeerA, 5060)
	s.Kill()
	phone := s.InsideSocket(0, 5060)
	ext := s.Contact(phone, proxy)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Must(s.NFT("flush set ip conenat alive")) // as if the time had run out
	other := s.InsideSocket(1, 5061)
	ext = s.Contact(other, proxy)
	s.Lost(other, s.PeerSocket(lab.PeerA, 5071), ext, proxy)
	s.Serve()
	s.Arrives(other, s.PeerSocket(lab.PeerA, 5072), ext)
	next := s.InsideSocket(1, 5062)
	s.Arrives(next, s.PeerSocket(lab.PeerA, 5073), s.Contact(next, proxy))
}
