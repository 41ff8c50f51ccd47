package e2e

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

const (
	mainRouter = "10.47.11.254" // of a gateway with one arm
	farHost    = "10.47.12.109" // behind it
)

// oneArm removes wan0 and puts the outside behind the inside network: a main router there
// leads everywhere.
func (s *scene) oneArm() {
	s.T.Helper()
	s.IP(s.Gateway, "link del wan0")
	s.IP(s.Outside, "addr add 198.51.100.254/32 dev lo")
	s.AddLink("arm", mainRouter)
	s.IP(s.Gateway, "addr flush dev arm")
	s.IP(s.Outside, "route flush dev arm")
	s.IP(s.Outside, "addr add "+mainRouter+"/24 dev arm")
	s.IP(s.Gateway, "link set arm master lan0")
	s.IP(s.Gateway, "route add default via "+mainRouter)
	if _, err := os.Stat("/proc/sys/net/bridge"); err == nil { // the bridge of the lab is a switch, not the gateway
		s.Must(s.Gateway.SetSysctl("net.bridge.bridge-nf-call-iptables", "0"))
	}
	for _, link := range []string{"all", "default", "lan0"} {
		s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".send_redirects", "0"))
	}
}

// armNAT translates what hosts send to other networks, whichever link it leaves by.
const armNAT = `table ip nat { chain post { type nat hook postrouting priority srcnat;
	ip saddr 10.47.0.0/16 ip daddr != 10.47.0.0/16 masquerade; }; }
`

// A side router, a VPN exit with its own routing table, and a NAT instance in a cloud have
// one link both to inside hosts and to the way out. The subnet is the link's network, a part
// of it, or elsewhere.
//
// Fails when a packet counts as inside only if its link is not outside, and when a subnet
// that contains an outside link's network is refused.
func TestGatewayWithOneArm(t *testing.T) {
	t.Parallel() // mostly it waits
	tunnel := func(s *scene) {
		s.AddLink("tun0", vpnAddr)
		s.IP(s.Gateway, "route add default via 198.51.100.254 dev tun0 onlink table 100")
		s.IP(s.Gateway, "rule add iif lan0 table 100 prio 100")
		s.IP(s.Gateway, "rule add iif lan0 to 10.47.11.0/24 table main prio 90")
	}
	unused := func(s *scene) {
		s.AddLink("tun0", vpnAddr)
		s.IP(s.Gateway, "route add default via 198.51.100.254 dev tun0 onlink table 100")
		s.IP(s.Gateway, "rule add from 10.99.0.0/16 table 100 prio 100")
	}
	for name, tc := range map[string]struct {
		subnet string
		args   []string
		set    func(s *scene)
		from   string // outside address
		far    bool
		both   bool // lan0 leads to both sides
		first  bool // only its first flow shows that
	}{
		"side router":                {subnet: "10.47.11.0/24", from: "10.47.11.1", both: true},
		"side router, for some":      {subnet: "10.47.11.96/27", from: "10.47.11.1", both: true},
		"side router, as outside":    {subnet: "10.47.11.0/24", args: []string{"--outside=lan0"}, from: "10.47.11.1", both: true},
		"side router, with a tunnel": {subnet: "10.47.11.0/24", set: unused, from: "10.47.11.1", both: true, first: true},
		"VPN exit":                   {subnet: "10.47.11.0/24", set: tunnel, from: vpnAddr},
		"VPN exit, for some":         {subnet: "10.47.11.96/27", set: tunnel, from: vpnAddr},
		"VPN exit, by its name":      {subnet: "10.47.11.0/24", args: []string{"--outside=tun0"}, set: tunnel, from: vpnAddr},
		"VPN exit, inside by name":   {subnet: "10.47.11.0/24", args: []string{"--inside=lan0"}, set: tunnel, from: vpnAddr},
		"NAT instance in a cloud":    {subnet: "10.47.12.0/24", from: "10.47.11.1", far: true},
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
				s := newScene(t, lab.Options{Inside: 2, Rules: armNAT})
				s.oneArm()
				if tc.set != nil {
					tc.set(s)
				}
				hosts := []*lab.Socket{}
				for i := range 2 {
					addr := s.Inside(i).Addr
					if tc.far {
						addr = netip.MustParseAddr(farHost)
						for range i {
							addr = addr.Next()
						}
						s.IP(s.Inside(i), "addr add "+addr.String()+"/32 dev lo")
						s.IP(s.Outside, "route add "+addr.String()+"/32 via "+s.Inside(i).Addr.String())
						// The outside is the main router here, and has the addresses of the
						// peers.
						for key, value := range map[string]string{"ip_forward": "1", "conf.all.accept_local": "1", "conf.all.rp_filter": "0", "conf.arm.rp_filter": "0"} {
							s.Must(s.Outside.SetSysctl("net.ipv4."+key, value))
						}
					}
					hosts = append(hosts, s.Socket(s.Inside(i).Namespace, addr, 3074))
				}
				s.Start(slices.Concat(mode, tc.args, []string{"--subnet", tc.subnet, mapped, "--reconcile=1h"})...)

				peers := []*lab.Socket{s.PeerSocket(lab.PeerA, 3478), s.PeerSocket(lab.PeerB, 3478), s.PeerSocket(lab.PeerC, 3478)}
				if tc.first {
					s.Contact(s.InsideSocket(0, 9999), peers[0])
					s.Until("a flow shows that it leads outside, too", func() bool { return slices.Contains(s.Status().Outside, "lan0") })
				}
				var exts []netip.AddrPort
				for _, host := range hosts {
					ext := s.Contact(host, peers[0])
					if ext.Addr().String() != tc.from || slices.Contains(exts, ext) {
						t.Fatalf("%v leaves as %v, like others %v", host.Addr(), ext, exts)
					}
					for _, peer := range peers[1:] {
						if other := s.Contact(host, peer); other != ext {
							t.Errorf("%v leaves as %v and as %v", host.Addr(), ext, other)
						}
					}
					exts = append(exts, ext)
					s.Stands(host, peers[0], ext)
					s.Arrives(host, s.PeerSocket(lab.PeerA, ext.Port()), ext)
					s.Lost(host, s.PeerSocket(stranger, ext.Port()), ext, peers[0])
				}
				if m := s.Status().Tables.Map; m.Learn && m.Learned == 0 {
					t.Errorf("the kernel learned nothing: %+v", m)
				}
				if both := s.warns("lan0 leads outside ("); both != tc.both {
					t.Errorf("warnings %q", s.Status().Warnings)
				}
			})
		})
	}
}

// A packet comes by a VPN exit's tunnel with the source of an inside host, or by the one arm
// with that of a host on another link. It earns no permission, makes no mapping and keeps
// nothing alive.
//
// Fails when lan0 counts as another uplink that leads to the host, and when every enabled
// source is believed on it.
func TestNFTSpoofedSourceByAnArm(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT}, func(t *testing.T, mode ...string) {
		for _, guard := range []string{"true", "false"} {
			s := newScene(t, lab.Options{Guest: true, Rules: armNAT})
			s.oneArm()
			s.AddLink("tun0", vpnAddr)
			for _, link := range []string{"all", "tun0", "lan0"} {
				s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
			}
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev tun0 onlink table 100")
			s.Start(stage.Flags(mode, mapped, "--guard="+guard, "--outside=lan0", "--subnet", lab.GuestNet.String())...)
			victim := s.InsideSocket(0, 5060)
			peer := s.PeerSocket(lab.PeerA, 5060)
			s.Stands(victim, peer, s.Contact(victim, peer))

			s.IP(s.Outside, "route del local 192.0.2.0/24 dev lo")
			fakes := map[netip.Addr]string{
				s.Inside(0).Addr: "via " + vpnAddr + " dev tun0 onlink",
				s.Guest.Addr:     "via " + lab.InsideNet.Addr().Next().String() + " dev arm",
			}
			for faked, way := range fakes {
				far := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 200 + faked.As4()[2]}), 9)
				s.IP(s.Outside, "addr add "+faked.String()+"/32 dev lo")
				s.IP(s.Outside, "route add "+far.Addr().String()+"/32 "+way)
				s.Must(s.Socket(s.Outside.Namespace, faked, 7777).Send(far, "spoofed"))
			}
			s.Until("they were seen", func() bool {
				return s.Status().Tables.Guard.Spoofed == 2 || len(s.ConntrackList("-p", "udp", "--sport", "7777")) == 2
			})
			for _, p := range s.List() {
				if p.Int.Port() == 7777 {
					t.Errorf("guard %s: it earned %+v", guard, p)
				}
			}
			if n := s.Status().Tables.Guard.Spoofed; guard == "true" && n != 2 {
				t.Errorf("%d packets were dropped", n)
			}
			kept, err := s.Gateway.Output("nft", "list", "map", "ip", "conenat", "kept_lan0")
			s.Must(err)
			if !strings.Contains(kept, ". 5060 ") || strings.Contains(kept, ". 7777 ") {
				t.Errorf("guard %s: mappings are %s", guard, kept)
			}
		}
	})
}

// Inside networks see each other's real addresses, even if one of them is behind the link
// that leads outside.
//
// Fails when the arm's mapping applies to everything that leaves by it.
func TestNFTInsideNetworksOfAnArmSeeEachOther(t *testing.T) {
	s := newScene(t, lab.Options{Guest: true, Rules: armNAT})
	s.oneArm()
	s.Start(stage.Flags(stage.NFT, mapped, "--subnet", lab.GuestNet.String())...)
	guest := s.Socket(s.Guest.Namespace, s.Guest.Addr, 3074)
	if ext := s.Contact(guest, s.PeerSocket(lab.PeerA, 3478)); ext.Addr() == s.Guest.Addr {
		t.Fatalf("it leaves as %v", ext)
	}
	if from := s.Contact(guest, s.InsideSocket(0, 3074)); from != guest.Addr() {
		t.Errorf("an inside host sees %v as %v", guest.Addr(), from)
	}
}
