package e2e

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A packet that fakes the source of an inside host, by a link that is neither inside nor
// outside, passes as the user's firewall lets it, and earns no permission: not when it
// comes, and not from a daemon that starts later and reads the flows.
//
// Fails without the chain way_back, and when the daemon does not leave out what that
// remembers.
func TestNFTSourceByAnotherLinkEarnsNothing(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto, append(stage.Auto, "--learn=false")}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Guest: true}, mode...)
		for _, link := range []string{"all", "guest0"} {
			s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
		}
		victim := netip.AddrPortFrom(s.Inside(0).Addr, 7777)
		s.IP(s.Guest, "addr add "+victim.Addr().String()+"/32 dev lo")
		spoofer := s.Socket(s.Guest.Namespace, victim.Addr(), victim.Port())
		attacker := s.PeerSocket(lab.PeerA, 9)
		ext := netip.AddrPortFrom(s.Gateway.Addr, victim.Port())
		for _, payload := range []string{"one", "two", "three"} {
			s.Must(spoofer.Send(attacker.Addr(), payload))
			_, err := attacker.Expect(payload)
			s.Must(err)
		}
		s.Must(attacker.Send(ext, "an answer"))

		nothing := func(when string) {
			t.Helper()
			for _, p := range s.List() {
				if p.Int == victim {
					t.Errorf("%s: it earned %+v", when, p)
				}
			}
			for e := range s.entries() {
				if e.in == victim {
					t.Errorf("%s: the map has %v", when, e)
				}
			}
		}
		fence := s.InsideSocket(0, 5062)
		s.Stands(fence, attacker, s.Contact(fence, attacker))
		nothing("from the packet")
		s.Kill()
		s.Start(stage.Flags(mode)...)
		s.Stands(fence, attacker, s.Contact(fence, attacker))
		nothing("by another daemon")
	})
}
