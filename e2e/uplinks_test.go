package e2e

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// A second uplink comes while the daemon runs. Only marked packets use its default route,
// so a child must carry the mark, or its answers would leave by the first uplink.
func TestNewUplinkWithPolicyRoutingByConnmark(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2, Rules: stage.UplinkRules})
	s.Start("--subnet", lab.InsideNet.String())
	addr := s.AddUplink()
	s.Until("the daemon knows both uplinks", func() bool { return len(s.Status().Outside) == 2 })

	one, two, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
	extOne, extTwo := s.Contact(one, proxy), s.Contact(two, proxy)
	if extOne.Addr() != s.Gateway.Addr || extTwo.Addr() != addr {
		t.Fatalf("outside endpoints %v and %v", extOne, extTwo)
	}
	s.Stands(one, proxy, extOne)
	s.Stands(two, proxy, extTwo)
	for in, ext := range map[*lab.Socket]netip.AddrPort{one: extOne, two: extTwo} {
		media := s.PeerSocket(lab.PeerA, ext.Port()+uint16(ext.Addr().As4()[3]))
		s.Arrives(in, media, ext)
		p := stage.Payload("reply to child")
		s.Must(in.Send(media.Addr(), p))
		from, err := media.Expect(p)
		s.Must(err)
		if from != ext {
			t.Errorf("the reply to a child of %v comes from %v", ext, from)
		}
	}

	// The second uplink goes, and its permissions with it; the first one's stay.
	s.IP(s.Gateway, "link del wan1")
	s.Until("its permission ended", func() bool { return len(s.InKernel()) == 1 })
	s.Arrives(one, s.PeerSocket(lab.PeerA, 6000), extOne)
}

// A router advertisement or a backup gives an inside link a default route. The link stays
// inside for hosts, learning and mappings: at once, after a reload and after a start. The
// user is warned.
//
// Fails when any default route makes an outside link, when an IPv6 one makes it one for
// IPv4, and when such a subnet is refused.
func TestInsideLinkWithADefaultRoute(t *testing.T) {
	for name, tc := range map[string]struct{ route, why string }{
		"IPv6, advertised":      {"-6 route add default via fe80::1 dev lan0 proto ra metric 1024", "lan0 has a default route (IPv6)"},
		"IPv4, a backup":        {"route add default via 10.47.11.110 dev lan0 metric 200", "lan0 has a default route (IPv4)"},
		"IPv4, another table":   {"route add default via 10.47.11.110 dev lan0 table 77", "lan0 has a default route (IPv4)"},
		"IPv4, a nexthop group": {"route add default metric 300 nexthop via 10.47.11.109 nexthop via 10.47.11.110", "lan0 has a default route (IPv4)"},
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
				for _, subnet := range []string{lab.InsideNet.String(), "auto"} {
					s := newScene(t, lab.Options{Inside: 2})
					s.Start(append(slices.Clone(mode), "--subnet="+subnet)...)
					s.IP(s.Gateway, tc.route)
					s.Until("it is told", func() bool { return s.warns(tc.why) })
					s.works(lab.PeerA, 5060, s.Gateway.Addr)
					if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
						t.Errorf("reload: exit %d, %q", code, out)
					}
					s.works(lab.PeerA, 5070, s.Gateway.Addr)
					if outside := s.Status().Outside; !slices.Equal(outside, []string{"wan0"}) {
						t.Errorf("outside links %v", outside)
					}
					m := s.Status().Tables.Map
					if m.Learn && m.Learned < 2 {
						t.Errorf("the kernel learned %d", m.Learned)
					}
					s.Stop()
					if subnet == "auto" {
						continue // at a start auto cannot tell such a link from an uplink
					}
					s.Start(stage.Flags(mode, mapped)...)
					_, exts := s.consoles(2)
					if exts[0] == exts[1] {
						t.Errorf("both leave as %v", exts[0])
					}
					s.works(lab.PeerA, 5080, s.Gateway.Addr)
				}
			})
		})
	}
}

// What a host sends to one port of a peer leaves by the second uplink. Its flow by the first is over,
// and the permission that it gave stays for a lifetime.
//
// Fails when the way of one port shows that the address of a permission is wrong for all.
func TestNFTPermissionOutlivesItsFlowBesideAnotherUplink(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, commands := range map[string][]string{
		"by a routing rule": {"rule add ipproto udp dport 5060 table 109"},
		"by a mark":         {"rule add fwmark 7 table 109"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, second := twoUplinks(t, lab.Options{Rules: bothUplinks})
			s.Must(s.NFT(`table inet marks { chain pre { type filter hook prerouting priority mangle; iifname "lan0" udp dport 5060 meta mark set 7; }; }`))
			for _, c := range append(commands, "route add default via 198.51.100.254 dev wan1 onlink table 109") {
				s.IP(s.Gateway, c)
			}
			s.Serve("--reconcile=1h", "--log-level=debug")
			phone, peer := s.InsideSocket(0, 4444), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, s.PeerSocket(lab.PeerA, 5090))
			if from := s.Contact(phone, peer); from.Addr() != second {
				t.Fatalf("it left as %v", from)
			}
			s.Until("both permissions stand", func() bool { return s.Status().Permissions.Standing == 2 })
			_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-dst", "5090")
			s.Must(err)
			s.Until("the flow is over", func() bool {
				return slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.Ext == ext && p.Flows == 0 })
			})
			s.looksAfter("route add 192.0.2.128/25 via 10.47.11.109 dev lan0")
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 5091), ext)
		})
	}
}
