package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// vpnAddr is the address of the gateway on vpn0 (addVPN).
const vpnAddr = "10.66.0.2"

// addVPN adds a second link to the outside, with routes to prefixes.
func (s *scene) addVPN(prefixes ...string) {
	s.T.Helper()
	s.AddLink("vpn0", vpnAddr)
	for _, p := range prefixes {
		s.IP(s.Gateway, "route add "+p+" via 198.51.100.254 dev vpn0 onlink")
	}
}

// natBy are rules that masquerade on these links, or on all links.
func natBy(links ...string) string {
	if len(links) == 0 {
		return "table ip nat { chain post { type nat hook postrouting priority srcnat; masquerade; }; }\n"
	}
	return fmt.Sprintf("table ip nat { chain post { type nat hook postrouting priority srcnat; oifname { %s } masquerade; }; }\n", strings.Join(links, ", "))
}

// works checks that one peer reaches the inside host from another port, and nobody else
// does.
func (s *scene) works(peer netip.Addr, port uint16, from netip.Addr) {
	s.T.Helper()
	phone, proxy := s.InsideSocket(0, port), s.PeerSocket(peer, port)
	ext := s.Contact(phone, proxy)
	if ext.Addr() != from {
		s.T.Fatalf("it leaves as %v, want from %v", ext, from)
	}
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(peer, port+1), ext)
	s.Lost(phone, s.PeerSocket(stranger, port+2), ext, proxy)
}

// An uplink without a default route: a VPN to most of the Internet, a provider's VLAN, a
// router with full tables. Rules reveal it, or its first flow.
//
// Fails when only a default route makes an outside link, and when the log says first that the link is none.
func TestUplinkWithoutADefaultRoute(t *testing.T) {
	most := []string{"0.0.0.0/5", "128.0.0.0/3", "192.0.0.0/9", "200.0.0.0/5"}
	private := netip.MustParseAddr("172.20.0.5")
	for name, tc := range map[string]struct {
		routes []string
		rules  string
		legacy bool
		user   bool // without root, the tables of iptables-legacy are unknown
		full   bool // wan0 has no default route, only others
		peer   netip.Addr
	}{
		"most of the Internet":                                  {routes: most, rules: natBy("wan0", "vpn0"), peer: lab.PeerA},
		"one prefix":                                            {routes: []string{"203.0.113.0/24"}, rules: natBy("wan0", "vpn0"), peer: lab.PeerA},
		"one prefix, by its first flow":                         {routes: []string{"203.0.113.0/24"}, rules: natBy(), peer: lab.PeerA},
		"one prefix, by iptables-legacy":                        {routes: []string{"203.0.113.0/24"}, legacy: true, peer: lab.PeerA},
		"one prefix, by its first flow, for the rule is root's": {routes: []string{"203.0.113.0/24"}, legacy: true, user: true, peer: lab.PeerA},
		"private peers":                                         {routes: []string{"172.20.0.0/24"}, rules: natBy("vpn0"), peer: private},
		"full tables":                                           {full: true, rules: natBy("wan0"), peer: lab.PeerA},
		"full tables, by its first flow":                        {full: true, rules: natBy(), peer: lab.PeerA},
		"by its first flow, in other words":                     {routes: most, rules: strings.Replace(natBy(), "masquerade", "ip daddr 203.0.113.0/24 oifname \"vpn0\" snat to "+vpnAddr, 1), peer: lab.PeerA},
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
				rules := tc.rules + lab.DropPolicy
				if slices.Contains(mode, stage.NFT[0]) {
					rules = tc.rules
				}
				s := newScene(t, lab.Options{Rules: rules})
				if tc.legacy {
					s.Must(s.IPTables(lab.IPTablesLegacy, strings.ReplaceAll(lab.IPTablesMasquerade, "wan0", "vpn0")))
				}
				from := s.Gateway.Addr
				if tc.full {
					s.IP(s.Gateway, "route del default")
					s.IP(s.Gateway, "route add 203.0.113.0/24 via 198.51.100.254")
					s.IP(s.Gateway, "route add 192.0.2.0/24 via 198.51.100.254")
				} else {
					s.addVPN(tc.routes...)
					from = netip.MustParseAddr(vpnAddr)
				}
				s.IP(s.Outside, "addr add "+private.String()+"/32 dev lo")
				if tc.user {
					s.Exe = s.unprivileged()
				}
				s.Start(stage.Flags(mode, "--reconcile=1h")...)
				s.works(tc.peer, 5060, from)
				link := "vpn0"
				if tc.full {
					link = "wan0"
				}
				s.told(link + " counts as an outside link, for ")
				if out := s.Daemon.Output(); strings.Contains(out, "which is no outside link") {
					t.Errorf("it was said to be none:\n%s", out)
				}
			})
		})
	}
}

// The outside address is on a macvlan of the uplink, as with keepalived's use_vmac: peers'
// packets arrive by the macvlan, and answers leave by the link below.
//
// Fails when packets from outside are expected only on links with a default route.
func TestOutsideAddressOnAMacvlan(t *testing.T) {
	const virtual, mac = "198.51.100.10", "00:00:5e:00:01:33"
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 2, Rules: strings.Replace(lab.Masquerade, "masquerade", "snat to "+virtual, 1)})
		s.IP(s.Gateway, "link add vrrp0 link wan0 address "+mac+" type macvlan mode private")
		s.IP(s.Gateway, "addr add "+virtual+"/32 dev vrrp0")
		s.IP(s.Gateway, "link set vrrp0 up")
		for _, link := range []string{"all", "vrrp0", "wan0"} {
			s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
		}
		s.IP(s.Outside, "neigh replace "+virtual+" lladdr "+mac+" dev eth0 nud permanent")
		s.Start(stage.Flags(mode, mapped, "--on-stop=keep")...)
		s.works(lab.PeerA, 5060, netip.MustParseAddr(virtual))
		hosts, exts := s.consoles(2)

		// A packet from the macvlan with an inside source is spoofed.
		const far = "192.0.2.200"
		faked := s.Inside(0).Addr
		s.IP(s.Outside, "addr add "+faked.String()+"/32 dev lo")
		s.IP(s.Outside, "route del local 192.0.2.0/24 dev lo")
		s.IP(s.Outside, "route add "+far+"/32 via "+virtual+" dev eth0 onlink")
		s.Must(s.Socket(s.Outside.Namespace, faked, 7777).Send(netip.MustParseAddrPort(far+":9"), "spoofed"))
		s.Until("it is dropped", func() bool { return s.Status().Tables.Guard.Spoofed == 1 })

		s.Stop()
		s.Start(stage.Flags(mode, mapped)...)
		peer := s.PeerSocket(lab.PeerB, 3076)
		for i, host := range hosts {
			if ext := s.Contact(host, peer); ext != exts[i] {
				t.Errorf("host %d left as %v, and after a start as %v", i, exts[i], ext)
			}
		}
	})
}

// Rules that name the LAN and no uplink say nothing about other links. Nor do rules that
// translate towards one of the gateway's own networks.
//
// Fails when every link but the LAN counts as outside, and when translation alone makes a
// link outside.
func TestRuleMakesNoNetworkOfTheGatewayAnUplink(t *testing.T) {
	stage.OfTheDaemon(t)
	for name, rule := range map[string]string{
		"by its source":     "ip saddr " + lab.InsideNet.String() + " masquerade",
		"by its link":       `oifname != "lan0" masquerade`,
		"and not to itself": "ip saddr " + lab.InsideNet.String() + " ip daddr != " + lab.InsideNet.String() + " masquerade",
		"towards a network": `oifname { "wan0", "guest0" } masquerade`,
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Guest: true, Rules: strings.Replace(natBy(), "masquerade", rule, 1)})
			s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s")
			phone := s.InsideSocket(0, 5060)
			s.Contact(phone, s.PeerSocket(lab.PeerA, 5060))
			s.Contact(phone, s.Socket(s.Guest.Namespace, s.Guest.Addr, 5060))
			s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
			if outside := s.Status().Outside; !slices.Equal(outside, []string{"wan0"}) {
				t.Errorf("outside links %v", outside)
			}
		})
	}
}

// The configuration outweighs rules and flows.
//
// Fails when inside does not outweigh them.
func TestLinkThatIsInsideByName(t *testing.T) {
	s := newScene(t, lab.Options{Rules: natBy("wan0", "vpn0")})
	s.addVPN("203.0.113.0/24")
	s.Start("--subnet", lab.InsideNet.String(), "--inside=vpn0", "--inside=later0")
	s.told("inside link later0 is not there")
	phone, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	s.Contact(phone, peer)
	s.Until("it gives no permission", func() bool { return s.Status().Counters.SkippedLinks["vpn0"] == 1 })
	if outside := s.Status().Outside; !slices.Equal(outside, []string{"wan0"}) {
		t.Errorf("outside links %v", outside)
	}
}

// Only flows revealed the uplink. The daemon is killed; the next one knows it at once, so
// permissions and mappings go on.
//
// Fails when a new daemon looks at flows only after it has made its tables.
func TestUplinkThatOnlyFlowsTellOfOutlivesTheDaemon(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 2, Rules: natBy()})
		s.addVPN("203.0.113.0/24")
		s.Start(stage.Flags(mode, mapped, "--reconcile=1h")...)
		s.works(lab.PeerA, 5060, netip.MustParseAddr(vpnAddr)) // before any mapping exists
		hosts, exts := s.consoles(2)
		s.Kill()
		s.Start(stage.Flags(mode, mapped, "--reconcile=1h")...)
		peer := s.PeerSocket(lab.PeerB, 3076)
		for i, host := range hosts {
			s.Arrives(host, s.PeerSocket(lab.PeerA, 20_000+uint16(i)), exts[i])
			if ext := s.Contact(host, peer); ext != exts[i] {
				t.Errorf("host %d left as %v, and after a start as %v", i, exts[i], ext)
			}
		}
		if n := s.Status().Counters.Revoked["not allowed any more"]; n > 0 {
			t.Errorf("%d permissions ended", n)
		}
	})
}

// After a start a permission reveals such an uplink, even if the flow that earned it has
// ended.
//
// Fails when only flows are read at the start: the permission is then revoked.
func TestPermissionTellsOfAnUplinkAtTheStart(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Rules: natBy()})
		s.addVPN("203.0.113.0/24")
		s.Start(stage.Flags(mode, "--reconcile=1h")...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Kill()
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5060", "--orig-port-dst", "5060")
		s.Must(err)
		s.Start(stage.Flags(mode, "--reconcile=1h")...)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
		if n := s.Status().Counters.Revoked["not allowed any more"]; n > 0 {
			t.Errorf("%d permissions ended", n)
		}
	})
}

// A rule of nftables or iptables-legacy that names an uplink comes and goes while the daemon
// runs.
//
// Fails when rules are searched for uplinks only at the start, or only when links change.
func TestRuleTellsOfAnUplinkWhenItComes(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.addVPN("172.20.0.0/24")
	s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1h")
	outside := func() bool { return slices.Contains(s.Status().Outside, "vpn0") }
	if outside() {
		t.Fatal("it is an outside link without a rule")
	}
	for name, change := range map[string][2]func() error{
		"nftables": {
			func() error {
				return s.NFT("table ip later { chain post { type nat hook postrouting priority srcnat; oifname \"vpn0\" masquerade; }; }")
			},
			func() error { return s.NFT("delete table ip later") },
		},
		"iptables-legacy": {
			func() error {
				return s.IPTables(lab.IPTablesLegacy, strings.ReplaceAll(lab.IPTablesMasquerade, "wan0", "vpn0"))
			},
			func() error {
				return s.IPTables(lab.IPTablesLegacy, "*nat\n-D POSTROUTING -o vpn0 -j MASQUERADE\nCOMMIT\n")
			},
		},
	} {
		s.Must(change[0]())
		s.Until("the rule of "+name+" tells", outside)
		s.Must(change[1]())
		s.Until("that of "+name+" tells no more", func() bool { return !outside() })
	}
}

// An uplink that only a rule or a flow reveals leads to a part of the Internet: a packet
// from it with any other source is faked.
//
// Fails when a packet from such a link may have any peer's address.
func TestOnlyPeersBehindAPartialUplinkComeByIt(t *testing.T) {
	for name, rules := range map[string]string{"rule": natBy(`"wan0"`, `"vpn0"`), "flow": natBy()} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
				s := newScene(t, lab.Options{Rules: rules})
				s.addVPN("192.0.2.0/24")
				for _, link := range []string{"all", "vpn0"} {
					s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
				}
				s.Start(stage.Flags(mode, "--reconcile=1h")...)
				phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
				s.Contact(s.InsideSocket(0, 5061), s.PeerSocket(lab.PeerC, 5061))
				s.Until("vpn0 is an outside link", func() bool { return slices.Contains(s.Status().Outside, "vpn0") })
				ext := s.Contact(phone, proxy)
				s.Stands(phone, proxy, ext)
				s.IP(s.Outside, "route add "+ext.Addr().String()+"/32 via "+vpnAddr+" dev vpn0 onlink")
				s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
				s.IP(s.Outside, "route del "+ext.Addr().String()+"/32")
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
			})
		})
	}
}

// A router in the LAN is the way out for a time. That does not make its link an uplink for
// good, and "auto" keeps serving the network behind it.
//
// Fails when "auto" leaves out networks of links that lead outside, and when a flow makes a
// link an outside link until the daemon ends.
func TestBackupInTheLANIsForgotten(t *testing.T) {
	for _, subnet := range []string{lab.InsideNet.String(), "auto"} {
		t.Run(subnet, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2, Rules: natBy()})
			s.Start("--subnet="+subnet, "--reconcile=1h")
			s.works(lab.PeerA, 5060, s.Gateway.Addr)
			outside := func(links ...string) func() bool {
				return func() bool { return slices.Equal(slices.Sorted(slices.Values(s.Status().Outside)), links) }
			}
			backup := "route add default via " + s.Inside(1).Addr.String() + " dev lan0"
			s.IP(s.Gateway, "route del default")
			s.IP(s.Gateway, "route add default via 198.51.100.254 metric 100")
			s.IP(s.Gateway, backup+" metric 50")
			s.IP(s.Gateway, backup+" metric 700")
			s.Must(s.InsideSocket(0, 5080).Send(netip.AddrPortFrom(lab.PeerB, 5080), "by the backup"))
			s.Until("lan0 is the way outside", outside("lan0", "wan0"))
			s.Until("its flow has a permission", func() bool {
				return slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.Peer == lab.PeerB && p.State == "standing" })
			})

			s.IP(s.Gateway, "route del default metric 50 dev lan0")
			out, code := s.CLI("flush", "--control-socket", s.Daemon.Socket)
			if code != 0 {
				t.Fatalf("flush: exit %d, %q", code, out)
			}
			s.IP(s.Gateway, "route del default metric 700 dev lan0")
			s.IP(s.Gateway, backup+" metric 800")
			s.Until("lan0 is inside again", outside("wan0"))
			s.works(lab.PeerA, 5090, s.Gateway.Addr)
		})
	}
}

// A user rule sets a mark before routing. The mark selects a routing table for the way out,
// which may have no route back to the host.
//
// Fails when the way back to a host is looked up only with its packet's mark.
func TestMarkForTheWayOutMakesNoSourceDoubtful(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Rules: natBy() + `table ip pbr { chain pre { type filter hook prerouting priority mangle;
			iifname "lan0" meta mark set 2; }; }
		`})
		s.addVPN()
		s.IP(s.Gateway, "route add default via 198.51.100.254 dev vpn0 onlink table 102")
		s.IP(s.Gateway, "rule add fwmark 2 table 102")
		s.Start(stage.Flags(mode, "--reconcile=1h")...)
		s.works(lab.PeerA, 5060, netip.MustParseAddr(vpnAddr))
	})
}
