package rules_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// permit makes permissions stand as expectations and returns the rules that fit them.
func permit(t testing.TB, l *lab.Lab, ext, in string, peers ...netip.Addr) rules.Desired {
	t.Helper()
	b, err := expect.Open(expect.Config{NetNS: l.Gateway.FD(), Lifetime: time.Hour, IPv6: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, b.Close()) })
	var ps []cone.Permission
	for _, peer := range peers {
		ps = append(ps, cone.Permission{
			Key: cone.Key{Ext: cone.EndpointFrom(netip.MustParseAddrPort(ext)), Peer: cone.AddrFrom(peer)},
			Int: cone.EndpointFrom(netip.MustParseAddrPort(in)),
		})
	}
	b.Grant(ps, func(i int, r cone.Reason, err error) { t.Fatal(ps[i], r, err) })
	return rules.Desired{OutsideLinks: []string{"wan0"}, Subnets: both, Helpers: b.OnAnchors()}
}

// eventually waits for something that happens by itself.
func eventually(t *testing.T, what func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !what(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("still not so after 30 s")
		}
	}
}

// send sends one packet from each of n new ports of a peer.
func send(t *testing.T, l *lab.Lab, peer netip.Addr, n int, to netip.AddrPort) {
	t.Helper()
	for i := range n {
		check(t, listen(t, l.Outside, peer, 0).Send(to, fmt.Sprint(peer, " ", i)))
	}
}

// receive counts the packets that have arrived.
func receive(t *testing.T, s *lab.Socket) (n int) {
	t.Helper()
	for ; ; n++ {
		if _, _, err := s.Recv(time.Millisecond); errors.Is(err, os.ErrDeadlineExceeded) {
			return n
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func TestChildrenOfAPermissionAreCapped(t *testing.T) {
	tests := []struct {
		name, ext, in string
		a, b          netip.Addr
	}{
		{"translated", "198.51.100.1:5060", "10.47.11.109:5060", lab.PeerA, lab.PeerB},
		{"routed", "[2001:db8:47::109]:5060", "[2001:db8:47::109]:5060", lab.Peer6A, lab.Peer6B},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy})
			capped := permit(t, l, test.ext, test.in, test.a, test.b)
			capped.MaxChildren = 10
			table := open(t, l)
			set(t, table, capped)
			in, ext := netip.MustParseAddrPort(test.in), netip.MustParseAddrPort(test.ext)
			inside := listen(t, l.Inside(0), in.Addr(), in.Port())

			// An earlier child, which the cap must not disturb.
			child := listen(t, l.Outside, test.a, 0)
			check(t, lab.Arrives(inside, lab.Packet{From: child, To: ext, Payload: "first"}))
			send(t, l, test.a, 39, ext)
			eventually(t, func() bool { return count(t, table).ChildDrops == 30 })
			got := 1
			eventually(t, func() bool { got += receive(t, inside); return got >= 10 })
			check(t, lab.Lost(inside,
				lab.Packet{From: listen(t, l.Outside, test.a, 0), To: ext, Payload: "one more"},
				lab.Packet{From: child, To: ext, Payload: "the first goes on"}))
			if got != 10 {
				t.Errorf("%d children came in", got)
			}
			if c := count(t, table); c != (totals{ChildDrops: 31, Expected: 10}) {
				t.Errorf("%+v", c)
			}

			// Another peer has its own cap.
			check(t, lab.Arrives(inside, lab.Packet{From: listen(t, l.Outside, test.b, 0), To: ext, Payload: "other"}))

			// Another link does not reset the counts; another cap applies at once.
			capped.OutsideLinks = append(capped.OutsideLinks, "ppp0")
			set(t, table, capped)
			check(t, lab.Lost(inside,
				lab.Packet{From: listen(t, l.Outside, test.a, 0), To: ext, Payload: "still"},
				lab.Packet{From: child, To: ext, Payload: "and on"}))
			capped.MaxChildren = 1000
			set(t, table, capped)
			check(t, lab.Arrives(inside, lab.Packet{From: listen(t, l.Outside, test.a, 0), To: ext, Payload: "now"}))
		})
	}
}

func TestAnEndedChildMakesRoom(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	capped := permit(t, l, "198.51.100.1:5060", "10.47.11.109:5060", lab.PeerA)
	capped.MaxChildren = 1
	set(t, open(t, l), capped)
	inside := listen(t, l.Inside(0), l.Inside(0).Addr, 5060)
	ext := netip.MustParseAddrPort("198.51.100.1:5060")
	one, two := listen(t, l.Outside, lab.PeerA, 6001), listen(t, l.Outside, lab.PeerA, 6002)
	check(t, lab.Arrives(inside, lab.Packet{From: one, To: ext, Payload: "one"}))
	check(t, lab.Lost(inside, lab.Packet{From: two, To: ext, Payload: "two"}, lab.Packet{From: one, To: ext, Payload: "fence"}))
	output(t, l, "conntrack", "-D", "-p", "udp", "--sport", "6001")
	check(t, lab.Arrives(inside, lab.Packet{From: two, To: ext, Payload: "two now"}))
}

func TestForwardsOfTheUserAreNotCapped(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.Masquerade + `table ip forwards {
		chain prerouting { type nat hook prerouting priority dstnat; iifname wan0 udp dport 6000 dnat to 10.47.11.109; }
	}`})
	table := open(t, l)
	set(t, table, rules.Desired{OutsideLinks: []string{"wan0"}, Subnets: both, Helpers: onAnchors, MaxChildren: 1})
	inside := listen(t, l.Inside(0), l.Inside(0).Addr, 6000)
	send(t, l, lab.PeerA, 20, netip.MustParseAddrPort("198.51.100.1:6000"))
	got := 0
	eventually(t, func() bool { got += receive(t, inside); return got == 20 })
	if c := count(t, table); c != (totals{}) {
		t.Errorf("%+v", c)
	}
}

// udp sends a datagram with ports that a UDP socket does not allow.
func udp(t *testing.T, h *lab.Host, from, to netip.AddrPort) {
	t.Helper()
	check(t, h.Do(func() error {
		family, level := unix.AF_INET, unix.SOCK_RAW
		if to.Addr().Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, level, unix.IPPROTO_UDP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		b := binary.BigEndian.AppendUint16(nil, from.Port())
		b = binary.BigEndian.AppendUint16(b, to.Port())
		b = append(b, 0, 8, 0, 0)
		if to.Addr().Is6() { // which has no packets without a sum
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_CHECKSUM, 6); err != nil {
				return err
			}
		}
		if err := unix.Bind(fd, sockaddr(from.Addr())); err != nil {
			return err
		}
		return unix.Sendto(fd, b, 0, sockaddr(to.Addr()))
	}))
}

func sockaddr(a netip.Addr) unix.Sockaddr {
	if a.Is6() {
		return &unix.SockaddrInet6{Addr: a.As16()}
	}
	return &unix.SockaddrInet4{Addr: a.As4()}
}

var timeout = regexp.MustCompile(`^udp +17 +(\d+)`)

func TestPortZeroNeverMatchesAnAnchor(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	d := permit(t, l, "198.51.100.1:5060", "10.47.11.109:5060", lab.PeerA)
	table := open(t, l)
	set(t, table, d)
	host := l.Inside(0)
	in, peer := netip.AddrPortFrom(host.Addr, 0), netip.AddrPortFrom(lab.PeerA, 5060)

	udp(t, host, in, peer)                                                              // the anchor's own tuple
	udp(t, host, netip.AddrPortFrom(host.Addr, 5060), netip.AddrPortFrom(lab.PeerA, 0)) // that of a flipped one
	udp(t, l.Outside, netip.AddrPortFrom(lab.PeerA, 0), netip.MustParseAddrPort("198.51.100.1:5060"))
	eventually(t, func() bool { return count(t, table).PortZeroDrops == 3 })

	got := entries(t, l, "-p", "udp")
	if len(got) != 1 {
		t.Fatalf("entries: %q", got)
	}
	m := timeout.FindStringSubmatch(got[0])
	if m == nil {
		t.Fatal(got[0])
	}
	if n, err := strconv.Atoi(m[1]); err != nil || n < 3600 {
		t.Errorf("the anchor's time was cut: %s", got[0])
	}
}
