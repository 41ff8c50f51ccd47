package userrules_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Rules take what inside hosts send to ports of peers, by translation or for a conntrack helper,
// in any chain of the prerouting hook. Port forwards, and rules of which that is not sure, are
// left out.
//
// Fails when a kind of rule is not followed, and when a port forward counts.
func TestDiversions(t *testing.T) {
	sides := userrules.Sides{
		Inside: []userrules.Link{{Index: 2, Name: "lan0"}}, Outside: []userrules.Link{{Index: 3, Name: "wan0"}},
		Subnets: []netip.Prefix{lab.InsideNet},
	}
	const (
		nat    = "table ip nat { chain pre { type nat hook prerouting priority dstnat; %s; }; }\n"
		helper = "table inet h { ct helper s { type \"sip\" protocol udp; }; chain pre { type filter hook prerouting priority %s; %s; }; }\n"
	)
	for name, tc := range map[string]struct {
		nft, iptables, variant string
		want                   string // ports and peers
	}{
		"redirect":                             {nft: fmt.Sprintf(nat, `iifname "lan0" udp dport 5060 redirect to :5099`), want: "[] [0.0.0.0/0] [{5060 5060}]"},
		"redirect of IPv6":                     {nft: "table ip6 nat { chain pre { type nat hook prerouting priority dstnat; iifname \"lan0\" udp dport 53 redirect; }; }\n", want: "[] [::/0] [{53 53}]"},
		"redirect of some peers":               {nft: fmt.Sprintf(nat, `iifname "lan0" ip daddr 203.0.113.0/24 udp dport { 53, 5060-5062 } dnat to 10.47.11.1`), want: "[] [203.0.113.0/24] [{53 53} {5060 5062}]"},
		"redirect of some hosts":               {nft: fmt.Sprintf(nat, `ip saddr 10.47.11.0/24 iifname != "wan0" udp dport 53 redirect`), want: "[10.47.11.0/24] [0.0.0.0/0] [{53 53}]"},
		"redirect of a subnet, whichever link": {nft: fmt.Sprintf(nat, `ip saddr 10.47.11.0/24 udp dport 5060 dnat to 10.47.12.1`), want: "[10.47.11.0/24] [0.0.0.0/0] [{5060 5060}]"},
		"redirect, whichever link":             {nft: fmt.Sprintf(nat, `udp dport 5060 redirect`), want: "[] [0.0.0.0/0] [{5060 5060}]"},
		"redirect of new flows":                {nft: fmt.Sprintf(nat, `iifname "lan0" ct state new udp dport 5060 redirect`), want: "[] [0.0.0.0/0] [{5060 5060}]"},
		"redirect of other flows":              {nft: fmt.Sprintf(nat, `iifname "lan0" ct state established,related udp dport 5060 redirect`)},
		"redirect of flows by a map":           {nft: "table ip nat { chain new { udp dport 5060 redirect; }; chain pre { type nat hook prerouting priority dstnat; ct state vmap { established : accept, new : jump new }; }; }\n", want: "[] [0.0.0.0/0] [{5060 5060}]"},
		"a forward for both sides":             {nft: fmt.Sprintf(nat, `udp dport 5060 dnat to 10.47.11.5`)},
		"a forward from outside":               {nft: fmt.Sprintf(nat, `iifname "wan0" udp dport 5060 dnat to 10.47.11.5`)},
		"to the gateway itself":                {nft: fmt.Sprintf(nat, `iifname "lan0" fib daddr type local udp dport 5060 dnat to 10.47.11.5`)},
		"all ports":                            {nft: fmt.Sprintf(nat, `iifname "lan0" ip protocol udp redirect to :5099`)},
		"TCP":                                  {nft: fmt.Sprintf(nat, `iifname "lan0" tcp dport 5060 redirect to :5099`)},
		"helper":                               {nft: fmt.Sprintf(helper, "filter", `iifname "lan0" udp dport 5060 ct helper set "s"`), want: "[] [] [{5060 5060}]"},
		"helper, whichever link":               {nft: fmt.Sprintf(helper, "-150", `udp dport 5060 ct helper set "s"`), want: "[] [] [{5060 5060}]"},
		"helper from outside":                  {nft: fmt.Sprintf(helper, "-150", `iifname "wan0" udp dport 5060 ct helper set "s"`)},
		"helper by a map":                      {nft: "table inet h { ct helper s { type \"sip\" protocol udp; }; ct helper t { type \"tftp\" protocol udp; }; chain pre { type filter hook prerouting priority filter; ct state new ct helper set udp dport map { 69 : \"t\", 5060 : \"s\" }; }; }\n", want: "[] [] [{69 69} {5060 5060}]"},
		"a counter by a map":                   {nft: "table inet h { counter c { }; chain pre { type filter hook prerouting priority filter; counter name udp dport map { 5060 : \"c\" }; }; }\n"},
		"helper in the forward hook":           {nft: "table inet h { ct helper s { type \"sip\" protocol udp; }; chain f { type filter hook forward priority filter; ct state established accept; iifname \"lan0\" oifname \"wan0\" udp dport 5060 ct helper set \"s\"; }; }\n", want: "[] [] [{5060 5060}]"},
		"helper in the postrouting hook":       {nft: "table inet h { ct helper s { type \"sip\" protocol udp; }; chain f { type filter hook postrouting priority filter; ip saddr 10.47.11.109 udp dport 5060 ct helper set \"s\"; }; }\n", want: "[10.47.11.109/32] [0.0.0.0/0] [{5060 5060}]"},
		"helper behind a jump":                 {nft: "table inet h { ct helper s { type \"sip\" protocol udp; }; chain zone { udp dport { 5060, 5070 } ct helper set \"s\"; }; chain pre { type filter hook prerouting priority filter; iifname vmap { \"lan0\" : jump zone }; }; }\n", want: "[] [] [{5060 5060} {5070 5070}]"},
		"iptables-nft, helper":                 {iptables: "*raw\n-A PREROUTING -i lan0 -p udp -m udp --dport 5060 -j CT --helper sip\nCOMMIT\n", variant: lab.IPTablesNFT, want: "[] [0.0.0.0/0] [{5060 5060}]"},
		"iptables-nft, helper of new flows":    {iptables: "*raw\nCOMMIT\n*mangle\n-A PREROUTING -i lan0 -p udp -m conntrack --ctstate NEW -m udp --dport 5060 -j MARK --set-mark 1\nCOMMIT\n*nat\n-A PREROUTING -i lan0 -p udp -m conntrack --ctstate NEW -m udp --dport 5060 -j REDIRECT\nCOMMIT\n", variant: lab.IPTablesNFT, want: "[] [0.0.0.0/0] [{5060 5060}]"},
		"iptables-nft, no helper":              {iptables: "*raw\n-A PREROUTING -i lan0 -p udp -m udp --dport 5060 -j CT --notrack\nCOMMIT\n", variant: lab.IPTablesNFT},
		"iptables-nft, redirect":               {iptables: "*nat\n-A PREROUTING -i lan0 -p udp -m multiport --dports 53,853 -j REDIRECT\nCOMMIT\n", variant: lab.IPTablesNFT, want: "[] [0.0.0.0/0] [{53 53} {853 853}]"},
		"iptables-legacy, helper":              {iptables: "*raw\n-A PREROUTING -i lan0 -p udp -m udp --dport 5060 -j CT --helper sip\nCOMMIT\n", variant: lab.IPTablesLegacy, want: "[] [0.0.0.0/0] [{5060 5060}]"},
		"iptables-legacy, redirect":            {iptables: "*nat\n-A PREROUTING -i lan0 -d 203.0.113.5 -p udp -m udp --dport 53 -j REDIRECT --to-ports 5353\nCOMMIT\n", variant: lab.IPTablesLegacy, want: "[] [203.0.113.5/32] [{53 53}]"},
		"iptables-legacy, published ports":     {iptables: "*nat\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n-A DOCKER ! -i docker0 -p udp -m udp --dport 5060 -j DNAT --to-destination 172.17.0.2:5060\nCOMMIT\n", variant: lab.IPTablesLegacy},
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			if tc.nft != "" {
				check(t, l.NFT(tc.nft))
			}
			if tc.iptables != "" {
				check(t, l.IPTables(tc.variant, tc.iptables))
			}
			var d userrules.Diverter
			got := ""
			rs := ruleset(t, l)
			all, same := d.Diversions(rs, sides)
			if same {
				t.Error("the first answer is the same as an earlier one")
			}
			if again, same := d.Diversions(rs, sides); !same || len(again) != len(all) {
				t.Errorf("the second answer has %d, and same is %v", len(again), same)
			}
			for _, x := range all {
				got += fmt.Sprint(x.Hosts, " ", x.Peers, " ", x.Ports)
				t.Log(x.Text)
			}
			if got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
}
