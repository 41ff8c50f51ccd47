package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Bridges between hosts and the link that the gateway routes by, whose firewall sees the packets
// first (br_netfilter).

// bridgeFirewall are rules like those of Proxmox for a virtual machine with a firewall.
const bridgeFirewall = firewallOfBridges + `table ip zones {
	chain PREROUTING { type filter hook prerouting priority raw; iifname "fwbr*" ct zone set 1; }
}
`

// firewallOfBridges lets anybody behind the bridges of any link send with an address of an inside host.
const firewallOfBridges = `table inet pve {
	chain FORWARD {
		type filter hook forward priority filter
		ct state established,related accept
		iifname "fwbr*" meta nfproto ipv4 ip saddr 10.47.11.0/24 accept
		iifname "fwbr*" meta nfproto ipv6 ip6 saddr 2001:db8:47::/64 accept
		iifname "fwbr*" meta l4proto udp drop
	}
}
`

const noNewFromOutside = `table inet closed { chain c { type filter hook forward priority filter; iifname "wan0" ct state new drop; }; }
`

// bridgeWithAFirewall puts a bridge with a firewall between the first host and lan0.
func bridgeWithAFirewall(s *scene) {
	s.T.Helper()
	s.bridged("fwbr100", "lan0p0", "fwln100", "fwpr100", "lan0")
}

// bridged makes a bridge with a firewall of its own between port, which leads to hosts, and the
// bridge lan. If lan is none, the gateway routes by the end of the pair.
func (s *scene) bridged(bridge, port, near, far, lan string) {
	s.T.Helper()
	if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
		s.T.Skip("this kernel shows bridged packets to no firewall (CONFIG_BRIDGE_NETFILTER)")
	}
	for _, args := range []string{
		"link add " + bridge + " type bridge forward_delay 0", "link add " + near + " type veth peer name " + far,
		"link set " + port + " master " + bridge, "link set " + near + " master " + bridge,
		"link set " + bridge + " up", "link set " + near + " up",
	} {
		s.IP(s.Gateway, args)
	}
	if lan != "" {
		s.IP(s.Gateway, "link set "+far+" master "+lan)
	}
	s.LinkUp(far)
	for _, family := range []string{"iptables", "ip6tables"} {
		s.sysctl("net.bridge.bridge-nf-call-"+family, "1")
	}
}

// A virtual machine is behind a bridge with its own firewall, in conntrack zone 1, as Proxmox
// does it. Status says what to set, and then children arrive.
//
// Fails when the permission in zone 1 waits for a reconcile: its packets come by another link than
// the way back to the host.
func TestBridgeWithAFirewallOfItsOwn(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{Rules: lab.Masquerade + bridgeFirewall})
	bridgeWithAFirewall(s)
	s.Serve(stage.Auto[0], "--reconcile=1s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
	s.Until("it is told", func() bool { return s.warns("in zone 1 untranslated") && s.warns("set routed = true") })
	s.Stop()
	s.Serve(stage.Auto[0], "--routed", "--reconcile=1h")
	s.hearsInBothZones()
	if s.warns("set routed = true") {
		t.Errorf("warnings %q", s.Status().Warnings)
	}
}

// hearsInBothZones checks that a peer reaches the host once both zones have a permission.
func (s *scene) hearsInBothZones() {
	s.T.Helper()
	phone, proxy := s.InsideSocket(0, 6060), s.PeerSocket(lab.PeerA, 6060)
	ext := s.Contact(phone, proxy)
	s.Until("both zones have a permission", func() bool { return s.standing(phone.Addr()) == 2 })
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 6070), ext)
	s.Lost(phone, s.PeerSocket(lab.PeerC, 6070), ext, proxy)
}

// standing counts the permissions of an inside endpoint that stand.
func (s *scene) standing(in netip.AddrPort) (n int) {
	s.T.Helper()
	for _, p := range s.List() {
		if p.Int == in && p.State == "standing" {
			n++
		}
	}
	return n
}

// The permission of a new flow stands at once, whatever lies between the bridge and the link by
// which the gateway routes, also if the bridge comes while the daemon runs. A host behind another
// such bridge, of another network, that fakes the address of an inside host earns nothing.
//
// Fails when the links of the segment are not known, or not from the change of a link on, and when
// each bridge counts as the way back.
func TestBridgesOfOneSegment(t *testing.T) {
	stage.NeedsExpect(t)
	behindLAN := func(s *scene) { s.bridged("fwbr100", "lan0p0", "fwln100", "fwpr100", "lan0") }
	for name, tc := range map[string]struct {
		bridge func(s *scene)
		late   bool
	}{
		"a port of the LAN's bridge": {bridge: behindLAN},
		"while the daemon runs":      {bridge: behindLAN, late: true},
		"two in a row": {bridge: func(s *scene) {
			s.bridged("fwbr100", "lan0p0", "fwln100", "fwpr100", "")
			s.bridged("fwbr101", "fwpr100", "fwln101", "fwpr101", "lan0")
		}},
		"no bridge behind it": {bridge: func(s *scene) {
			s.bridged("fwbr100", "lan0p0", "fwln100", "fwpr100", "")
			s.moves("lan0", "fwpr100", "10.47.11.1/24")
			s.IP(s.Gateway, "link set lan0 down")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Guest: true, Rules: lab.Masquerade + bridgeFirewall})
			s.bridged("fwbr200", "guest0", "fwln200", "fwpr200", "")
			s.moves("guest0", "fwpr200", "10.47.12.1/24")
			if !tc.late {
				tc.bridge(s)
			}
			for _, link := range []string{"all", "fwpr200", "fwbr200"} {
				s.sysctl("net.ipv4.conf."+link+".rp_filter", "0")
			}
			s.Serve(stage.Auto[0], "--routed", "--reconcile=1h")
			if tc.late {
				tc.bridge(s)
				s.Until("the daemon knows the bridge", func() bool {
					out, err := s.Gateway.Output("nft", "list", "table", "ip", "conenat")
					return err == nil && strings.Contains(out, `"fwbr100"`)
				})
			}
			s.hearsInBothZones()

			host := s.Inside(0).Addr
			s.IP(s.Guest, "addr add "+host.String()+"/32 dev lo")
			faker, proxy := s.Socket(s.Guest.Namespace, host, 7777), s.PeerSocket(lab.PeerA, 7777)
			s.Contact(faker, proxy)
			s.Until("it passed both zones", func() bool {
				return len(s.ConntrackList("-p", "udp", "--orig-src", host.String(), "--sport", "7777")) == 2
			})
			phone := s.InsideSocket(0, 8060)
			s.Contact(phone, proxy)
			s.Until("a later flow has its permissions", func() bool { return s.standing(phone.Addr()) == 2 })
			if n := s.standing(faker.Addr()); n != 0 {
				t.Errorf("%d permissions for a faked source: %+v", n, s.List())
			}
		})
	}
}

// moves gives an address of the gateway to another link, with the MAC address that the hosts know.
func (s *scene) moves(from, to, addr string) {
	s.T.Helper()
	b := netip.MustParsePrefix(addr).Addr().As4()
	for _, args := range []string{
		"addr flush dev " + from, "link set " + from + " address 02:47:00:00:00:01",
		fmt.Sprintf("link set %s address 02:47:%02x:%02x:%02x:%02x", to, b[0], b[1], b[2], b[3]), "addr add " + addr + " dev " + to,
	} {
		s.IP(s.Gateway, args)
	}
}

// Without conntrack zones the flow that the bridge's firewall sees is the only one, for good. NAT
// does not work with that, but routed hosts need no zones.
//
// Fails when the way back must be the very link that the packet came by.
func TestBridgeWithoutZones(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: lab.Masquerade + firewallOfBridges + noNewFromOutside})
	bridgeWithAFirewall(s)
	h := s.Inside(0)
	phone, proxy := s.Socket(h.Namespace, h.Addr6, 5060), s.PeerSocket(lab.Peer6A, 5060)
	s.Start("--subnet", lab.InsideNet6.String(), "--routed", "--reconcile=1h")
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.Peer6A, 5070), ext)
	s.Lost(phone, s.PeerSocket(lab.Peer6B, 5070), ext, proxy)
}
