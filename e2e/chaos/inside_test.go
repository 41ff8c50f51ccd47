package chaos

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// An inside host scans 100,000 peers: 500 addresses from 200 ports each, or fewer ports
// in the modes other than auto. It gets its limit and no more; other hosts keep their
// permissions and get new ones.
//
// Fails with --max-permissions-per-host=0.
func TestScanFromInside(t *testing.T) {
	stage.InModes(t, modes, func(t *testing.T, mode ...string) {
		const most = 1000
		ports := 200
		if !slices.Equal(mode, stage.Auto) {
			ports = 20
		}
		s := stage.New(t, lab.Options{Inside: 2})
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600")) // so that the flows outlive the test
		s.Start(stage.Flags(mode, "--max-permissions-per-host=1000")...)
		victim, proxy := s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(victim, proxy)
		s.Stands(victim, proxy, ext)
		child := s.PeerSocket(lab.PeerA, 5070)
		s.Arrives(victim, child, ext)
		stop := s.Steady(s.OnOnePort(victim, child, ext))

		scan := s.Scan(firstPort, ports)
		s.Must(scan.Send(0, scan.Len()))

		other := s.InsideSocket(1, 5061)
		extOther := s.Contact(other, proxy)
		s.Stands(other, proxy, extOther)
		s.Arrives(other, s.PeerSocket(lab.PeerA, 5071), extOther)
		t.Logf("%d packets to the victim meanwhile, none lost", stop())
		// By now the daemon has handled all earlier events.
		standing, all := 0, s.List()
		for _, p := range all {
			if p.Int.Addr() == s.Inside(0).Addr && p.State == "standing" {
				standing++
			}
		}
		t.Logf("%d claims of the scan, %d stand", len(all)-2, standing)
		if standing != most || len(all) <= 2*most {
			t.Errorf("%d permissions of the scan stand, want %d", standing, most)
		}
		s.Until("the kernel holds no more", func() bool { return inKernel(s, mode) <= most+2 })
		s.Verified()
	})
}

// An inside host forges packets: with the port of another host's permission, a forwarded
// port, port 0, or sources that are not inside, and to addresses that are no peers. It
// gains no permission from them, and the other hosts lose nothing.
//
// Fails when the model does not learn of forwards.
func TestForgedFromInside(t *testing.T) {
	const forwarded = 5080
	rules := lab.Masquerade + `table ip forwards { chain prerouting {
		type nat hook prerouting priority dstnat; iifname "wan0" udp dport 5080 dnat to 10.47.11.110; }; }
`
	stage.InModes(t, modes, func(t *testing.T, mode ...string) {
		s := stage.New(t, lab.Options{Inside: 2, Rules: rules})
		s.Start(stage.Flags(mode)...)
		victim, proxy := s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
		server := s.InsideSocket(1, forwarded)
		ext := s.Contact(victim, proxy)
		s.Stands(victim, proxy, ext)
		before := s.List()

		attacker := s.Inside(0).Addr
		packets := [][2]netip.AddrPort{
			{netip.AddrPortFrom(attacker, ext.Port()), netip.AddrPortFrom(lab.PeerA, 9999)}, // the same peer, by the same outside port
			{netip.AddrPortFrom(attacker, forwarded), netip.AddrPortFrom(lab.PeerA, 9999)},
			{netip.AddrPortFrom(attacker, 0), netip.AddrPortFrom(lab.PeerB, 9)},
			{netip.AddrPortFrom(attacker, 7000), netip.AddrPortFrom(lab.PeerB, 0)},
		}
		for _, to := range []string{"224.0.0.1", "239.1.1.1", "255.255.255.255", "10.47.11.255", "10.47.11.110", "127.0.0.1", "0.0.0.1", "240.0.0.1", "169.254.1.1"} {
			packets = append(packets, [2]netip.AddrPort{netip.AddrPortFrom(attacker, 7001), netip.AddrPortFrom(netip.MustParseAddr(to), 9)})
		}
		for _, from := range []string{"192.0.2.200", "10.47.12.20", "198.51.100.1", "127.0.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1"} {
			packets = append(packets, [2]netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr(from), 7002), netip.AddrPortFrom(lab.PeerB, 9)})
		}
		forged := s.Flood(len(packets), true)
		for i, p := range packets {
			forged.Aim(i, p[0], p[1])
		}
		for range 3 {
			s.Must(forged.Send(0, forged.Len()))
		}
		// Events come in order, so the forged packets are handled before this flow.
		fence := s.InsideSocket(1, 5062)
		s.Stands(fence, proxy, s.Contact(fence, proxy))

		same := func(p control.Permission) bool { return timeless(p) == timeless(before[0]) }
		for _, p := range s.List() {
			if p.State == "standing" && !same(p) && p.Int != fence.Addr() {
				t.Errorf("it got %+v", p)
			}
		}
		s.Arrives(victim, s.PeerSocket(lab.PeerA, 5070), ext)
		s.Arrives(server, s.PeerSocket(lab.PeerA, 5071), netip.AddrPortFrom(ext.Addr(), forwarded))
		s.Arrives(server, s.PeerSocket(lab.PeerC, 5071), netip.AddrPortFrom(ext.Addr(), forwarded))
		s.Verified()
	})
}
