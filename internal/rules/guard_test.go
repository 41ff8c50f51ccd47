package rules_test

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

var (
	ext4 = netip.MustParseAddr("198.51.100.1")
	ext6 = netip.MustParseAddr("2001:db8:ffff::1")
)

func listen(t *testing.T, h *lab.Host, addr netip.Addr, port uint16) *lab.Socket {
	t.Helper()
	s, err := h.Socket(addr, port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func entries(t *testing.T, l *lab.Lab, args ...string) []string {
	t.Helper()
	lines, err := l.Conntrack(args...)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestGuardDropsWhatNoSocketWaitsFor(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true})
	table := open(t, l)
	set(t, table, guard)
	for i, test := range []struct {
		family    string
		peer, ext netip.Addr
	}{{"ipv4", lab.PeerA, ext4}, {"ipv6", lab.Peer6A, ext6}} {
		peer := listen(t, l.Outside, test.peer, 0)
		fence := listen(t, l.Gateway, test.ext, 7000)
		check(t, lab.Lost(fence,
			lab.Packet{From: peer, To: netip.AddrPortFrom(test.ext, 5060), Payload: "early"},
			lab.Packet{From: peer, To: fence.Addr(), Payload: "fence"}))
		if got := entries(t, l, "-p", "udp", "-f", test.family, "--dport", "5060"); len(got) != 0 {
			t.Errorf("an entry was made: %q", got)
		}
		if c := count(t, table); c != (totals{GuardDrops: uint64(i + 1)}) {
			t.Errorf("%+v", c)
		}
	}
}

func TestGuardPassesWhatASocketWaitsFor(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true, Rules: lab.Masquerade + `table ip forwards {
		chain prerouting { type nat hook prerouting priority dstnat; udp dport 8000 redirect to :7001; }
	}`})
	table := open(t, l)
	set(t, table, guard)
	tests := []struct {
		name     string
		bound    string
		peer, to string
	}{
		{"address", "198.51.100.1:7000", "203.0.113.5", "198.51.100.1:7000"},
		{"wildcard", "0.0.0.0:7000", "203.0.113.5", "198.51.100.1:7000"},
		{"dual stack, IPv4", "[::]:7000", "203.0.113.5", "198.51.100.1:7000"},
		{"dual stack, IPv6", "[::]:7000", "2001:db8:5::5", "[2001:db8:ffff::1]:7000"},
		{"IPv6 address", "[2001:db8:ffff::1]:7000", "2001:db8:5::5", "[2001:db8:ffff::1]:7000"},
		{"broadcast", "0.0.0.0:7000", "198.51.100.254", "198.51.100.255:7000"},
		{"the user's redirect", "0.0.0.0:7001", "203.0.113.5", "198.51.100.1:8000"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			bound, err := l.Gateway.ListenUDP(netip.MustParseAddrPort(test.bound))
			if err != nil {
				t.Fatal(err)
			}
			defer bound.Close()
			peer := listen(t, l.Outside, netip.MustParseAddr(test.peer), 0)
			setBroadcast(t, peer.UDPConn)
			check(t, peer.Send(netip.MustParseAddrPort(test.to), test.name))
			check(t, bound.SetReadDeadline(time.Now().Add(5*time.Second)))
			b := make([]byte, 100)
			if n, err := bound.Read(b); err != nil || string(b[:n]) != test.name {
				t.Errorf("got %q, %v", b[:n], err)
			}
		})
	}
	if c := count(t, table); c != (totals{}) {
		t.Errorf("%+v", c)
	}
}

func setBroadcast(t *testing.T, c syscall.Conn) {
	t.Helper()
	raw, err := c.SyscallConn()
	check(t, err)
	check(t, raw.Control(func(fd uintptr) { check(t, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1)) }))
}

// refused sends a packet and waits for the ICMP error that the port is closed.
func refused(h *lab.Host, to string) error {
	return h.Do(func() error {
		c, err := net.Dial("udp", to)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("anybody there?")); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			return err
		}
		_, err = c.Read(make([]byte, 10))
		if errors.Is(err, unix.ECONNREFUSED) {
			return nil
		}
		return errors.Join(errors.New("the port was not refused"), err)
	})
}

func TestGuardLeavesInsideLinksAlone(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	table := open(t, l)
	set(t, table, guard)
	check(t, refused(l.Inside(0), "10.47.11.1:5060"))
	check(t, refused(l.Inside(0), "198.51.100.1:5060"))
	if c := count(t, table); c != (totals{}) {
		t.Errorf("%+v", c)
	}
	// With the link among the outside ones the same packet is dropped.
	set(t, table, rules.Desired{OutsideLinks: []string{"lan0"}, Subnets: both, Guard: true})
	inside := listen(t, l.Inside(0), l.Inside(0).Addr, 0)
	fence := listen(t, l.Gateway, netip.MustParseAddr("10.47.11.1"), 7000)
	check(t, lab.Lost(fence,
		lab.Packet{From: inside, To: netip.MustParseAddrPort("10.47.11.1:5060"), Payload: "early"},
		lab.Packet{From: inside, To: fence.Addr(), Payload: "fence"}))
	if c := count(t, table); c != (totals{GuardDrops: 1}) {
		t.Errorf("%+v", c)
	}
	check(t, refused(l.Outside, "198.51.100.1:5060")) // as the link is not now
}

func TestRejectOfTheUserStillAnswers(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.Masquerade + `table inet filter {
		chain input { type filter hook input priority filter; iifname wan0 ct state new udp dport 5060 counter reject; }
	}`})
	table := open(t, l)
	set(t, table, guard)
	check(t, refused(l.Outside, "198.51.100.1:5060"))
	if got := output(t, l, "nft", "list", "table", "inet", "filter"); !strings.Contains(got, "packets 1 ") {
		t.Error("the user's rule did not count:", got)
	}
	if c := count(t, table); c != (totals{}) {
		t.Errorf("%+v", c)
	}
}

// A packet from outside with an inside host's source leaves no trace, whether the host has
// such a flow or not. The inside host's own packets pass.
//
// Fails without the rules of the function spoofed, and when packets with port 0 pass them by.
func TestGuardDropsInsideSourcesFromOutside(t *testing.T) {
	for name, tc := range map[string]struct {
		inside, peer, far netip.Addr
		build             []string // on the outside host: who spoofs sends by the gateway
	}{
		"ipv4": {netip.MustParseAddr("10.47.11.109"), lab.PeerA, netip.MustParseAddr("192.0.2.99"), []string{
			"addr add 10.47.11.109/32 dev lo", "route add table local unicast 192.0.2.99/32 via 198.51.100.1",
			"route replace table local unicast 203.0.113.5/32 via 198.51.100.1",
			"route add table local unicast 10.47.11.110/32 via 198.51.100.1",
		}},
		"ipv6": {netip.MustParseAddr("2001:db8:47::109"), lab.Peer6A, netip.MustParseAddr("2001:db8:5::99"), []string{
			"-6 addr add 2001:db8:47::109/128 dev lo nodad", "-6 route add table local unicast 2001:db8:5::99/128 via 2001:db8:ffff::1",
			"-6 route add table local unicast 2001:db8:47::110/128 via 2001:db8:ffff::1",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Inside: 2, IPv6: true})
			for _, link := range []string{"all", "wan0"} {
				check(t, l.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
			}
			table := open(t, l)
			set(t, table, rules.Desired{OutsideLinks: []string{"wan0"}, Subnets: both, Guard: true, Spoofed: true, Helpers: onAnchors})
			host := listen(t, l.Inside(0), tc.inside, 5060)
			check(t, host.Send(netip.AddrPortFrom(tc.peer, 5060), "its own"))
			eventually(t, func() bool { return len(entries(t, l, "-p", "udp", "-f", name)) == 1 })
			for _, args := range tc.build {
				if _, err := l.Outside.Output("ip", strings.Fields(args)...); err != nil {
					t.Fatal(err)
				}
			}
			spoofer := listen(t, l.Outside, tc.inside, 5060)
			for range 3 {
				check(t, spoofer.Send(netip.AddrPortFrom(tc.far, 5060), "spoofed"))
			}
			eventually(t, func() bool { return count(t, table).SpoofedDrops == 3 })
			if name == "ipv4" {
				check(t, spoofer.Send(netip.AddrPortFrom(tc.peer, 5060), "spoofed, of a flow that there is"))
				eventually(t, func() bool { return count(t, table).SpoofedDrops == 4 })
			}
			before := count(t, table).SpoofedDrops
			udp(t, l.Outside, netip.AddrPortFrom(tc.inside, 0), netip.AddrPortFrom(tc.inside.Next(), 5060))
			eventually(t, func() bool { return count(t, table).SpoofedDrops == before+1 })
			if got := entries(t, l, "-p", "udp", "-f", name); len(got) != 1 {
				t.Errorf("entries: %q", got)
			}
			check(t, host.Send(netip.AddrPortFrom(tc.peer, 5061), "its own"))
			eventually(t, func() bool { return len(entries(t, l, "-p", "udp", "-f", name)) == 2 })
		})
	}
}

// A host of an enabled prefix that is routed through an outside link is not spoofed: behind
// a tunnel over that link, a router with one link, or a link that got a default route.
//
// Fails when the rules do not test the way back.
func TestGuardLetsInsideHostsThatAreOutside(t *testing.T) {
	const far = "192.0.2.99"
	for name, tc := range map[string]struct {
		outside []string
		host    func(l *lab.Lab) *lab.Host
		source  string
	}{
		"behind the outside link":       {[]string{"wan0"}, func(l *lab.Lab) *lab.Host { return l.Outside }, "10.47.11.200"},
		"on a link that became outside": {[]string{"lan0", "wan0"}, func(l *lab.Lab) *lab.Host { return l.Inside(0) }, "10.47.11.109"},
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{})
			table := open(t, l)
			set(t, table, rules.Desired{OutsideLinks: tc.outside, Subnets: []netip.Prefix{lab.InsideNet}, Spoofed: true})
			host := tc.host(l)
			if host == l.Outside {
				for _, step := range []struct {
					h    *lab.Host
					args string
				}{
					{l.Gateway, "route add " + tc.source + "/32 via 198.51.100.254 dev wan0"},
					{l.Outside, "addr add " + tc.source + "/32 dev lo"},
					{l.Outside, "route add table local unicast " + far + "/32 via 198.51.100.1"},
				} {
					if _, err := step.h.Output("ip", strings.Fields(step.args)...); err != nil {
						t.Fatal(err)
					}
				}
			}
			s := listen(t, host, netip.MustParseAddr(tc.source), 5060)
			check(t, s.Send(netip.AddrPortFrom(netip.MustParseAddr(far), 5060), "x"))
			eventually(t, func() bool { return len(entries(t, l, "-p", "udp", "--orig-src", tc.source)) == 1 })
			if n := count(t, table).SpoofedDrops; n != 0 {
				t.Errorf("%d packets were dropped", n)
			}
		})
	}
}
