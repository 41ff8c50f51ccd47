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

// A road warrior with an address of the LAN comes by an outside link, and only a rule of
// policy routing leads back to it: by a mark that the packet has when it comes, or that
// its answers get. Its packets pass.
//
// Fails when the chain spoofed does not know of marks.
func TestNFTRoadWarriorByPolicyRoutingPasses(t *testing.T) {
	const warrior, far = "10.47.11.200", "192.0.2.99"
	for name, when := range map[string]string{
		"marked as it comes":     `iifname "wan0" ip saddr 10.47.11.200 meta mark set 7`,
		"marked on its way back": `iifname "lan0" ip daddr 10.47.11.200 meta mark set 7`,
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Rules: lab.Masquerade + `table ip marks { chain pre {
				type filter hook prerouting priority mangle; ` + when + `; }; }`})
			for _, link := range []string{"all", "wan0"} {
				s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
			}
			s.IP(s.Gateway, "rule add fwmark 7 lookup 100")
			s.IP(s.Gateway, "route add "+warrior+"/32 via 198.51.100.254 dev wan0 table 100")
			s.IP(s.Outside, "addr add "+warrior+"/32 dev lo")
			s.IP(s.Outside, "route add table local unicast "+far+"/32 via 198.51.100.1")
			s.Start(stage.Flags(stage.Auto)...)
			from := s.Socket(s.Outside.Namespace, netip.MustParseAddr(warrior), 5060)
			s.Must(from.Send(netip.MustParseAddrPort(far+":5060"), "x"))
			s.Until("the packet passed", func() bool { return len(s.ConntrackList("-p", "udp", "--orig-src", warrior)) > 0 })
			if n := s.Status().Tables.Guard.Spoofed; n != 0 {
				t.Errorf("%d packets were dropped", n)
			}
		})
	}
}
