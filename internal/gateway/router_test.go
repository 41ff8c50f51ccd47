package gateway

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

// Of the marks that routing rules select by, a packet may come in with each, but not with one that a
// rule excepts, as that of wg-quick. Rules may give it another, and where these are not known, it may
// have any.
//
// Fails when the mark of a tunnel's own packets shows a way of others, when marks are tried that the
// packet cannot have, and when they are not where that is not known.
func TestRouterTriesMarks(t *testing.T) {
	asIs := func(_ int, arriving []uint32) ([]uint32, bool) { return arriving, true }
	unknown := func(int, []uint32) ([]uint32, bool) { return nil, false }
	to := func(mark uint32) Marking { return func(int, []uint32) ([]uint32, bool) { return []uint32{mark}, true } }
	for name, tt := range map[string]struct {
		rule string
		mark Marking
		want []string
	}{
		"excepted":                   {"rule add not fwmark 2 table 7", asIs, []string{"vpn0"}},
		"excepted, perhaps":          {"rule add not fwmark 2 table 7", unknown, []string{"vpn0", "wan0"}},
		"excepted, and marked":       {"rule add not fwmark 2 table 7", to(2), []string{"wan0"}},
		"selected":                   {"rule add fwmark 2 table 7", asIs, []string{"vpn0", "wan0"}},
		"selected, perhaps":          {"rule add fwmark 2 table 7", unknown, []string{"vpn0", "wan0"}},
		"selected, and marked":       {"rule add fwmark 2 table 7", to(2), []string{"vpn0"}},
		"selected, marked otherwise": {"rule add fwmark 2 table 7", to(3), []string{"wan0"}},
		"selected, by a mask":        {"rule add fwmark 0x2/0xf table 7", to(0x32), []string{"vpn0"}},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGateway(t, "link add vpn0 type bridge", "link set vpn0 up", "route replace default via 198.51.100.254 dev wan0",
				"route add default dev vpn0 table 7", tt.rule, "rule add table main suppress_prefixlength 0")
			n := readNetwork(t, g)
			r, err := DialRouter(g.FD(), n)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			lan := 0
			links, _, err := r.Links(endpoint("10.47.11.109:5060"), endpoint("203.0.113.5:5060"), func(link int, arriving []uint32) ([]uint32, bool) {
				lan = link
				return tt.mark(link, arriving)
			})
			if err != nil {
				t.Fatal(err)
			}
			if names := namesOf(n, links); !slices.Equal(slices.Sorted(slices.Values(names)), tt.want) {
				t.Errorf("%q, want %q", names, tt.want)
			}
			if names := namesOf(n, []int{lan}); !slices.Equal(names, []string{"lan0"}) {
				t.Errorf("the packet comes in by %q", names)
			}
		})
	}
}

// The kernel says by which link a host's packets leave, for each mark and type of service
// that routing rules and routes select by.
func TestRouterFindsTheLinksOfAHostsPackets(t *testing.T) {
	g := newGateway(t,
		"link add wan1 type bridge", "address add 198.51.100.129/32 dev wan1", "link set wan1 up",
		"link add vpn0 type bridge", "link set vpn0 up", "neigh add 198.51.100.254 lladdr 02:00:00:00:00:01 dev wan1")
	src, dst := endpoint("10.47.11.109:5060"), endpoint("203.0.113.5:5060")
	for _, step := range []struct {
		command string
		want    []string
	}{
		{"route replace default via 198.51.100.254 dev wan0", []string{"wan0"}},
		{"route replace default via 198.51.100.254 dev wan1 onlink", []string{"wan1"}},
		{"rule add from 10.47.11.110 table 7", []string{"wan1"}}, // another host's
		{"route add default dev vpn0 table 7", []string{"wan1"}},
		{"rule add ipproto udp dport 5060 table 7", []string{"vpn0"}},
		{"rule del ipproto udp dport 5060 table 7", []string{"wan1"}},
		{"rule add fwmark 2 table 7", []string{"wan1", "vpn0"}},
		{"rule del fwmark 2 table 7", []string{"wan1"}},
		{"route add local default dev lo table 8", []string{"wan1"}},
		{"rule add fwmark 3 table 8", []string{"wan1"}}, // as for TPROXY
		{"rule del fwmark 3 table 8", []string{"wan1"}},
		{"rule add tos 0x18 table 7", []string{"wan1", "vpn0"}},
		{"route add default dev wan0 tos 0x10", []string{"wan1", "vpn0", "wan0"}},
		{"rule del tos 0x18 table 7", []string{"wan1", "wan0"}},
		{"rule add tos 0x18 fwmark 2 table 7", []string{"wan1", "wan0", "vpn0"}},
		{"rule del tos 0x18 fwmark 2 table 7", []string{"wan1", "wan0"}},
		{"route del default tos 0x10", []string{"wan1"}},
		{"rule add not tos 0x18 table 7", []string{"wan1", "vpn0"}},
		{"rule del not tos 0x18 table 7", []string{"wan1"}},
		{"route add blackhole 203.0.113.0/24", nil},
		{"route del blackhole 203.0.113.0/24", []string{"wan1"}},
		{"link set wan1 down", nil},
	} {
		before := readNetwork(t, g)
		ip(t, g, step.command)
		n := readNetwork(t, g)
		names, all := linksOf(t, g, n, src, dst)
		if some := step.command == "rule add fwmark 3 table 8"; all == (some || len(step.want) == 0) {
			t.Errorf("after %q: its packets leave with each mark: %v", step.command, all)
		}
		slices.Sort(step.want)
		if !slices.Equal(names, step.want) {
			t.Errorf("after %q: %q, want %q", step.command, names, step.want)
		}
		if step.command[:5] == "rule " && n.SameRoutes(before) || !n.SameRoutes(readNetwork(t, g)) {
			t.Errorf("%q: whether routes changed is not seen", step.command)
		}
	}
}

// linksOf returns the names of the links by which a packet with any mark may leave, and whether it
// leaves with each.
func linksOf(t *testing.T, g *lab.Host, n Network, src, dst cone.Endpoint) (names []string, all bool) {
	t.Helper()
	r, err := DialRouter(g.FD(), n)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	links, all, err := r.Links(src, dst, func(int, []uint32) ([]uint32, bool) { return nil, false })
	if err != nil {
		t.Fatal(err)
	}
	return namesOf(n, links), all
}

// Fails when IPv6 packets are asked about as those of IPv4, or with the marks of its rules.
func TestRouterFindsTheLinksOfAHostsIPv6Packets(t *testing.T) {
	g := newGateway(t, "link add wan1 type bridge", "link set wan1 up", "link add vpn0 type bridge", "link set vpn0 up",
		"address add 2001:db8:1::1/64 dev wan0 nodad", "address add 2001:db8:2::1/64 dev wan1 nodad",
		"rule add fwmark 3 table 7", "route add default dev wan0 table 7")
	src, dst := endpoint("[2001:db8:47::109]:5060"), endpoint("[2001:db8:5::5]:5060")
	for _, step := range []struct {
		command string
		want    []string
	}{
		{"-6 route replace default via 2001:db8:1::fe dev wan0", []string{"wan0"}},
		{"-6 route replace default via 2001:db8:2::fe dev wan1", []string{"wan1"}},
		{"-6 rule add fwmark 2 table 7", []string{"wan1"}},
		{"-6 route add default dev vpn0 table 7", []string{"vpn0", "wan1"}},
		{"-6 rule add from 2001:db8:47::/64 table 7", []string{"vpn0"}},
		{"-6 route add unreachable default table 7 metric 1", nil},
	} {
		before := readNetwork(t, g)
		ip(t, g, step.command)
		n := readNetwork(t, g)
		names, all := linksOf(t, g, n, src, dst)
		slices.Sort(names)
		if !slices.Equal(names, step.want) || all == (len(step.want) == 0) {
			t.Errorf("after %q: %q, want %q; all: %v", step.command, names, step.want, all)
		}
		if step.command[:8] == "-6 rule " && n.SameRoutes(before) {
			t.Errorf("%q: that rules changed is not seen", step.command)
		}
	}
}

// Fails when a selector of a rule or route that the Router cannot try is overlooked, and
// when one that it tries counts as hidden.
func TestNetworkKnowsThatWaysAreHidden(t *testing.T) {
	for command, want := range map[string]bool{
		"route add 203.0.113.0/24 dev wan0":                 false,
		"rule add fwmark 2 table 7":                         false,
		"rule add ipproto udp dport 5060 table 7":           false,
		"rule add from 10.47.11.0/24 iif lan0 table 7":      false,
		"rule add tos 0x10 table 7":                         false,
		"route add 203.0.113.0/24 dev wan0 tos 0x10":        false,
		"route add default dev wan0 tos 0x08 table 7":       false,
		"rule add tun_id 7 table 7":                         true,
		"rule add table main suppress_prefixlength 0":       false,
		"rule add from 10.47.11.0/24 goto 32766 priority 9": false,
	} {
		g := newGateway(t)
		ip(t, g, command)
		if got := readNetwork(t, g).Lean().HidesWays(IPv4); got != want {
			t.Errorf("%q: %v", command, got)
		}
	}
}

func TestNetworkOwnsWhatEndsHere(t *testing.T) {
	g := newGateway(t, "route add blackhole 192.0.2.64/28", "route add local 192.0.2.96/28 dev lo",
		"route add unreachable 192.0.2.128/32", "address add 192.0.2.200/32 dev lo",
		"route add blackhole default metric 4000", "route add blackhole 172.0.0.0/8")
	owned := readNetwork(t, g).Owned()
	for a, want := range map[string]bool{
		"192.0.2.66": true, "192.0.2.100": true, "192.0.2.128": true, "192.0.2.200": true, "198.51.100.1": true, "10.47.11.1": true,
		"192.0.2.80": false, "198.51.100.77": false, "203.0.113.5": false, "172.1.1.1": false,
	} {
		if owned(addr(a)) != want {
			t.Errorf("%s: owned %v", a, !want)
		}
	}
}

// namesOf returns the names of links in order.
func namesOf(n Network, links []int) []string {
	names := n.names(func(l Link) bool { return slices.Contains(links, l.Index) })
	slices.Sort(names)
	return names
}

// Packets that the gateway forwards belong to no user, and the kernel routes them as root's. The
// daemon usually runs as another user, for which routing rules may have another way, as for the
// programs that shall use a VPN.
//
// Fails when the kernel is asked for the user who asks, by one of the look-ups.
func TestWaysOfHostsAreNotThoseOfTheDaemonsUser(t *testing.T) {
	const user = 4711
	for name, tt := range map[string]struct {
		rules      []string
		back, away string
	}{
		"rules for the user": {[]string{"rule add uidrange 4711-4711 table 7", "-6 rule add uidrange 1-4294967294 table 7"}, "lan0", "wan0"},
		"rules for root":     {[]string{"rule add iif lan0 uidrange 0-0 table 7", "-6 rule add iif lan0 uidrange 0-0 table 7"}, "lan0", "vpn0"},
		"the way back by a rule for root": {[]string{
			"rule add iif lo uidrange 0-0 table 8", "-6 rule add iif lo uidrange 0-0 table 8",
		}, "guest0", "wan0"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGateway(t, append(tt.rules, "link add vpn0 type bridge", "link set vpn0 up",
				"address add 2001:db8:1::1/64 dev wan0 nodad", "-6 route replace default via 2001:db8:1::fe dev wan0",
				"route replace default via 198.51.100.254 dev wan0", "route add default dev vpn0 table 7", "-6 route add default dev vpn0 table 7",
				"route add default dev guest0 table 8", "-6 route add default dev guest0 table 8",
				"route add default dev wan0 table 9", "-6 route add default dev wan0 table 9", "rule add iif guest0 table 9", "-6 rule add iif guest0 table 9")...)
			if err := g.SetSysctl("net.ipv4.conf.all.rp_filter", "0"); err != nil {
				t.Fatal(err)
			}
			n := readNetwork(t, g)
			err := g.Do(func() error {
				if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, user, user, user); errno != 0 {
					return errno
				}
				to, err := n.LinksTo(0, []netip.Prefix{lab.InsideNet, lab.InsideNet6})
				if err != nil {
					return err
				}
				for i, l := range to {
					if l.Name != tt.back {
						t.Errorf("the link to subnet %d is %q, want %q", i, l.Name, tt.back)
					}
				}
				r, err := DialRouter(0, n)
				if err != nil {
					return err
				}
				defer r.Close()
				for src, dst := range map[string]string{"10.47.11.109:5060": "203.0.113.5:5060", "[2001:db8:47::109]:5060": "[2001:db8:5::5]:5060"} {
					in := 0
					links, _, err := r.Links(endpoint(src), endpoint(dst), func(link int, arriving []uint32) ([]uint32, bool) { return arriving, true })
					if err != nil {
						return err
					}
					in = int(r.inside[endpoint(src).Addr])
					if names := namesOf(n, []int{in}); !slices.Equal(names, []string{tt.back}) {
						t.Errorf("%s: packets come in by %q, want %q", src, names, tt.back)
					}
					if names := namesOf(n, links); !slices.Equal(names, []string{tt.away}) {
						t.Errorf("%s: packets leave by %q, want %q", src, names, tt.away)
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}
