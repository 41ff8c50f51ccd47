package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Conntrack zones for one direction, for both, and of a bridge with its own firewall.

// zonesOf sets a zone for the original direction alone, on packets that come by a link or
// that the gateway itself sends by it; elements map links to zones. VyOS does so for links in
// a VRF.
func zonesOf(elements string) string {
	return `table inet vrf_zones {
	map ct_iface_map { typeof iifname : ct zone; elements = { ` + elements + ` }; }
	chain vrf_zones_ct_in { type filter hook prerouting priority raw; counter ct original zone set iifname map @ct_iface_map; }
	chain vrf_zones_ct_out { type filter hook output priority raw; counter ct original zone set oifname map @ct_iface_map; }
}
`
}

var zonesByDirection = map[string]string{
	"inside link":                `"lan0" : 250`,
	"outside link":               `"wan0" : 251`,
	"each link has one":          `"lan0" : 250, "wan0" : 251`,
	"both links are in one, VRF": `"lan0" : 250, "wan0" : 250`,
}

// keepUnanswered raises the timeout so that no flow ends by itself during a test.
func (s *scene) keepUnanswered() {
	s.T.Helper()
	s.sysctl("net.netfilter.nf_conntrack_udp_timeout", "600")
}

// Only the zone in which answers come in matters: flows with a zone for the original
// direction share the outside endpoints of zone 0. The kernel learns them; children are seen
// and dropped.
//
// Fails when the rules test the zone of the original direction, when the model takes it for a
// child's zone, and when a child is not queried in the zone in which it came.
func TestNFTZonesByDirection(t *testing.T) {
	for name, elements := range zonesByDirection {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.NFTByEvent}, func(t *testing.T, mode ...string) {
				s := newScene(t, lab.Options{Rules: lab.Masquerade + zonesOf(elements)})
				s.keepUnanswered()
				s.Serve(append(mode, "--reconcile=1s")...)
				phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
				ext := s.Contact(phone, proxy)
				s.Stands(phone, proxy, ext)
				s.zonesAreServed()
				if len(mode) == 1 {
					port := uint16(5080)
					s.Until("the kernel learns", func() bool {
						port++
						s.Contact(phone, s.PeerSocket(lab.PeerC, port))
						return s.Status().Tables.Map.Learned > 0
					})
				}
				child := s.PeerSocket(lab.PeerA, 5070)
				s.Arrives(phone, child, ext)
				s.Lost(phone, s.PeerSocket(lab.PeerB, 5060), ext, proxy)
				s.Until("it is listed with its child", func() bool {
					p := s.Listed(phone, proxy, ext, "standing")
					return p.Children == 1 && p.Zone == 0
				})
				s.Verified()
				if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, ext.String()); code != 0 || !strings.Contains(out, "revoked ") {
					t.Fatalf("exit %d, %q", code, out)
				}
				s.Until("the child is dropped", func() bool { return len(s.ConntrackList("-p", "udp", "--orig-port-src", "5070")) == 0 })
				s.Lost(phone, child, ext, proxy)
			})
		})
	}
}

// In each of these set-ups every host has one outside port, and is reached there.
func TestNFTMappingWithZonesByDirection(t *testing.T) {
	for name, elements := range zonesByDirection {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 3, Rules: lab.Masquerade + zonesOf(elements)}, stage.Auto[0], mapped, "--reconcile=1s")
			s.Contact(s.InsideSocket(0, 5080), s.PeerSocket(lab.PeerC, 5080))
			s.zonesAreServed()
			hosts, exts := s.consoles(3)
			for i, ext := range exts {
				if (ext.Port() == 3074) != (i == 0) || i > 0 && !inPool(ext) {
					t.Errorf("host %d leaves as %v", i, ext)
				}
				s.Arrives(hosts[i], s.PeerSocket(lab.PeerA, uint16(20_000+i)), ext)
			}
		})
	}
}

// zonesAreServed waits until the rules serve packets in a zone. The first flow in a zone
// triggers that, of an inside host or of the gateway itself.
func (s *scene) zonesAreServed() {
	s.T.Helper()
	ntp, err := s.Gateway.Socket(s.Gateway.Addr, 123)
	s.Must(err)
	defer ntp.Close()
	s.Must(ntp.Send(netip.AddrPortFrom(lab.PeerB, 123), stage.Payload("what time is it")))
	s.Until("the rules serve zones", func() bool { return !s.zonesAreLeft() })
}

// zonesAreLeft reports whether the rules ignore packets in a zone.
func (s *scene) zonesAreLeft() bool {
	s.T.Helper()
	rules, err := s.Gateway.Output("nft", "list", "chain", "ip", "conenat", "admit")
	s.Must(err)
	return strings.Contains(rules, "ct zone 0")
}

// Before any flow showed a zone, a packet in one reaches nobody: it may belong to another
// network.
//
// Fails when the rules serve zones from the start.
func TestNFTZonesAreLeftWithoutEvidence(t *testing.T) {
	s := play(t, lab.Options{Rules: lab.Masquerade + `table inet zones {
	chain c { type filter hook prerouting priority raw; iifname "wan0" udp sport 5070 ct original zone set 251; }
}
`}, stage.NFT...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
}

// A host that is not enabled has a zone for both directions, and so its own outside
// endpoints. From then on the rules ignore zones, even after its flow has ended.
//
// Fails when only flows of enabled hosts count, and when a snapshot resets this.
func TestNFTZoneOfBothDirectionsOfAnotherHost(t *testing.T) {
	s := play(t, lab.Options{Guest: true, Rules: lab.Masquerade + `table inet zones {
	chain c {
		type filter hook prerouting priority raw
		iifname "lan0" ct original zone set 250
		iifname "guest0" ct zone set 260
		iifname "wan0" udp dport 7000 ct zone set 260
		iifname "wan0" udp sport 5070 ct original zone set 251
	}
}
`}, append(slices.Clone(stage.NFT), "--reconcile=1s")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.zonesAreServed()
	s.Contact(s.Socket(s.Guest.Namespace, s.Guest.Addr, 7000), proxy)
	s.Until("zones are left alone", s.zonesAreLeft)
	s.Must(s.Flush())
	ext = s.Contact(phone, proxy)
	s.Until("it stands", func() bool { return len(s.List()) > 0 })
	s.Verified()
	s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
}

// Tenants with the same addresses, each in its own zone for the original direction, must not
// share mappings or permissions: the rules ignore zones again, and status says so.
//
// Fails when only one of a subnet's zones is noted.
func TestNFTTenantsWithTheSameAddresses(t *testing.T) {
	const tenants = `table inet tenants { chain c { type filter hook prerouting priority raw
		iifname "lan0" udp sport < 6000 ct original zone set 250
		iifname "lan0" udp sport >= 6000 ct original zone set 251
	}; }
`
	s := play(t, lab.Options{Rules: lab.Masquerade + tenants}, stage.Auto[0], mapped, "--reconcile=1s")
	proxy := s.PeerSocket(lab.PeerA, 5060)
	s.Contact(s.InsideSocket(0, 5060), proxy)
	s.Until("the first tenant is served", func() bool { return !s.zonesAreLeft() })
	s.Contact(s.InsideSocket(0, 6060), proxy)
	s.Until("zones are left alone", func() bool { return s.zonesAreLeft() && s.warns("several conntrack zones") })
	s.Until("their flows have no mapping", func() bool { return s.Status().Tables.Mapping.NotApplied["conntrack_zone"] == 2 })
}

// The rules go on serving zones after the last flow in a zone ended, and after a restart.
//
// Fails when a snapshot without such a flow, or a start, resets this.
func TestNFTZonesAreRemembered(t *testing.T) {
	s := newScene(t, lab.Options{Rules: lab.Masquerade + zonesOf(zonesByDirection["outside link"])})
	s.keepUnanswered()
	mode := append(slices.Clone(stage.NFT), "--reconcile=1s")
	s.Serve(mode...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	s.Contact(phone, proxy)
	s.zonesAreServed()
	s.Must(s.Flush())
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Verified()
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Kill()
	s.Must(s.Flush())
	s.Serve(mode...)
	ext = s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
}

// One packet in a zone does not move a subnet's permissions away from working expectations, and is told
// until an expectation admits a peer later.
//
// Fails when such a packet makes the map carry them, and when it is told for an hour.
func TestOnePacketInAZoneLeavesExpectations(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
	s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy + zonesOf(zonesByDirection["inside link"]) + `table inet one {
	chain c { type filter hook prerouting priority raw; iifname "wan0" ip saddr ` + lab.PeerB.String() + ` ct original zone set 251; }
}
`}, stage.Auto[0], "--reconcile=1s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.zonesAreServed()
	s.carried("expect+nft")
	s.Must(s.PeerSocket(lab.PeerB, 9).Send(netip.AddrPortFrom(s.Gateway.Addr, 9), "unsolicited"))
	s.Until("it is seen", func() bool { return s.warns("conntrack zone") })
	s.carried("expect+nft")
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.UntilIn(3*time.Minute, "it is over", func() bool { return !s.warns("conntrack zone") })
	s.carried("expect+nft")
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), s.Contact(phone, proxy))
}

// A bridge without an address of the gateway passes a packet on to a route, so the packet
// leaves the bridge. A host on it that fakes a peer's address gets nothing in.
//
// Fails when the rule of chain child exempts everything that comes by such a bridge.
func TestPeerFakedByABridgeGetsNothing(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{Inside: 2})
	s.IP(s.Gateway, "link add br9 type bridge forward_delay 0")
	s.IP(s.Gateway, "link set lan0p1 master br9")
	s.LinkUp("br9")
	for _, link := range []string{"all", "br9"} {
		s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
	}
	s.Serve(stage.Expect...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	faker := s.Inside(1)
	s.IP(faker, "addr add "+lab.PeerA.String()+"/32 dev lo")
	s.IP(faker, "neigh del "+lab.InsideNet.Addr().Next().String()+" dev eth0") // the neighbour entry of lan0
	fake := s.Socket(faker.Namespace, lab.PeerA, 5070)
	s.Until("it is dropped", func() bool { // the bridge may first have to learn where hosts are
		s.Must(fake.Send(ext, "faked"))
		return s.Status().Tables.Guard.Spoofed > 0
	})
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
}

// A zone for both directions has its own outside endpoints: expectations carry its
// permissions, and status says that there are no mappings.
func TestZoneOfBothDirections(t *testing.T) {
	stage.NeedsExpect(t)
	zone := `table inet zones { chain c { type filter hook prerouting priority raw; iifname { "lan0", "wan0" } ct zone set 250; }; }
`
	s := play(t, lab.Options{Rules: lab.Masquerade + zone}, stage.Auto[0], mapped, "--reconcile=1s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Until("it is told", func() bool { return s.Status().Tables.Mapping.NotApplied["conntrack_zone"] > 0 })
}

// An early packet came in its own zone: its flow hides the permission until it is deleted.
//
// Fails when the delete uses the permission's zone.
func TestEarlyPacketInAZoneIsRepaired(t *testing.T) {
	s := newScene(t, lab.Options{Rules: lab.Masquerade + zonesOf(`"wan0" : 251`)})
	s.keepUnanswered()
	s.Serve("--guard=false", stage.Auto[0])
	phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	p := stage.Payload("too early")
	s.Must(media.Send(netip.AddrPortFrom(s.Gateway.Addr, 5060), p))
	s.Until("it has a flow", func() bool { return len(s.ConntrackList("-p", "udp", "--orig-port-src", "5070")) == 1 })
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.zonesAreServed()
	s.Until("it is deleted", func() bool {
		return s.Status().Counters.Early == 1 && len(s.ConntrackList("-p", "udp", "--orig-port-src", "5070")) == 0
	})
	s.Arrives(phone, media, ext)
}

// The firewall accepts only RELATED, so only expectations would get through, and none works
// in the zone of packets from outside. Status says what to set, and that helps.
//
// Fails when a packet that arrives in a zone is not counted.
func TestZonesBesideAFirewallThatAcceptsRelatedAlone(t *testing.T) {
	s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy + zonesOf(zonesByDirection["each link has one"])}, stage.Auto[0], "--reconcile=1s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.zonesAreServed()
	s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
	s.Until("it is told", func() bool {
		return s.warns("conntrack zone") && s.warns("inet filter forward") && s.warns("'ct status dnat'")
	})
	s.Must(s.NFT("insert rule inet filter forward ct status dnat accept\n"))
	s.Until("it is over", func() bool { return !s.warns("conntrack zone") })
	if why := s.carried("nft"); why != "dnat_accepted" {
		t.Errorf("because %q", why)
	}
	s.Until("the map has it", func() bool { return len(s.Elements()) > 0 })
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
}

// peerInZone lets a peer send from other ports until status says that they come in a zone in which
// nothing admits them.
func (s *scene) peerInZone() {
	s.T.Helper()
	s.sendsInZone(s.InsideSocket(0, 7000), s.PeerSocket(lab.PeerA, 7000))
}

func (s *scene) sendsInZone(phone, peer *lab.Socket) {
	s.T.Helper()
	ext, port := s.Contact(phone, peer), uint16(7100)
	s.Until("status tells of the zone", func() bool {
		port++
		other, err := s.Outside.Socket(peer.Addr().Addr(), port)
		s.Must(err)
		defer other.Close()
		s.Must(other.Send(ext, "lost"))
		return s.warns("packets from outside come in another conntrack zone")
	})
}

// Flows of a routed subnet, or of one whose IPv6 is source-NATed, have a zone in the original direction
// alone. Only an expectation could admit what peers send, and it stands in zone 0: nobody gets in, and
// status and list say so.
//
// Fails when only packets to destinations of the map are counted, and when an unsolicited packet in
// zone 0 counts.
func TestSubnetWithoutMapWhosePeersComeInAZone(t *testing.T) {
	stage.NeedsExpect(t)
	const nat66 = `table ip6 nat { chain p { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }; }
`
	zones := zonesByDirection["each link has one"]
	for name, tc := range map[string]struct {
		rules string
		flags []string
	}{
		"routed, in a zone":  {zonesOf(zones), []string{"--routed"}},
		"routed, in zone 0":  {zonesOf(zonesByDirection["inside link"]), []string{"--routed"}},
		"NAT66, in a zone":   {zonesOf(zones) + nat66, nil},
		"NAT66, in zone 0":   {zonesOf(zonesByDirection["inside link"]) + nat66, nil},
		"NAT66, beside IPv4": {zonesOf(zones) + nat66, []string{"--subnet", lab.InsideNet.String()}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy + tc.rules})
			s.Start(append([]string{"--subnet", lab.InsideNet6.String(), "--reconcile=1s"}, tc.flags...)...)
			h := s.Inside(0)
			phone, proxy := s.Socket(h.Namespace, h.Addr6, 5060), s.Socket(s.Outside.Namespace, lab.Peer6A, 5060)
			if strings.Contains(name, "zone 0") {
				ext := s.Contact(phone, proxy)
				s.Stands(phone, proxy, ext)
				s.Arrives(phone, s.Socket(s.Outside.Namespace, lab.Peer6A, 5070), ext)
				counter := func() string {
					out, _ := s.Gateway.Output("nft", "list", "counter", "inet", "conenat", "expected_in_zone_0")
					return out
				}
				s.Until("packets in a zone are counted", func() bool { return counter() != "" })
				s.Arrives(phone, s.Socket(s.Outside.Namespace, lab.Peer6A, 5071), ext)
				s.Lost(phone, s.Socket(s.Outside.Namespace, lab.Peer6B, 5070), ext, proxy)
				if n := counter(); !strings.Contains(n, "packets 0 ") {
					t.Errorf("counted: %s", n)
				}
				return
			}
			s.sendsInZone(phone, proxy)
			ext := s.Contact(phone, proxy)
			s.Lost(phone, s.Socket(s.Outside.Namespace, lab.Peer6A, 5070), ext, proxy)
			s.Until("list says it", func() bool { return s.Listed(phone, proxy, ext, "standing").Reason == "other_zone" })
		})
	}
}
