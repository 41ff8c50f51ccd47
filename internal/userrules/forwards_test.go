package userrules_test

import (
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// brief writes a Forward as "ports > addresses", with a ? if it is unknown.
func brief(f userrules.Forward) string {
	ports, addrs := []string{}, []string{}
	for _, p := range f.Ports {
		s := fmt.Sprint(p.First)
		if p.Last != p.First {
			s += fmt.Sprint("-", p.Last)
		}
		ports = append(ports, s)
	}
	for _, a := range f.Addrs {
		s := a.First.String()
		if a.Last != a.First {
			s += "-" + a.Last.String()
		}
		addrs = append(addrs, s)
	}
	s := strings.Join(ports, ",")
	if f.All {
		s += "all"
	}
	if f.Unknown {
		s += "?"
	}
	s += " > " + strings.Join(addrs, ",")
	return strings.NewReplacer(
		"0.0.0.0-255.255.255.255", "ip", "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "ip6",
	).Replace(strings.TrimSuffix(s, " > "))
}

// inPrerouting puts rules into the usual table of family ip.
func inPrerouting(rules string) string { return table("ip", rules) }

func table(family, rules string) string {
	return fmt.Sprintf(`table %s nat { %s
	}`, family, strings.Replace(rules, "@@", "chain prerouting { type nat hook prerouting priority dstnat; ", 1))
}

func TestForwardsAreFoundInRulesets(t *testing.T) {
	const chain, to = "@@ ", " dnat to 10.47.11.109; }"
	tests := []struct {
		name, nft string
		want      []string
	}{
		{"nothing", lab.NoRules, nil},
		{"no forward", lab.Masquerade + lab.DropPolicy, nil},
		{"one port", inPrerouting(chain + "udp dport 5060" + to), []string{"5060 > ip"}},
		{"with a new port", inPrerouting(chain + "udp dport 5060 dnat to 10.47.11.109:5070; }"), []string{"5060 > ip"}},
		{"redirect", inPrerouting(chain + "udp dport 53 redirect to :5353; }"), []string{"53 > ip"}},
		{"TCP", inPrerouting(chain + "tcp dport 5060" + to), nil},
		{"TCP, no port", inPrerouting(chain + "meta l4proto tcp" + to), nil},
		{"all but TCP", inPrerouting(chain + "meta l4proto != tcp" + to), []string{"all > ip"}},
		{"all but UDP", inPrerouting(chain + "meta l4proto != udp" + to), nil},
		{"ip protocol", inPrerouting(chain + "ip protocol udp" + to), []string{"all > ip"}},
		{"ip protocol icmp", inPrerouting(chain + "ip protocol icmp" + to), nil},
		{"DMZ", inPrerouting(chain + "dnat to 10.47.11.109; }"), []string{"all > ip"}},
		{"DMZ of one address", inPrerouting(chain + "ip daddr 198.51.100.1" + to), []string{"all > 198.51.100.1"}},
		{"range", inPrerouting(chain + "udp dport 10000-20000" + to), []string{"10000-20000 > ip"}},
		{"not a range", inPrerouting(chain + "udp dport != 1024-65535" + to), []string{"0-1023 > ip"}},
		{"at least", inPrerouting(chain + "udp dport >= 1024" + to), []string{"1024-65535 > ip"}},
		{"less", inPrerouting(chain + "udp dport < 1024" + to), []string{"0-1023 > ip"}},
		{"more", inPrerouting(chain + "udp dport > 1024" + to), []string{"1025-65535 > ip"}},
		{"not one", inPrerouting(chain + "udp dport != 53" + to), []string{"0-52,54-65535 > ip"}},
		{"both protocols", inPrerouting(chain + "meta l4proto { tcp, udp } th dport 5060" + to), []string{"5060 > ip"}},
		{"set", inPrerouting(chain + "udp dport { 53, 5060, 5061, 7000-7009, 7010-7019, 65000-65535 }" + to), []string{"53,5060-5061,7000-7019,65000-65535 > ip"}},
		{"not in set", inPrerouting(chain + "udp dport != { 0-5059, 5061-65535 }" + to), []string{"5060 > ip"}},
		{"named set", inPrerouting("set sip { type inet_service; flags interval; elements = { 5060-5080 }; }; " + chain + "udp dport @sip" + to), []string{"5060-5080 > ip"}},
		{"empty set", inPrerouting("set sip { type inet_service; }; " + chain + "udp dport @sip" + to), nil},
		{"map", inPrerouting(chain + "dnat to udp dport map { 5060 : 10.47.11.109, 6000-6010 : 10.47.11.110 }; }"), []string{"5060,6000-6010 > ip"}},
		{"map of endpoints", inPrerouting(chain + "dnat ip to udp dport map { 5060 : 10.47.11.109 . 5070 }; }"), []string{"5060 > ip"}},
		{
			"map with concatenated keys", inPrerouting(
				"map m { type ipv4_addr . inet_service : ipv4_addr . inet_service; elements = { 198.51.100.1 . 5060 : 10.47.11.109 . 5060, 198.51.100.2 . 6000 : 10.47.11.109 . 6000 }; }; " +
					chain + "meta l4proto udp dnat ip to ip daddr . udp dport map @m; }"),
			[]string{"5060 > 198.51.100.1", "6000 > 198.51.100.2"},
		},
		{"set of protocol and port", inPrerouting(chain + "meta l4proto . th dport { tcp . 80, udp . 5060, udp . 6000-6010 }" + to), []string{"5060 > ip", "6000-6010 > ip"}},
		{"set of source and port", inPrerouting(chain + "ip saddr . udp dport { 203.0.113.5 . 5060, 203.0.113.6 . 5061 }" + to), []string{"5060-5061 > ip"}},
		{"source port and port", inPrerouting(chain + "udp sport 7 udp dport 5060" + to), []string{"5060 > ip"}},
		{"source and destination", inPrerouting(chain + "ip saddr 203.0.113.5 ip daddr 198.51.100.1 udp dport 5060" + to), []string{"5060 > 198.51.100.1"}},
		{"prefix", inPrerouting(chain + "ip daddr 198.51.100.0/24 udp dport 5060" + to), []string{"5060 > 198.51.100.0-198.51.100.255"}},
		{"odd prefix", inPrerouting(chain + "ip daddr 198.51.100.0/30 udp dport 5060" + to), []string{"5060 > 198.51.100.0-198.51.100.3"}},
		{"set of addresses", inPrerouting(chain + "ip daddr { 198.51.100.1, 198.51.100.8/29 } udp dport 5060" + to), []string{"5060 > 198.51.100.1,198.51.100.8-198.51.100.15"}},
		{"not an address", inPrerouting(chain + "ip daddr != 198.51.100.1 udp dport 5060" + to), []string{"5060 > ip"}},
		{"outside link", inPrerouting(chain + `iifname "wan0" udp dport 5060` + to), []string{"5060 > ip"}},
		{"outside link by index", inPrerouting(chain + `iif "wan0" udp dport 5060` + to), []string{"5060 > ip"}},
		{"pattern of links", inPrerouting(chain + `iifname "wan*" udp dport 5060` + to), []string{"5060 > ip"}},
		{"other pattern of links", inPrerouting(chain + `iifname "la*" udp dport 5060` + to), nil},
		{"inside link", inPrerouting(chain + `iifname "lan0" udp dport 53 redirect to :53; }`), nil},
		{"inside link by index", inPrerouting(chain + `iif "lan0" udp dport 53 redirect to :53; }`), nil},
		{"all but the outside link", inPrerouting(chain + `iifname != "wan0" udp dport 53 redirect to :53; }`), nil},
		{"all but the inside link", inPrerouting(chain + `iifname != "lan0" udp dport 53 redirect to :53; }`), []string{"53 > ip"}},
		{"set of links", inPrerouting(chain + `iifname { "lan0", "guest0" } udp dport 53 redirect to :53; }`), nil},
		{"link and port", inPrerouting(chain + `iifname . udp dport { "wan0" . 5060, "lan0" . 53 } dnat to 10.47.11.109; }`), []string{"5060 > ip"}},
		{"fib", inPrerouting(chain + "fib daddr type local udp dport 5060" + to), []string{"5060 > ip"}},
		{"ct state", inPrerouting(chain + "ct state new udp dport 5060 counter" + to), []string{"5060 > ip"}},
		{"an expression that the library drops", inPrerouting(chain + "udp dport 5060 socket transparent 0" + to), []string{"5060 > ip"}},
		{"bits of a port", inPrerouting(chain + "udp dport & 0xff00 == 0x1300" + to), []string{"4864-5119 > ip"}},
		{"not bits of a port", inPrerouting(chain + "udp dport & 1 != 1" + to), []string{"all? > ip"}},
		{"jump with a condition", inPrerouting("chain sip { dnat to 10.47.11.109; }; " + chain + "udp dport 5060 jump sip; }"), []string{"5060 > ip"}},
		{"goto through two chains", inPrerouting("chain b { udp dport 5000-5070 dnat to 10.47.11.109; }; chain a { udp dport 5060-6000 goto b; }; " + chain + "ip daddr 198.51.100.1 jump a; }"), []string{"5060-5070 > 198.51.100.1"}},
		{"jump for TCP", inPrerouting("chain web { dnat to 10.47.11.109; }; " + chain + "tcp dport 80 jump web; }"), nil},
		{"chain that nobody jumps to", inPrerouting("chain sip { udp dport 5060 dnat to 10.47.11.109; }; " + chain + "}"), nil},
		{"map of verdicts", inPrerouting("chain a { dnat to 10.47.11.109; }; chain b { dnat to 10.47.11.110; }; " + chain + "udp dport vmap { 5060 : jump a, 6000-6005 : goto b, 7000 : accept }; }"), []string{"5060 > ip", "6000-6005 > ip"}},
		{"map of verdicts by link", inPrerouting("chain a { udp dport 53 redirect; }; chain b { udp dport 5060 dnat to 10.47.11.110; }; " + chain + "iifname vmap { lan0 : jump a, wan0 : jump b }; }"), []string{"5060 > ip"}},
		{"output", table("ip", "chain output { type nat hook output priority -100; udp dport 53 redirect to :5353; }"), nil},
		{"source NAT", inPrerouting("chain postrouting { type nat hook postrouting priority srcnat; udp dport 53 snat to 198.51.100.1; }"), nil},
		{"dormant", "table ip nat { flags dormant; chain p { type nat hook prerouting priority dstnat; udp dport 53 dnat to 10.47.11.109; }; }", nil},
		{"IPv6", table("ip6", chain+"udp dport 5060 dnat to 2001:db8:47::109; }"), []string{"5060 > ip6"}},
		{"IPv6 address", table("ip6", chain+"ip6 daddr 2001:db8:ffff::1 udp dport 5060 dnat to 2001:db8:47::109; }"), []string{"5060 > 2001:db8:ffff::1"}},
		{"IPv6 prefix", table("ip6", chain+"ip6 daddr 2001:db8:ffff::/64 udp dport 5060 dnat to 2001:db8:47::109; }"), []string{"5060 > 2001:db8:ffff::-2001:db8:ffff:0:ffff:ffff:ffff:ffff"}},
		{"inet, any", table("inet", chain+"udp dport 5060 redirect to :5070; }"), []string{"5060"}},
		{"inet, IPv4", table("inet", chain+"udp dport 5060 dnat ip to 10.47.11.109; }"), []string{"5060 > ip"}},
		{"inet, IPv4 address", table("inet", chain+"ip daddr 198.51.100.1 udp dport 5060 dnat ip to 10.47.11.109; }"), []string{"5060 > 198.51.100.1"}},
		{"inet, IPv6 address", table("inet", chain+"ip6 daddr 2001:db8:ffff::1 udp dport 5060 dnat ip6 to 2001:db8:47::109; }"), []string{"5060 > 2001:db8:ffff::1"}},
		{"inet, DMZ", table("inet", chain+"meta nfproto ipv4 dnat ip to 10.47.11.109; }"), []string{"all > ip"}},
		{"fw4", `table inet fw4 {
			chain dstnat { type nat hook prerouting priority dstnat; policy accept;
				iifname "wan0" jump dstnat_wan comment "!fw4: Handle wan IPv4/IPv6 dstnat traffic"
				iifname "lan0" jump dstnat_lan
			}
			chain dstnat_wan {
				meta nfproto ipv4 udp dport 5060 counter dnat ip to 10.47.11.109:5060 comment "!fw4: SIP"
				meta nfproto ipv4 tcp dport 443 counter dnat ip to 10.47.11.109:443
			}
			chain dstnat_lan { ip saddr 10.47.11.0/24 ip daddr 198.51.100.1 udp dport 6000 dnat ip to 10.47.11.109:5060; }
		}`, []string{"5060 > ip"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Guest: true, Rules: lab.NoRules})
			err := l.NFT(test.nft)
			if err != nil && strings.Contains(err.Error(), "Operation not supported") { // 7.3, ranges in concatenations
				t.Skipf("this kernel does not take these rules from this nft: %v", err)
			}
			check(t, err)
			var got []string
			for _, f := range forwards(t, l) {
				got = append(got, brief(f))
			}
			slices.Sort(got)
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("%s\n%s", diff, output(t, l, "nft", "-n", "--debug=netlink", "list", "ruleset"))
			}
		})
	}
}

func forwards(t *testing.T, l *lab.Lab) []userrules.Forward {
	t.Helper()
	var index int
	if _, err := fmt.Sscan(output(t, l, "cat", "/sys/class/net/lo/ifindex"), &index); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(output(t, l, "ip", "-oneline", "link")) {
		if strings.Contains(line, "wan0@") {
			if _, err := fmt.Sscan(line[:strings.Index(line, ":")], &index); err != nil {
				t.Fatal(err)
			}
		}
	}
	return ruleset(t, l).Forwards([]userrules.Link{{Index: index, Name: "wan0"}})
}

func TestForwardsAreFoundInRulesOfIPTables(t *testing.T) {
	tests := []struct {
		name, rule string
		want       []string
	}{
		{"one port", "-p udp --dport 5060 -j DNAT --to-destination 10.47.11.109:5070", []string{"5060 > ip"}},
		{"range", "-p udp --dport 10000:20000 -j DNAT --to-destination 10.47.11.109", []string{"10000-20000 > ip"}},
		{"not a port", "-p udp ! --dport 53 -j DNAT --to-destination 10.47.11.109", []string{"0-52,54-65535 > ip"}},
		{"link and address", "-i wan0 -d 198.51.100.1/32 -p udp -m udp --dport 5060 -j DNAT --to-destination 10.47.11.109", []string{"5060 > 198.51.100.1"}},
		{"prefix", "-d 198.51.100.0/25 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109", []string{"5060 > 198.51.100.0-198.51.100.127"}},
		{"inside link", "-i lan0 -p udp --dport 53 -j REDIRECT --to-ports 53", nil},
		{"not the outside link", "! -i wan0 -p udp --dport 53 -j REDIRECT --to-ports 53", nil},
		{"redirect", "-p udp --dport 53 -j REDIRECT --to-ports 5353", []string{"53 > ip"}},
		{"multiport", "-p udp -m multiport --dports 53,5060:5070,7000 -j DNAT --to-destination 10.47.11.109", []string{"53,5060-5070,7000 > ip"}},
		{"not multiport", "-p udp -m multiport ! --dports 1:65535 -j DNAT --to-destination 10.47.11.109", []string{"0 > ip"}},
		{"multiport of sources", "-p udp -m multiport --sports 53,54 -j DNAT --to-destination 10.47.11.109", []string{"all > ip"}},
		{"TCP", "-p tcp --dport 80 -j DNAT --to-destination 10.47.11.109", nil},
		{"DMZ", "-i wan0 -j DNAT --to-destination 10.47.11.109", []string{"all > ip"}},
		{"netmap", "-d 198.51.100.0/24 -j NETMAP --to 10.47.11.0/24", []string{"all > 198.51.100.0-198.51.100.255"}},
		{"local", "-m addrtype --dst-type LOCAL -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109", []string{"5060 > ip"}},
		{"conntrack", "-p udp -m conntrack --ctstate NEW -m udp --dport 5060 -j DNAT --to-destination 10.47.11.109", []string{"5060 > ip"}},
		{"source", "-s 203.0.113.5/32 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109", []string{"5060 > ip"}},
		{"not an address", "! -d 198.51.100.0/25 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109", []string{"5060 > ip"}},
		{"pattern of links", "-i wan+ -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109", []string{"5060 > ip"}},
		{"other pattern of links", "-i la+ -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109", nil},
		{"longer name of a link", "-i wan01 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109", nil},
		{"not UDP", "! -p udp -j DNAT --to-destination 10.47.11.109", nil},
		{"range to a range", "-p udp --dport 7000:7009 -j DNAT --to-destination 10.47.11.109:8000-8009/7000", []string{"7000-7009 > ip"}},
		{"user chain", "-p udp -j fw\n-A fw -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109", []string{"5060 > ip"}},
		{"goto", "-p udp -g fw\n-A fw -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109", []string{"5060 > ip"}},
		{"no target", "-p udp --dport 5060", nil},
		{"not NAT", "-p udp --dport 5060 -j LOG", nil},
	}
	for _, variant := range []string{lab.IPTablesNFT, lab.IPTablesLegacy} {
		for _, test := range tests {
			t.Run(variant+"/"+test.name, func(t *testing.T) {
				t.Parallel()
				l := lab.ForTest(t, lab.Options{Guest: true, Rules: lab.NoRules})
				if err := l.IPTables(variant, "*nat\n:fw - [0:0]\n-A PREROUTING "+test.rule+"\nCOMMIT\n"); err != nil {
					t.Fatal(err)
				}
				var got []string
				for _, f := range forwards(t, l) {
					got = append(got, brief(f))
				}
				if diff := cmp.Diff(test.want, got); diff != "" {
					t.Errorf("%s\n%s", diff, output(t, l, variant+"-save"))
				}
			})
		}
	}
}

func TestForwardsSayWhichRuleItIs(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	check(t, l.NFT(`table ip user { chain prerouting { type nat hook prerouting priority dstnat
		udp dport 5060 dnat to 10.47.11.109 comment "phone of Ann"
	}; }`))
	check(t, l.IPTables(lab.IPTablesNFT, `*nat
:DOCKER - [0:0]
:MINIUPNPD - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -i wan0 -j MINIUPNPD
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p udp -m udp --dport 3478 -j DNAT --to-destination 172.17.0.2:3478
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2:80
-A MINIUPNPD -p udp -m udp --dport 9999 -m comment --comment "game of Bob" -j DNAT --to-destination 10.47.11.110:9999
COMMIT
`))
	check(t, l.IPTables(lab.IPTablesLegacy, `*nat
:fw - [0:0]
-A PREROUTING -j fw
-A fw -p tcp --dport 80 -j DNAT --to-destination 10.47.11.109
-A fw -p udp --dport 7777 -m comment --comment "camera" -j DNAT --to-destination 10.47.11.109
COMMIT
`))
	var got []string
	for _, f := range forwards(t, l) {
		got = append(got, brief(f)+" | "+handle.ReplaceAllString(f.Text, "#"))
	}
	slices.Sort(got)
	want := []string{
		"3478 > ip | ip nat DOCKER #",
		"5060 > ip | ip user prerouting # (phone of Ann)",
		"7777 > ip | iptables-legacy nat fw rule 2 (camera)",
		"9999 > ip | ip nat MINIUPNPD # (game of Bob)",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

var handle = regexp.MustCompile(`handle \d+`)

func TestManyJumpsEndSometime(t *testing.T) {
	if os.Getenv("CONENATD_GUEST") != "" {
		t.Skip("nft takes minutes to load these rules into an emulated kernel, which has no part in what is tested")
	}
	var b strings.Builder
	b.WriteString("chain c9 { udp dport 5060 dnat to 10.47.11.109; }\n")
	for i := 8; i >= 0; i-- {
		fmt.Fprintf(&b, "chain c%d { %s }\n", i, strings.Repeat(fmt.Sprintf("jump c%d; ", i+1), 8))
	}
	l := lab.ForTest(t, lab.Options{Rules: inPrerouting(b.String() + "@@ jump c0; }")})
	var got []string
	for _, f := range forwards(t, l) {
		got = append(got, brief(f))
	}
	if diff := cmp.Diff([]string{"5060 > ip", "all? > ip"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestOurOwnTableForwardsNothing(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	check(t, l.NFT(`table ip conenat {
		chain made_by_conenatd { }
		chain permissions { type nat hook prerouting priority -95; udp dport 5060 dnat to 10.47.11.109; }
	}`))
	if got := forwards(t, l); got != nil {
		t.Error(got)
	}
}

func TestForwardCovers(t *testing.T) {
	addr := netip.MustParseAddr
	here := cone.AddrRanges{{First: addr("198.51.100.0"), Last: addr("198.51.100.7")}}
	ports := cone.PortRanges{{First: 53, Last: 53}, {First: 5060, Last: 5070}}
	tests := []struct {
		f    userrules.Forward
		ext  string
		want bool
	}{
		{userrules.Forward{}, "198.51.100.1:0", false},
		{userrules.Forward{All: true}, "198.51.100.1:5060", true},
		{userrules.Forward{All: true}, "[2001:db8::1]:5060", true},
		{userrules.Forward{All: true, Addrs: here}, "198.51.100.7:1", true},
		{userrules.Forward{All: true, Addrs: here}, "198.51.100.8:1", false},
		{userrules.Forward{All: true, Addrs: here}, "[2001:db8::1]:1", false},
		{userrules.Forward{Ports: ports}, "198.51.100.1:53", true},
		{userrules.Forward{Ports: ports}, "198.51.100.1:5059", false},
		{userrules.Forward{Ports: ports}, "198.51.100.1:5060", true},
		{userrules.Forward{Ports: ports}, "198.51.100.1:5070", true},
		{userrules.Forward{Ports: ports}, "198.51.100.1:5071", false},
		{userrules.Forward{Ports: ports, Addrs: here}, "198.51.100.9:5060", false},
	}
	for _, test := range tests {
		if got := test.f.Covers(cone.EndpointFrom(netip.MustParseAddrPort(test.ext))); got != test.want {
			t.Errorf("%+v covers %s: %v", test.f, test.ext, got)
		}
	}
}
