package e2e

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Mappings beside VPNs, several uplinks, changing addresses and early packets.

// Packets into a VPN keep their source: by the VPN's own link, by IPsec on the
// outside link, or to exempt destinations. The last two fail without their condition
// in map_source.
func TestNFTMappingLeavesVPNsAlone(t *testing.T) {
	// The peers on the other side of the VPN know how to answer inside hosts.
	const back = "route add 10.47.11.0/24 via 198.51.100.1 dev eth0"
	for name, tc := range map[string]struct {
		exempt string // nft: what the user leaves untranslated
		flags  []string
		build  func(*scene)
	}{
		"a link of its own": {"", nil, func(s *scene) {
			s.AddLink("vpn0", "198.51.100.193")
			s.IP(s.Gateway, "route add 192.0.2.0/24 via 198.51.100.254 dev vpn0 onlink")
		}},
		"exempt destinations": {"ip daddr 192.0.2.0/24 accept", []string{"--mapping-exempt=192.0.2.0/24"}, func(s *scene) { s.IP(s.Outside, back) }},
		"IPsec": {"rt ipsec exists accept", nil, func(s *scene) {
			s.IP(s.Outside, back)
			s.tunnel()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2, Rules: strings.Replace(lab.Masquerade, `oifname "wan0"`, tc.exempt+"\n\t\t"+`oifname "wan0"`, 1)})
			tc.build(s)
			s.Start(append([]string{"--subnet", lab.InsideNet.String(), mapped}, tc.flags...)...)
			proxy, far := s.PeerSocket(lab.PeerA, 3074), s.PeerSocket(lab.PeerC, 3074)
			for i := range 2 {
				host := s.InsideSocket(i, 3074)
				ext := s.Contact(host, proxy)
				if got := s.Contact(host, far); got != host.Addr() {
					t.Errorf("host %d leaves as %v into the VPN", i, got)
				}
				if again := s.Contact(host, s.PeerSocket(lab.PeerA, 4000+uint16(i))); again != ext || (i > 0) != inPool(ext) {
					t.Errorf("host %d leaves as %v and as %v", i, ext, again)
				}
				s.Arrives(host, s.PeerSocket(lab.PeerA, 5000+uint16(i)), ext)
			}
		})
	}
}

// tunnel makes an IPsec tunnel between the gateway and the outside for what inside
// hosts and PeerC send to each other.
func (s *scene) tunnel() {
	s.T.Helper()
	const (
		gateway, remote = "198.51.100.1", "198.51.100.254"
		inside, far     = "10.47.11.0/24", "192.0.2.77/32"
		key             = "enc cbc(aes) 0x00112233445566778899aabbccddeeff auth hmac(sha256) " +
			"0x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	)
	state := "xfrm state add src " + gateway + " dst " + remote + " proto esp spi 0x100 reqid 1 mode tunnel " + key
	if out, err := s.Gateway.Output("ip", strings.Fields(state)...); err != nil {
		s.T.Skipf("this kernel has no ESP (CONFIG_INET_ESP, CONFIG_CRYPTO_CBC): %s %v", out, err)
	}
	tmpl := " tmpl src " + gateway + " dst " + remote + " proto esp reqid 1 mode tunnel"
	s.IP(s.Gateway, "xfrm policy add dir out src "+inside+" dst "+far+tmpl)
	s.IP(s.Outside, state)
	s.IP(s.Outside, "xfrm policy add dir in src "+inside+" dst "+far+tmpl)
}

// Each host has a mapping on the uplink that policy routing chooses. When that
// uplink goes away, the host gets a mapping on the other one, where another host
// already has its port.
func TestNFTMappingOnTwoUplinks(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 3, Rules: stage.UplinkRules})
		s.Start(stage.Flags(mode, mapped)...)
		second := s.AddUplink()
		s.Until("the daemon knows both uplinks", func() bool { return len(s.Status().Outside) == 2 })
		hosts, exts := s.consoles(3)
		s.Until("all permissions stand", func() bool { return s.Status().Permissions.Standing == 6 })
		for i, want := range []netip.Addr{s.Gateway.Addr, second, s.Gateway.Addr} {
			if exts[i].Addr() != want || inPool(exts[i]) != (i == 2) {
				t.Errorf("host %d leaves as %v", i, exts[i])
			}
			s.Arrives(hosts[i], s.PeerSocket(lab.PeerB, 20_000+uint16(i)), exts[i])
		}

		s.IP(s.Gateway, "link del wan1")
		s.Until("the permissions of the second uplink ended", func() bool { return s.Status().Permissions.Standing == 4 })
		ext := s.Contact(hosts[1], s.PeerSocket(lab.PeerA, 4000))
		if ext.Addr() != s.Gateway.Addr || !inPool(ext) || ext == exts[2] {
			t.Errorf("by the first uplink host 1 leaves as %v", ext)
		}
		last := s.PeerSocket(lab.PeerC, 3074)
		for i, want := range []netip.AddrPort{exts[0], ext, exts[2]} {
			if got := s.Contact(hosts[i], last); got != want {
				t.Errorf("host %d leaves as %v, want %v", i, got, want)
			}
		}
	})
}

// The outside address changes while ten hosts send from one port each. Each host has
// one outside endpoint before and one afterwards, and shares neither.
func TestNFTMappingsUnderLoadWhenTheAddressChanges(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT}, func(t *testing.T, mode ...string) {
		const n = 10
		s := play(t, lab.Options{Inside: n}, append(mode, mapped, "--max-permissions-per-host=0")...)
		hosts, exts := s.consoles(n)
		port, fence := uint16(10_000), s.Socket(s.Gateway.Namespace, lab.InsideNet.Addr().Next(), 7)
		stop := s.Steady(func() error {
			port = 10_000 + (port+n)%20_000
			for i, host := range hosts { // to remote endpoints that are new to the daemon
				if err := host.Send(netip.AddrPortFrom(lab.PeerC, port+uint16(i)), "load"); err != nil {
					return err
				}
			}
			// Wait for the gateway each round, so that the load loses no other
			// packets.
			return s.OnOnePort(fence, hosts[0], fence.Addr())()
		})
		remotes := []*lab.Socket{s.PeerSocket(lab.PeerA, 9), s.PeerSocket(lab.PeerB, 9), s.PeerSocket(lab.PeerC, 9)}
		const next = "198.51.100.77"
		s.IP(s.Outside, "route replace "+next+"/32 dev eth0")
		for _, step := range []string{
			"address add " + next + "/32 dev wan0",
			"address del 198.51.100.1/24 dev wan0",
			"route replace default via 198.51.100.254 dev wan0 onlink",
		} {
			s.IP(s.Gateway, step)
		}
		for i, host := range hosts {
			s.Until("the new address is in use", func() bool {
				exts[i] = s.Contact(host, remotes[0])
				return exts[i].Addr().String() == next
			})
		}
		if stop() == 0 {
			t.Error("there was no load")
		}
		seen := map[netip.AddrPort]bool{}
		for i, host := range hosts {
			for _, remote := range remotes[1:] {
				if got := s.Contact(host, remote); got != exts[i] {
					t.Errorf("host %d leaves as %v and as %v", i, exts[i], got)
				}
			}
			if seen[exts[i]] {
				t.Errorf("two hosts leave as %v", exts[i])
			}
			seen[exts[i]] = true
		}
		s.Until("nothing of the old address is left", func() bool {
			for _, name := range []string{
				"map kept_wan0", "map moved_wan0", "set owned", "map addresses_wan0", "set translated_wan0", "map permissions",
			} {
				kind, name, _ := strings.Cut(name, " ")
				out, err := s.Gateway.Output("nft", "list", kind, "ip", "conenat", name)
				s.Must(err)
				if firstAddress.MatchString(out) {
					return false
				}
			}
			return true
		})
	})
}

// A peer's packet arrives before the host has sent to that peer, and leaves a flow,
// before or after the mapping exists. The host is still reached and keeps its
// mapping. With the guard the packet leaves no flow.
func TestNFTMappingAndEarlyPackets(t *testing.T) {
	for name, tc := range map[string]struct{ guard, mapping bool }{
		"guard, packet first":  {true, false},
		"guard, mapping first": {true, true},
		"packet first":         {false, false},
		"mapping first":        {false, true},
	} {
		t.Run(name, func(t *testing.T) {
			flags := []string{mapped}
			if !tc.guard {
				flags = append(flags, "--guard=false")
			}
			s := play(t, lab.Options{}, flags...)
			phone, proxy, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
			early := replacePort(s.Contact(s.InsideSocket(0, 5061), s.PeerSocket(lab.PeerB, 9)), 5060)
			if tc.mapping {
				if ext := s.Contact(phone, other); ext != early {
					t.Fatalf("the phone leaves as %v", ext)
				}
			}
			s.Must(proxy.Send(early, stage.Payload("early")))
			if !tc.guard {
				s.flowFrom(proxy)
			}
			ext := s.Contact(phone, proxy)
			if (ext == early) != tc.guard {
				t.Errorf("towards the early sender it leaves as %v", ext)
			}
			s.Stands(phone, proxy, ext)
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
			if tc.guard || tc.mapping { // without a mapping, the flow that was moved made it
				ext = early
			}
			for port := uint16(6000); port < 6003; port++ {
				if got := s.Contact(phone, s.PeerSocket(lab.PeerB, port)); got != ext {
					t.Errorf("its mapping is %v, and it leaves as %v", ext, got)
				}
			}
		})
	}
}
