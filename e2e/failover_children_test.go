package e2e

import (
	"net/netip"
	"slices"
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
