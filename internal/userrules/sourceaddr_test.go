package userrules_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Fails when addresses that depend on the host, or on the destination, count as the same for
// all.
func TestOutsideAddrs(t *testing.T) {
	for rules, want := range map[string]string{
		"masquerade":           "false [] []",
		"snat to 198.51.100.8": "false [] []",
		"oifname \"wan1\" snat to 198.51.100.9; masquerade":                  "false [] []",
		"ip saddr 192.168.7.0/24 snat to 198.51.100.9; masquerade":           "false [] []",
		"meta l4proto tcp snat to 198.51.100.9; masquerade":                  "false [] []",
		"masquerade; snat to 198.51.100.9":                                   "false [] []",
		"udp sport 3074 snat to 198.51.100.1; masquerade":                    "false [] []",
		"snat to 198.51.100.8-198.51.100.9":                                  "true [] []",
		"ip saddr 10.47.11.9 snat to 198.51.100.9; masquerade":               "true [] []",
		"iifname \"lan0\" snat to 198.51.100.9; masquerade":                  "true [] []",
		"snat to ip saddr map { 10.47.11.9 : 198.51.100.9 }":                 "true [] []",
		"ip saddr 10.47.11.0/25 masquerade":                                  "true [] []",
		"udp dport 53 masquerade; masquerade":                                "false [] []",
		"udp dport 53 snat to 198.51.100.9; masquerade":                      "true [] [ip nat post handle N]",
		"meta mark 7 snat to 198.51.100.9; masquerade":                       "true [] [ip nat post handle N]",
		"ip daddr @far snat to 198.51.100.9; masquerade":                     "true [] [ip nat post handle N]",
		"ip daddr 203.0.113.0/24 masquerade; masquerade":                     "false [] []",
		"ip daddr 203.0.113.0/24 snat to 198.51.100.9; masquerade":           "false [203.0.113.0/24] []",
		"ip daddr { 203.0.113.4, 203.0.113.8/31 } accept; masquerade":        "false [203.0.113.4/32 203.0.113.8/31] []",
		"ip daddr 203.0.113.0/24 return; masquerade":                         "false [203.0.113.0/24] []",
		"ip daddr != 203.0.113.0/24 masquerade":                              "false [203.0.113.0/24] []",
		"ip saddr 192.168.7.0/24 ip daddr 203.0.113.0/24 accept; masquerade": "false [] []",
		"oifname \"wan1\" ip daddr 203.0.113.0/24 accept; masquerade":        "false [] []",
		"jump some; masquerade":                                              "false [] []", // it only returns
	} {
		t.Run(rules, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			check(t, l.NFT(`table ip nat {
				set far { type ipv4_addr; elements = { 203.0.113.9 }; }
				chain some { ip daddr 203.0.113.0/24 return; }
				chain post { type nat hook postrouting priority srcnat; `+rules+`; }
			}`))
			rs := ruleset(t, l)
			o := userrules.OutsideAddrsOf(rs.SourceNAT(), rs.Untranslated(), "wan0", netip.MustParseAddr("198.51.100.1"), []netip.Prefix{lab.InsideNet})
			if got := handle.ReplaceAllString(fmt.Sprint(o.Differ, o.Elsewhere, o.ByOther), "handle N"); got != want {
				t.Errorf("%s, want %s", got, want)
			}
		})
	}
}

// For each set of rules: which of the addresses .1, the link's own, .8 and .9 may 10.47.11.9 get?
func TestMayGiveAddr(t *testing.T) {
	t.Parallel()
	for rules, want := range map[string]string{
		"masquerade":              "[1]",
		"snat to 198.51.100.9":    "[9]",
		"snat to 198.51.100.8/31": "[8 9]",
		"ip saddr 10.47.11.9 snat to 198.51.100.9; masquerade":                                   "[9]",
		"oifname \"wan0\" ip saddr 10.47.11.9 snat to 198.51.100.9; masquerade":                  "[9]",
		"ip saddr 10.47.11.8 snat to 198.51.100.9; masquerade":                                   "[1]",
		"ip saddr 10.47.11.8 masquerade":                                                         "[]",
		"udp dport 53 snat to 198.51.100.9; masquerade":                                          "[1 9]",
		"meta mark 7 snat to 198.51.100.9; masquerade":                                           "[1 9]",
		"ip daddr 203.0.113.0/24 snat to 198.51.100.9; masquerade":                               "[1 9]",
		"snat to ip saddr map { 10.47.11.9 : 198.51.100.9 }":                                     "[9]",
		"snat to ip saddr map { 10.47.11.8 : 198.51.100.9 }; masquerade":                         "[1]",
		"meta mark set ip saddr map { 10.47.11.0/24 : 1 } snat to 198.51.100.9":                  "[9]",
		"ct mark set ip saddr map { 10.47.11.9 : 1 } meta l4proto udp snat to 198.51.100.9:1-99": "[9]",
		"snat to ip saddr map @hosts":                                                            "[8 9]",
		"snat to ip saddr map @hosts_of_the_time":                                                "[1 8 9]",
		"snat to ip saddr map { 10.47.11.0/24 : 198.51.100.8-198.51.100.11 }":                    "[8 9]",
		"meta l4proto udp snat to ip saddr map { 10.47.11.9 : 198.51.100.9 . 5060 }":             "[9]",
		"snat ip prefix to ip saddr map { 10.47.11.8/31 : 198.51.100.8/31 }":                     "[8 9]",
		"snat to numgen inc mod 2 map { 0 : 198.51.100.8, 1 : 198.51.100.9 }":                    "[8 9]",
		"oifname \"wan1\" snat to 198.51.100.9":                                                  "[1 8 9]", // wan0 may have that name there
		"oifname \"wan1\" snat to 198.51.100.9; masquerade":                                      "[1]",
		"meta l4proto tcp snat to 198.51.100.9; masquerade":                                      "[1]",
	} {
		t.Run(rules, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			check(t, l.NFT(`table ip nat {
				map hosts { type ipv4_addr : ipv4_addr; elements = { 10.47.11.8 : 198.51.100.8, 10.47.11.9 : 198.51.100.9 }; }
				map hosts_of_the_time { type ipv4_addr : ipv4_addr; flags timeout; elements = { 10.47.11.9 : 198.51.100.9 }; }
				chain post { type nat hook postrouting priority srcnat; `+rules+`; }
			}`))
			all := ruleset(t, l).SourceNAT()
			var got []byte
			for _, last := range []byte{1, 8, 9} {
				addr := netip.AddrFrom4([4]byte{198, 51, 100, last})
				if userrules.MayGiveAddr(all, "wan0", []netip.Prefix{netip.MustParsePrefix("10.47.11.9/32")}, addr, netip.MustParseAddr("198.51.100.1")) {
					got = append(got, last)
				}
			}
			if text := fmt.Sprint(got); text != want {
				t.Errorf("%s, want %s", text, want)
			}
		})
	}
}
