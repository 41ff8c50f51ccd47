package e2e

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Conntrack zones: of one direction, of both, and of a bridge with a firewall of its own.

// zonesOf gives the packets that come by a link, and those that the gateway sends by it,
// the zone that the map has for the link, in the original direction alone. VyOS does so
// for links in a VRF.
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

// keepUnanswered lets no flow end by itself while a test runs.
func (s *scene) keepUnanswered() {
	s.T.Helper()
	s.sysctl("net.netfilter.nf_conntrack_udp_timeout", "600")
}

// What counts is where answers come in: flows with zones of the original direction share
// the outside endpoints of zone 0. The kernel learns, and children are seen and dropped.
//
// Fails where the rules test the zone of the original direction, where the model takes that
// for a child's, and where it is not asked for in the zone in which it came.
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

// Each host has one outside port in all of these set-ups, and is reached by it.
func TestNFTMappingWithZonesByDirection(t *testing.T) {
	for name, elements := range zonesByDirection {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 3, Rules: lab.Masquerade + zonesOf(elements)}, stage.Auto[0], mapped)
			port := uint16(5080)
			s.Until("the rules follow", func() bool {
				port++
				s.Contact(s.InsideSocket(0, port), s.PeerSocket(lab.PeerC, port))
				return !strings.Contains(elements, "lan0") || !s.zonesAreLeft()
			})
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

// zonesAreLeft reports whether the rules leave alone what has a zone.
func (s *scene) zonesAreLeft() bool {
	s.T.Helper()
	rules, err := s.Gateway.Output("nft", "list", "chain", "ip", "conenat", "map_source")
	s.Must(err)
	return strings.Contains(rules, "ct zone 0")
}

// A zone of both directions is another table of outside endpoints: expectations carry it,
// and status says that there are no mappings.
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

// An early packet in a zone of its own hides the permission until it is deleted.
//
// Fails where the flow is deleted in the zone of the permission.
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
	s.Until("it is deleted", func() bool {
		return s.Status().Counters.Early == 1 && len(s.ConntrackList("-p", "udp", "--orig-port-src", "5070")) == 0
	})
	s.Arrives(phone, media, ext)
}

// Where the firewall accepts RELATED alone, only expectations would get through, and none
// stands in the zone of packets from outside: status says what to set, and that helps.
//
// Fails where a packet that arrives in a zone is not counted.
func TestZonesBesideAFirewallThatAcceptsRelatedAlone(t *testing.T) {
	s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy + zonesOf(zonesByDirection["each link has one"])}, stage.Auto[0], "--reconcile=1s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
	s.Until("it is told", func() bool {
		return s.warns("conntrack zone") && s.warns("inet filter forward") && s.warns("'ct status dnat'")
	})
	s.Must(s.NFT("insert rule inet filter forward ct status dnat accept\n"))
	s.Until("it is over", func() bool { return !s.warns("conntrack zone") })
	if why := s.carried("nft"); why != "zone_of_packets" {
		t.Errorf("because %q", why)
	}
	s.Until("the map has it", func() bool { return len(s.Elements()) > 0 })
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
}

// A virtual machine behind a bridge of its own, with a firewall there and conntrack zone 1,
// as Proxmox makes it: status says what to set, and with it children arrive.
func TestBridgeWithAFirewallOfItsOwn(t *testing.T) {
	stage.NeedsExpect(t)
	if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
		t.Skip("this kernel shows bridged packets to no firewall (CONFIG_BRIDGE_NETFILTER)")
	}
	s := newScene(t, lab.Options{Rules: lab.Masquerade + `table ip pve {
	chain PREROUTING { type filter hook prerouting priority raw; iifname "fwbr*" ct zone set 1; }
	chain FORWARD {
		type filter hook forward priority filter
		ct state established,related accept
		iifname "fwbr*" ip saddr 10.47.11.0/24 accept
		iifname "fwbr*" drop
	}
}
`})
	for _, args := range []string{
		"link add fwbr100 type bridge forward_delay 0", "link add fwln100 type veth peer name fwpr100",
		"link set lan0p0 master fwbr100", "link set fwln100 master fwbr100", "link set fwpr100 master lan0",
		"link set fwbr100 up", "link set fwln100 up",
	} {
		s.IP(s.Gateway, args)
	}
	s.LinkUp("fwpr100")
	s.Must(s.Gateway.SetSysctl("net.bridge.bridge-nf-call-iptables", "1"))
	s.Serve(stage.Auto[0], "--reconcile=1s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
	s.Until("it is told", func() bool { return s.warns("in zone 1 untranslated") && s.warns("set routed = true") })
	s.Stop()
	s.Serve(stage.Auto[0], "--routed", "--reconcile=1s")
	s.Contact(phone, proxy)
	s.Until("both zones have a permission", func() bool {
		ps := s.List()
		return len(ps) == 2 && ps[0].State == "standing" && ps[1].State == "standing"
	})
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
	if s.warns("set routed = true") {
		t.Errorf("warnings %q", s.Status().Warnings)
	}
}
