package userrules_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Fails when a rule for one uplink is not seen, or when a rule for a LAN, a tunnel or all
// links is taken for one.
func TestUplinksAreTheLinksThatRulesTranslateBy(t *testing.T) {
	prefix := netip.MustParsePrefix
	lans := []userrules.LAN{
		{Link: userrules.Link{Index: 11, Name: "lan0"}, Networks: []netip.Prefix{prefix("10.47.11.0/24")}},
		{Link: userrules.Link{Index: 12, Name: "lan1"}, Networks: []netip.Prefix{prefix("10.47.12.0/24")}},
		{Link: userrules.Link{Index: 13, Name: "wan2"}, Networks: []netip.Prefix{prefix("192.168.0.0/24")}},
		{Link: userrules.Link{Index: 14, Name: "wan3"}},
	}
	in := func(rules string) string {
		return "table ip nat { chain post { type nat hook postrouting priority srcnat; " + rules + "; }; }\n"
	}
	for _, test := range []struct{ name, rules, want string }{
		{"no rules", "", ""},
		{"by name", in(`oifname "wan2" masquerade`), "wan2"},
		{"by a set of names", in(`oifname { "wan0", "wan2", "wan3" } masquerade`), "wan2 wan3"},
		{"by a pattern", in(`oifname "wan*" snat to 198.51.100.1`), "wan2 wan3"},
		{"by its not being the LAN", in(`oifname != { "lan0", "lan1" } masquerade`), "wan2 wan3"},
		{"for a LAN", in(`ip saddr 10.47.11.0/24 oifname "wan2" masquerade`), "wan2"},
		{"for destinations that are not inside", in(`ip daddr != 10.0.0.0/8 oifname "wan2" masquerade`), "wan2"},
		{"for some destinations", in(`ip daddr 192.168.0.1 oifname "wan2" masquerade`), ""},
		{"in by a LAN", in(`iifname "lan0" oifname "wan2" masquerade`), "wan2"},
		{"with a mark", in(`meta mark 1 oifname "wan2" masquerade`), "wan2"},
		{"for UDP", in(`meta l4proto { tcp, udp } oifname "wan2" masquerade to :1024-65535`), "wan2"},
		{"for TCP alone", in(`meta l4proto tcp oifname "wan2" masquerade to :1024-65535`), ""},
		{"not at last", in(`oifname "wan2" accept; oifname "wan*" masquerade`), "wan3"},
		{"in another chain", "table inet fw4 { chain wan { masquerade; }; chain post { type nat hook postrouting priority srcnat; oifname \"wan2\" jump wan; }; }", "wan2"},
		{"by a map", "table ip nat { chain wan { masquerade; }; chain post { type nat hook postrouting priority srcnat; oifname vmap { \"wan2\" : jump wan, \"lan0\" : accept }; }; }", "wan2"},
		{"of two chains", in(`oifname "lan0" accept`) + "table ip later { chain post { type nat hook postrouting priority 200; oifname \"wan2\" masquerade; }; }", "wan2"},
		{"another one of all links", in(`oifname "wan2" masquerade; ip saddr 172.17.0.0/16 oifname != "docker0" masquerade`), "wan2"},

		{"all links", in("masquerade"), ""},
		{"sources of two LANs, by all links", in("ip saddr 10.47.0.0/16 masquerade"), ""},
		{"another uplink", in(`oifname "wan0" masquerade`), ""},
		{"hairpin", in(`oifname "wan0" masquerade; ip saddr 10.47.11.0/24 oifname "lan0" masquerade; iifname "lan1" oifname "lan1" masquerade`), ""},
		{"hairpin for one host", in(`ip daddr 10.47.11.109 oifname "lan0" masquerade`), ""},
		{"a tunnel's hosts", in(`ip saddr 10.8.0.0/24 oifname "lan0" masquerade`), ""},
		{"to the gateway", "table ip nat { chain pre { type nat hook prerouting priority dstnat; iifname \"wan2\" udp dport 9 dnat to 10.47.11.109; }; }", ""},
		{"IPv6", "table ip6 nat { chain post { type nat hook postrouting priority srcnat; oifname \"wan2\" masquerade; }; }", ""},
		{"ours", "table ip conenat { chain made_by_conenatd { }; chain post { type nat hook postrouting priority srcnat; oifname \"wan2\" masquerade; }; }", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			check(t, l.NFT(test.rules))
			got, err := ruleset(t, l).Uplinks(lans)
			if err != nil || strings.Join(got, " ") != test.want {
				t.Errorf("%q, %v, want %q", got, err, test.want)
			}
		})
	}
	// A rule that distinguishes the LAN from all other links names no uplink.
	for rule, want := range map[string][]string{
		`ip saddr 10.47.11.0/24 masquerade`:                               nil,
		`oifname != "lan0" masquerade`:                                    nil,
		`ip saddr 10.47.11.0/24 ip daddr != 10.47.11.0/24 masquerade`:     nil,
		`oifname "wan3" masquerade`:                                       {"wan3"},
		`oifname "wan3" masquerade; ip saddr 10.8.0.0/24 masquerade`:      {"wan3"},
		`oifname != { "lan0", "wan3" } ip saddr 10.47.11.0/24 masquerade`: nil,
	} {
		t.Run("named by "+rule, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: in(rule)})
			got, err := ruleset(t, l).NamedUplinks([]userrules.LAN{lans[0], {Link: lans[3].Link}})
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%q, %v, want %q", got, err, want)
			}
		})
	}
	t.Run("a LAN beside links without addresses", func(t *testing.T) {
		l := lab.ForTest(t, lab.Options{Rules: in(`oifname "wan3" masquerade; ip saddr 10.8.0.0/24 oifname "lan0" masquerade`)})
		got, err := ruleset(t, l).Uplinks([]userrules.LAN{lans[0], lans[3]})
		if want := []string{"wan3"}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	})
}

// The same rules give the same answer with either iptables.
//
// Fails when a condition of iptables is not followed: a pattern of links, an inverted one,
// a chain, or a match of something other than links.
func TestUplinksOfIPTables(t *testing.T) {
	prefix := netip.MustParsePrefix
	lan := userrules.LAN{Link: userrules.Link{Index: 11, Name: "lan0"}, Networks: []netip.Prefix{prefix("10.47.11.0/24")}}
	lans := []userrules.LAN{
		lan, {Link: userrules.Link{Index: 13, Name: "wan2"}, Networks: []netip.Prefix{prefix("192.168.0.0/24")}}, {Link: userrules.Link{Index: 14, Name: "wan3"}},
	}
	for _, test := range []struct{ rules, want, named string }{
		{"-A POSTROUTING -o wan2 -j MASQUERADE", "wan2", "wan2"},
		{"-A POSTROUTING -o wan+ -j SNAT --to-source 198.51.100.1", "wan2 wan3", "wan2 wan3"},
		{"-A POSTROUTING -s 10.47.11.0/24 -o wan2 -j MASQUERADE", "wan2", "wan2"},
		{"-A POSTROUTING -o wan2 -p udp -j MASQUERADE --to-ports 1024-65535", "wan2", "wan2"},
		{"-A POSTROUTING -o wan2 -m policy --dir out --pol none -j MASQUERADE", "wan2", "wan2"},
		{"-A POSTROUTING -o wan2 -m mark --mark 1 -j MASQUERADE", "wan2", "wan2"},
		{"-A POSTROUTING ! -d 10.0.0.0/8 -o wan2 -m comment --comment uplink -j MASQUERADE", "wan2", "wan2"},
		{":zone_wan - [0:0]\n-A POSTROUTING -o wan2 -j zone_wan\n-A zone_wan -j MASQUERADE", "wan2", "wan2"},
		{"-A POSTROUTING -o wan2 -j ACCEPT\n-A POSTROUTING -o wan+ -j MASQUERADE", "wan3", "wan3"},
		{"-A POSTROUTING -o wan3 -j MASQUERADE\n-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", "wan3", "wan3"},
		{"-A POSTROUTING ! -o lan0 -j MASQUERADE", "wan2 wan3", ""},
		{"-A POSTROUTING -s 10.47.11.0/24 ! -d 10.47.11.0/24 -j MASQUERADE", "wan2 wan3", ""},
		{"-A POSTROUTING -j MASQUERADE", "", ""},
		{"-A POSTROUTING -o wan2 -d 192.168.0.1 -j MASQUERADE", "", ""},
		{"-A POSTROUTING -o wan2 -p tcp -j MASQUERADE", "", ""},
		{"-A PREROUTING -i wan2 -p udp --dport 9 -j DNAT --to-destination 10.47.11.109", "", ""},
	} {
		withIPTables(t, test.rules, "*nat\n"+test.rules+"\nCOMMIT\n", func(t *testing.T, l *lab.Lab) {
			rs := ruleset(t, l)
			all, err := rs.Uplinks(lans)
			check(t, err)
			named, err := rs.NamedUplinks(lans)
			check(t, err)
			if strings.Join(all, " ") != test.want || strings.Join(named, " ") != test.named {
				t.Errorf("%q, named %q, want %q and %q", all, named, test.want, test.named)
			}
		})
	}
}
