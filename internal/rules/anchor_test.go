package rules_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// A packet with port 0 is dropped only if it can match an anchor. Port 0 is legal as a
// source port that does not matter (RFC 768), so packets of other networks, to the gateway,
// within a bridge, and of a family that is not enabled pass.
//
// Fails when the chain before_conntrack does not test addresses.
func TestPortZeroOfOthersPasses(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Inside: 2, Guest: true, IPv6: true})
	if err := l.Gateway.SetSysctl("net.bridge.bridge-nf-call-iptables", "1"); err != nil {
		t.Log("what is bridged never meets the rules:", err)
	}
	d := permit(t, l, "198.51.100.1:5060", "10.47.11.109:5060", lab.PeerA)
	d.Subnets = []netip.Prefix{lab.InsideNet}
	table := open(t, l)
	set(t, table, d)
	for name, tc := range map[string]struct {
		from *lab.Host
		src  netip.Addr
		to   *lab.Host
		dst  netip.Addr
	}{
		"from a network that is not enabled": {l.Guest, l.Guest.Addr, l.Outside, lab.PeerA},
		"from a host to the next":            {l.Inside(0), l.Inside(0).Addr, l.Inside(1), l.Inside(1).Addr},
		"from outside to the gateway":        {l.Outside, lab.PeerB, l.Gateway, ext4},
		"IPv6":                               {l.Inside(0), l.Inside(0).Addr6, l.Outside, lab.Peer6A},
	} {
		t.Run(name, func(t *testing.T) {
			to := listen(t, tc.to, tc.dst, 7000)
			udp(t, tc.from, netip.AddrPortFrom(tc.src, 0), to.Addr())
			if _, from, err := to.Recv(5 * time.Second); err != nil || from.Port() != 0 {
				t.Errorf("from %v: %v", from, err)
			}
		})
	}
	if n := count(t, table).PortZeroDrops; n != 0 {
		t.Errorf("%d packets were dropped", n)
	}
	// No other network may reach an anchor through the inside address.
	udp(t, l.Guest, netip.AddrPortFrom(l.Guest.Addr, 5060), netip.AddrPortFrom(l.Inside(0).Addr, 0))
	eventually(t, func() bool { return count(t, table).PortZeroDrops == 1 })
}

// With bridge-nf-call-iptables, the rules see what stays on a bridge, as between two guests of
// a host of virtual machines. Once the gateway has an address on the bridge, they cannot tell
// that from what the gateway routes.
//
// Fails when such packets with port 0 are dropped, when they are tracked and so could match an
// anchor, and when routed ones pass.
func TestPortZeroPassesOnABridge(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Guest: true})
	if err := l.Gateway.SetSysctl("net.bridge.bridge-nf-call-iptables", "1"); err != nil {
		t.Skip("what is bridged never meets the rules:", err)
	}
	in, out := l.Inside(0), l.Guest
	for h, other := range map[*lab.Host]*lab.Host{in: out, out: in} {
		_, err := h.Output("ip", "route", "add", other.Addr.String(), "dev", "eth0")
		check(t, err)
	}
	output(t, l, "ip", "addr", "flush", "dev", "guest0")
	output(t, l, "ip", "link", "set", "guest0", "master", "lan0")
	d := permit(t, l, "198.51.100.1:5060", "10.47.11.109:5060", lab.PeerA)
	d.Subnets = []netip.Prefix{lab.InsideNet}
	table := open(t, l)
	send := func() {
		udp(t, in, netip.AddrPortFrom(in.Addr, 0), netip.AddrPortFrom(out.Addr, 7000))
		udp(t, out, netip.AddrPortFrom(out.Addr, 5060), netip.AddrPortFrom(in.Addr, 0))
	}
	set(t, table, d)
	send()
	eventually(t, func() bool { return count(t, table).PortZeroDrops == 2 })

	output(t, l, "ip", "addr", "flush", "dev", "lan0")
	d.Bridges = []string{"lan0"}
	set(t, table, d)
	a, b := listen(t, out, out.Addr, 7000), listen(t, in, in.Addr, 5060)
	send()
	if _, from, err := a.Recv(5 * time.Second); err != nil || from.Port() != 0 {
		t.Errorf("from %v: %v", from, err)
	}
	check(t, a.Send(b.Addr(), "fence")) // no socket has port 0
	if _, _, err := b.Recv(5 * time.Second); err != nil {
		t.Error(err)
	}
	if n := count(t, table).PortZeroDrops; n != 2 {
		t.Errorf("%d packets were dropped, want 2", n)
	}
	flows, err := l.Conntrack("-p", "udp")
	check(t, err)
	if slices.ContainsFunc(flows, func(f string) bool { return strings.Contains(f, "port=0 ") && strings.Contains(f, out.Addr.String()) }) {
		t.Errorf("tracked: %q", flows)
	}

	output(t, l, "ip", "route", "add", in.Addr.String(), "dev", "lan0") // the gateway serves it without an address
	send()
	eventually(t, func() bool { return count(t, table).PortZeroDrops == 3 })
}

// An unreachable is an ICMP error "port unreachable" about a packet from src to dst.
type unreachable struct{ src, dst netip.AddrPort }

func (u unreachable) message(mark string) []byte {
	udp := binary.BigEndian.AppendUint16(nil, u.src.Port())
	udp = binary.BigEndian.AppendUint16(udp, u.dst.Port())
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(mark)))
	udp = append(append(udp, 0, 0), mark...)
	src, dst := u.src.Addr().AsSlice(), u.dst.Addr().AsSlice()
	if u.src.Addr().Is6() {
		ip := []byte{0x60, 0, 0, 0, 0, byte(len(udp)), unix.IPPROTO_UDP, 64}
		return bytes.Join([][]byte{{1, 4, 0, 0, 0, 0, 0, 0}, ip, src, dst, udp}, nil) // the kernel sums it
	}
	ip := bytes.Join([][]byte{{0x45, 0, 0, byte(20 + len(udp)), 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, src, dst}, nil)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	icmp := bytes.Join([][]byte{{3, 3, 0, 0, 0, 0, 0, 0}, ip, udp}, nil)
	binary.BigEndian.PutUint16(icmp[2:], checksum(icmp))
	return icmp
}

func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i]) << 8
		if i+1 < len(b) {
			sum += uint32(b[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// rawICMP opens a socket for the ICMP messages of an address.
func rawICMP(t *testing.T, h *lab.Host, of netip.Addr) (fd int) {
	t.Helper()
	if err := h.Do(func() (err error) {
		family, proto := unix.AF_INET, unix.IPPROTO_ICMP
		if of.Is6() {
			family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
		}
		if fd, err = unix.Socket(family, unix.SOCK_RAW, proto); err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}),
			unix.Bind(fd, sockaddr(of)))
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// An ICMP error about an anchor is RELATED to it and reaches nobody, whatever the user's
// firewall accepts. An error about an existing flow reaches the flow's host.
//
// Fails without the ICMP rules of the chain children.
func TestICMPErrorAboutAnAnchorReachesNobody(t *testing.T) {
	for _, family := range []struct {
		name          string
		in, ext, peer netip.AddrPort
		second        string // outside endpoint, whose anchor is flipped
		wayIn         string // for who is outside
	}{
		{
			name: "translated", in: netip.MustParseAddrPort("10.47.11.109:5060"), ext: netip.MustParseAddrPort("198.51.100.1:5060"),
			peer: netip.AddrPortFrom(lab.PeerA, 5060), second: "198.51.100.2:5060",
			wayIn: "route add 10.47.11.0/24 via 198.51.100.1",
		},
		{
			name: "routed", in: netip.MustParseAddrPort("[2001:db8:47::109]:5060"), ext: netip.MustParseAddrPort("[2001:db8:47::109]:5060"),
			peer: netip.AddrPortFrom(lab.Peer6A, 5060),
		},
	} {
		t.Run(family.name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy})
			in, ext, peer := family.in, family.ext, family.peer
			d := permit(t, l, ext.String(), in.String(), peer.Addr())
			if family.second != "" {
				permit(t, l, family.second, in.String(), peer.Addr())
			}
			table := open(t, l)
			set(t, table, d)
			if family.wayIn != "" {
				if _, err := l.Outside.Output("ip", strings.Fields(family.wayIn)...); err != nil {
					t.Fatal(err)
				}
			}
			if seen, err := listen(t, l.Inside(0), in.Addr(), in.Port()).Contact(listen(t, l.Outside, peer.Addr(), peer.Port())); err != nil || seen != ext {
				t.Fatal(seen, err)
			}
			zero := func(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr(), 0) }
			port := func(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr(), ext.Port()) }
			tests := []struct {
				name         string
				inward       bool
				about, fence unreachable
				flipped      bool
			}{
				{"to the inside host", true, unreachable{zero(in), port(peer)}, unreachable{ext, peer}, false},
				{"to the peer", false, unreachable{port(peer), zero(in)}, unreachable{peer, in}, false},
				{"to the inside host, about the other one", true, unreachable{port(in), zero(peer)}, unreachable{ext, peer}, true},
				{"to the peer, about the other one", false, unreachable{zero(peer), port(in)}, unreachable{peer, in}, true},
			}
			want := uint64(0)
			for _, test := range tests {
				if test.flipped && family.second == "" {
					continue
				}
				t.Run(test.name, func(t *testing.T) {
					from, by, to := l.Inside(0), in.Addr(), rawICMP(t, l.Outside, peer.Addr())
					if test.inward {
						from, by, to = l.Outside, peer.Addr(), rawICMP(t, l.Inside(0), in.Addr())
					}
					s := rawICMP(t, from, by)
					onOneCPU(t) // to keep their order; see lab.Lost
					check(t, unix.Sendto(s, test.about.message("about an anchor"), 0, sockaddr(test.about.src.Addr())))
					check(t, unix.Sendto(s, test.fence.message("about a flow"), 0, sockaddr(test.fence.src.Addr())))
					for b := make([]byte, 1500); ; {
						n, _, err := unix.Recvfrom(to, b, 0)
						if err != nil {
							t.Fatal("the error about a flow did not come: ", err)
						}
						if bytes.Contains(b[:n], []byte("about an anchor")) {
							t.Errorf("it came: % x", b[:n])
						}
						if bytes.Contains(b[:n], []byte("about a flow")) {
							break
						}
					}
					want++
					if n := count(t, table).PortZeroDrops; n != want {
						t.Errorf("%d were dropped, want %d", n, want)
					}
				})
			}
		})
	}
}

// A family without an enabled subnet is not guarded: its closed ports answer.
//
// Fails when the guard does not test the family.
func TestGuardLeavesAFamilyThatIsNotEnabledAlone(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true})
	table := open(t, l)
	for _, tc := range []struct {
		subnets       []netip.Prefix
		open, guarded string
		own, peer     netip.Addr
	}{
		{[]netip.Prefix{lab.InsideNet}, "[2001:db8:ffff::1]:5060", "198.51.100.1:5060", ext4, lab.PeerA},
		{[]netip.Prefix{lab.InsideNet6}, "198.51.100.1:5060", "[2001:db8:ffff::1]:5060", ext6, lab.Peer6A},
		{nil, "198.51.100.1:5060", "", ext4, lab.PeerA},
	} {
		set(t, table, rules.Desired{OutsideLinks: []string{"wan0"}, Subnets: tc.subnets, Guard: true})
		check(t, refused(l.Outside, tc.open))
		if tc.guarded == "" {
			continue
		}
		before := count(t, table).GuardDrops
		fence, peer := listen(t, l.Gateway, tc.own, 7000), listen(t, l.Outside, tc.peer, 0)
		check(t, lab.Lost(fence,
			lab.Packet{From: peer, To: netip.MustParseAddrPort(tc.guarded), Payload: "early"},
			lab.Packet{From: peer, To: fence.Addr(), Payload: "fence"}))
		if n := count(t, table).GuardDrops - before; n != 1 {
			t.Errorf("%v: %d packets were dropped", tc.subnets, n)
		}
		check(t, fence.Close())
	}
}

// Expected flows in a family without an enabled subnet are not ours, even if their master
// has the helper that anchors have.
//
// Fails when children does not test the family.
func TestWhatIsExpectedInAFamilyThatIsNotEnabledGoesOn(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true})
	in := netip.AddrPortFrom(l.Inside(0).Addr6, 5060)
	inside, table := listen(t, l.Inside(0), in.Addr(), in.Port()), open(t, l)
	d := permit(t, l, in.String(), in.String(), lab.Peer6A)
	d.OutsideLinks = []string{"wan1"}
	from := listen(t, l.Outside, lab.Peer6A, 0)
	set(t, table, d)
	check(t, from.Send(in, "by no outside link"))
	eventually(t, func() bool { return count(t, table).SpoofedDrops == 1 })
	d.Subnets = []netip.Prefix{lab.InsideNet}
	set(t, table, d)
	check(t, lab.Arrives(inside, lab.Packet{From: from, To: in, Payload: "not ours"}))
}

// Links that share a network are equivalent: with VRRP a peer's packet comes by the link of
// the virtual address while the default route uses the link below, or the other way round.
//
// Fails when the chain child knows only the names of outside links.
func TestPeersComeByALinkThatSharesTheOutsideNetwork(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	for _, args := range []string{
		"link add link wan0 name vrrp.51 address 02:00:00:00:00:51 type macvlan mode bridge",
		"addr add 198.51.100.2/32 dev vrrp.51", "link set vrrp.51 up",
	} {
		output(t, l, "ip", strings.Fields(args)...)
	}
	check(t, l.Gateway.SetSysctl("net.ipv4.conf.all.rp_filter", "0"))
	if _, err := l.Outside.Output("ip", strings.Fields("neigh add 198.51.100.2 lladdr 02:00:00:00:00:51 dev eth0 nud permanent")...); err != nil {
		t.Fatal(err)
	}
	inside, table := listen(t, l.Inside(0), l.Inside(0).Addr, 5060), open(t, l)
	for outside, ext := range map[string]string{"wan0": "198.51.100.2:5060", "vrrp.51": "198.51.100.1:5060"} {
		d := permit(t, l, ext, "10.47.11.109:5060", lab.PeerA)
		d.OutsideLinks = []string{outside}
		set(t, table, d)
		from, to := listen(t, l.Outside, lab.PeerA, 0), netip.MustParseAddrPort(ext)
		dropped := count(t, table).SpoofedDrops
		check(t, from.Send(to, "by the other link"))
		eventually(t, func() bool { return count(t, table).SpoofedDrops == dropped+1 })
		d.Segments = map[string][]string{"wan0": {"vrrp.51"}, "lan0": {"vrrp.52"}}
		set(t, table, d)
		check(t, lab.Arrives(inside, lab.Packet{From: from, To: to, Payload: outside}))
	}
}
