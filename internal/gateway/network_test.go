package gateway

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

func TestOutsideLinks(t *testing.T) {
	tests := []struct {
		name     string
		commands []string
		outside  []string
		want     []string
	}{
		{name: "main table", want: []string{"wan0"}},
		{
			name: "only in a custom table",
			commands: []string{
				"route del default", "-6 route del default",
				"route add default via 10.47.12.20 dev guest0 table 4242",
			},
			want: []string{"guest0"},
		},
		{
			name:     "two uplinks",
			commands: []string{"route add default via 10.47.12.20 dev guest0 table 100"},
			want:     []string{"guest0", "wan0"},
		},
		{
			name: "two next hops",
			commands: []string{
				"route replace default nexthop via 198.51.100.254 nexthop via 10.47.12.20",
				"-6 route del default",
			},
			want: []string{"guest0", "wan0"},
		},
		{
			name: "nexthop object",
			commands: []string{
				"route del default", "-6 route del default",
				"nexthop add id 7 via 10.47.12.20 dev guest0", "route add default nhid 7",
			},
			want: []string{"guest0"},
		},
		{
			name:     "IPv6 alone",
			commands: []string{"route del default"},
			want:     []string{"wan0"},
		},
		{
			name: "halves of the default",
			commands: []string{
				"route add 0.0.0.0/1 via 10.47.12.20", "route add 128.0.0.0/1 via 10.47.12.20",
			},
			want: []string{"guest0", "wan0"},
		},
		{
			name: "only defaults that lead nowhere",
			commands: []string{
				"route del default", "-6 route del default",
				"route add unreachable default", "route add blackhole default table 100",
				"route add local default dev lo table 101", "-6 route add unreachable default",
			},
		},
		{
			name:     "named",
			commands: []string{"route del default", "-6 route del default"},
			outside:  []string{"guest0"},
			want:     []string{"guest0"},
		},
		{
			name:    "named beside the default",
			outside: []string{"guest0", "wan0"},
			want:    []string{"guest0", "wan0"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			n := readNetwork(t, newGateway(t, test.commands...), test.outside...)
			got := n.OutsideLinks()
			slices.Sort(got)
			if !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

// FRR and others make nexthop objects; the kernel shows the links behind them
// in the route unless told not to.
func TestNexthopObjectsAreResolvedWithoutCompatMode(t *testing.T) {
	g := newGateway(t,
		"route del default", "-6 route del default",
		"nexthop add id 7 via 10.47.12.20 dev guest0", "nexthop add id 8 via 198.51.100.254 dev wan0",
		"nexthop add id 9 group 7/8", "route add default nhid 9",
		"nexthop add id 10 blackhole", "route add default nhid 10 table 100")
	if err := g.SetSysctl("net.ipv4.nexthop_compat_mode", "0"); err != nil {
		t.Fatal(err)
	}
	got := readNetwork(t, g).OutsideLinks()
	slices.Sort(got)
	if want := []string{"guest0", "wan0"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestNamedLinkThatIsNotThereIsMissing(t *testing.T) {
	n, err := ReadNetwork(newGateway(t).FD(), Sides{Outside: []string{"ppp0", "wan0"}})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"ppp0"}; !slices.Equal(n.Missing, want) {
		t.Errorf("missing %q, want %q", n.Missing, want)
	}
	if got := n.OutsideLinks(); !slices.Equal(got, []string{"wan0"}) {
		t.Errorf("outside links: %q", got)
	}
}

func TestTopologyOfTheLab(t *testing.T) {
	g := newGateway(t,
		"link add docker0 up type bridge", "addr add 172.17.0.1/16 dev docker0",
		"addr add 198.51.100.9/32 dev lo",
		"route add 10.0.0.0/8 via 10.47.12.20",
		"route add 10.9.0.0/16 via 198.51.100.254",
		"route add 192.0.2.0/24 via 198.51.100.254")
	got := readNetwork(t, g).Topology()

	var routes []string
	for _, r := range got.Routes {
		way := " inside"
		if r.Outside {
			way = " outside"
		}
		routes = append(routes, r.Prefix.String()+way)
	}
	slices.Sort(routes)
	want := []string{
		"0.0.0.0/0 outside",
		"10.0.0.0/8 inside",
		"10.47.11.0/24 inside",
		"10.47.12.0/24 inside",
		"10.9.0.0/16 outside", // within an inside one
		"172.17.0.0/16 inside",
		"192.0.2.0/24 outside",
		"198.51.100.0/24 outside",
		"2001:db8:47::/64 inside",
		"2001:db8:48::/64 inside",
		"2001:db8:ffff::/64 outside",
		"::/0 outside",
	}
	if !slices.Equal(routes, want) {
		t.Errorf("routes:\n%s\nwant:\n%s", strings.Join(routes, "\n"), strings.Join(want, "\n"))
	}

	local := []netip.Addr{netip.MustParseAddr("172.17.0.1"), netip.MustParseAddr("198.51.100.9")}
	for _, p := range []netip.Prefix{
		lab.InsideNet, lab.InsideNet6, lab.GuestNet, lab.GuestNet6, lab.OutsideNet, lab.OutsideNet6,
	} {
		local = append(local, p.Addr().Next())
	}
	if local = unique(local); !slices.Equal(got.Local, local) {
		t.Errorf("local: %v, want %v", got.Local, local)
	}
}

func TestTopology(t *testing.T) {
	const wan, tun, lan, lo = 2, 3, 4, 1
	route := func(link int, prefix string) Route {
		return Route{Prefix: netip.MustParsePrefix(prefix), Link: link}
	}
	out := func(prefix string) cone.Route {
		return cone.Route{Prefix: netip.MustParsePrefix(prefix), Outside: true}
	}
	in := func(prefix string) cone.Route { return cone.Route{Prefix: netip.MustParsePrefix(prefix)} }
	tests := []struct {
		name   string
		routes []Route
		want   []cone.Route
	}{
		{
			"outside and inside",
			[]Route{route(wan, "0.0.0.0/0"), route(wan, "8.0.0.0/8"), route(tun, "1.0.0.0/24"), route(lan, "10.0.0.0/24"), route(wan, "10.0.0.0/24")},
			[]cone.Route{out("0.0.0.0/0"), out("8.0.0.0/8"), out("1.0.0.0/24"), in("10.0.0.0/24"), out("10.0.0.0/24")},
		},
		{
			"loopback, link-local and a link that came later",
			[]Route{route(lo, "10.0.0.0/8"), route(wan, "fe80::/64"), route(lan, "fe80::/64"), route(9, "10.0.0.0/24")},
			nil,
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			n := Network{
				Links: []Link{
					{Index: lo, Name: "lo", Flags: unix.IFF_LOOPBACK},
					{Index: wan, Name: "wan0", Outside: bothFamilies},
					{Index: tun, Name: "tun0", Outside: bothFamilies},
					{Index: lan, Name: "lan0"},
				},
				Routes: test.routes,
			}
			if got := n.Topology().Routes; !slices.Equal(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func TestCandidatesOnTheKernel(t *testing.T) {
	g := newGateway(t,
		"link add docker0 up type bridge", "addr add 172.17.0.1/16 dev docker0",
		"link add br-0123456789ab up type bridge", "addr add 172.18.0.1/16 dev br-0123456789ab",
		"link add br-lan up type bridge", "addr add 192.168.1.1/24 dev br-lan", "addr add 192.168.1.2/24 dev br-lan",
		"link add down0 type bridge", "addr add 192.168.3.1/24 dev down0",
		"tuntap add tun0 mode tun", "link set tun0 up", "addr add 10.8.0.1/24 dev tun0",
		"tuntap add tap0 mode tap", "link set tap0 up", "addr add 10.9.0.1/24 dev tap0",
		"addr add 10.99.0.1/24 dev lo", "addr add 10.98.0.1/24 dev wan0",
		"link add br-dhcp up type bridge", "addr add 192.168.4.1/24 dev br-dhcp valid_lft 3600 preferred_lft 3600",
		"addr add 203.0.113.77/24 dev lan0", "addr add 100.64.0.1/24 dev lan0", "addr add 10.97.0.1/32 dev lan0")
	// Not all kernels have these.
	for i, kind := range []string{"wireguard", "dummy", "vxlan id 1 dstport 4789"} {
		name := "kind" + kind[:2]
		if _, err := g.Output("ip", append([]string{"link", "add", name, "up", "type"}, strings.Fields(kind)...)...); err != nil {
			t.Logf("without %s: %v", kind, err)
			continue
		}
		ip(t, g, "addr add 10.10."+string(rune('0'+i))+".1/24 dev "+name)
	}
	got := readNetwork(t, g).Candidates(IPv4, nil, nil)
	want := []netip.Prefix{lab.InsideNet, netip.MustParsePrefix("192.168.1.0/24")}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := readNetwork(t, g).Candidates(IPv4, map[string]bool{"lan0": true}, nil); !slices.Equal(got, want[1:]) {
		t.Errorf("without lan0 got %v, want %v", got, want[1:])
	}
	// Without a default route wan0, with its private network, may be the uplink.
	ip(t, g, "route del default")
	ip(t, g, "-6 route del default")
	if got := readNetwork(t, g).Candidates(IPv4, nil, nil); len(got) > 0 {
		t.Errorf("without an outside link got %v", got)
	}
	if got := readNetwork(t, g).Candidates(IPv4, nil, []netip.Addr{want[0].Addr().Next()}); !slices.Equal(got, want[:1]) {
		t.Errorf("without an outside link, but a host that is inside, got %v, want %v", got, want[:1])
	}
	if got := readNetwork(t, g).Proposals(); !slices.Contains(got, want[0]) {
		t.Errorf("proposed without an outside link: %v", got)
	}
	if got := readNetwork(t, g, "ppp0").Candidates(IPv4, nil, nil); !slices.Equal(got, want) {
		t.Errorf("with an outside link that comes later got %v, want %v", got, want)
	}
}

// Fails when a network is missing that only its address or its route keeps from being a candidate, and when
// one is told that is enabled, or that leads outside.
func TestNetworksThatAreNoCandidatesAreTold(t *testing.T) {
	g := newGateway(t,
		"link add br-lan up type bridge", "addr add 100.80.0.1/24 dev br-lan", "addr add 169.254.7.1/16 dev br-lan", "addr add 203.0.113.77/32 dev br-lan",
		"link add docker0 up type bridge", "addr add 172.17.0.1/16 dev docker0", "addr add 100.81.0.1/24 dev docker0",
		"link add down0 type bridge", "addr add 100.82.0.1/24 dev down0",
		"route add 10.99.0.0/16 via 10.47.11.2", "route add 10.99.0.0/16 via 10.47.11.3 metric 7", "route add 10.95.1.77/32 via 10.47.11.2", "route add 10.98.0.0/16 via 10.47.11.2", "route add 10.97.0.0/16 via 10.47.11.2 table 7",
		"route add 192.0.2.0/24 via 10.47.11.2", "route add 10.96.0.0/16 via 198.51.100.254 dev wan0", "route add 10.47.11.77/32 dev lan0")
	got := readNetwork(t, g).LeftOut([]netip.Prefix{lab.InsideNet, netip.MustParsePrefix("10.98.0.0/15")})
	want := []string{"100.80.0.0/24 on br-lan, which is not private"}
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	got = readNetwork(t, g).LeftOut([]netip.Prefix{netip.MustParsePrefix("10.98.0.0/16"), netip.MustParsePrefix("100.80.0.0/24")})
	if want := []string{"10.99.0.0/16 on lan0, to which a route leads"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Fails when a prefix is left out that only inside hosts can have, and when one is a candidate
// that hosts outside may have.
func TestCandidatesOfIPv6(t *testing.T) {
	g := newGateway(t,
		"-6 addr add 2001:db8:77::1/56 dev lan0 nodad valid_lft 3600 preferred_lft 0", // rotated away
		"-6 addr add fd00:47::1/64 dev lan0 nodad", "-6 addr add 2001:db8:78::1/128 dev lan0 nodad",
		"link add br-ra up type bridge", "addr add 192.168.1.1/24 dev br-ra",
		"-6 addr add 2001:db8:5:6::1/64 dev br-ra nodad", "-6 route add default via fe80::1 dev br-ra metric 4096",
		"link add br-dhcp up type bridge", "addr add 192.168.4.1/24 dev br-dhcp valid_lft 3600 preferred_lft 3600",
		"-6 addr add fd00:48::1/64 dev br-dhcp nodad",
		// A relay of the provider's prefix.
		"-6 addr add 2001:db8:99::2/64 dev wan0 nodad", "-6 addr add 2001:db8:99::1/64 dev lan0 nodad")
	n := readNetwork(t, g)
	want := []netip.Prefix{lab.InsideNet6, netip.MustParsePrefix("2001:db8:77::/56"), netip.MustParsePrefix("fd00:47::/64")}
	slices.SortFunc(want, netip.Prefix.Compare)
	if got := n.Candidates(IPv6, nil, nil); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := n.Candidates(IPv6, map[string]bool{"lan0": true}, nil); len(got) > 0 {
		t.Errorf("without lan0 got %v", got)
	}
	if got := n.Candidates(IPv4, nil, nil); slices.ContainsFunc(got, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		t.Errorf("of IPv4: %v", got)
	}
}

func TestLinksThatLookLikeALAN(t *testing.T) {
	tests := []struct {
		name, kind string
		flags      uint32
		want       bool
	}{
		{"eth1", "", 0, true},
		{"wlan0", "", 0, true},
		{"lan1", "dsa", 0, true},
		{"br0", "bridge", 0, true},
		{"br-lan", "bridge", 0, true},
		{"br-0123456789ab", "bridge", 0, false},
		{"eth1.20", "vlan", 0, true},
		{"bond0", "bond", 0, true},
		{"docker_gwbridge", "bridge", 0, false},
		{"virbr0", "bridge", 0, false},
		{"cni0", "bridge", 0, false},
		{"podman1", "bridge", 0, false},
		{"lxcbr0", "bridge", 0, false},
		{"lxdbr0", "bridge", 0, false},
		{"vnet3", "tun", 0, false},
		{"office", "veth", 0, false},
		{"office", "wireguard", 0, false},
		{"office", "gretap", 0, false},
		{"office", "xfrm", 0, false},
		{"office", "dummy", 0, false},
		{"office", "some-new-kind", 0, false},
		{"ppp0", "", unix.IFF_POINTOPOINT | unix.IFF_NOARP, false},
		{"lo", "", unix.IFF_LOOPBACK, false},
	}
	for _, test := range tests {
		l := Link{Name: test.name, Kind: test.kind, Flags: test.flags}
		if got := l.lan(); got != test.want {
			t.Errorf("%s of kind %q: %v", test.name, test.kind, got)
		}
	}
}

func TestOwnNamespaceIsReadWithoutDescriptor(t *testing.T) {
	n, err := ReadNetwork(0, Sides{})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(n.Links, func(l Link) bool { return l.Name == "lo" && l.is(unix.IFF_LOOPBACK) }) {
		t.Errorf("no loopback among %v", n.Links)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(make([]byte, 32))
	f.Fuzz(func(_ *testing.T, b []byte) {
		var r reader
		for _, decode := range []func([]byte) error{r.link, r.addr, r.route, r.nexthop} {
			_ = decode(b)
		}
		r.resolve()
		r.Mark(Sides{})
		_, _ = r.Topology(), r.Candidates(bothFamilies, nil, nil)
		p := PortSet{map[cone.Endpoint]struct{}{}, map[cone.Key]struct{}{}}
		_ = p.add(b, func(uint32) bool { return true })
	})
}
