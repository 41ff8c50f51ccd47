package userrules_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

var sides = userrules.Sides{
	Inside: []userrules.Link{{Index: 2, Name: "lan0"}}, Outside: []userrules.Link{{Index: 3, Name: "wan0"}},
	Subnets: []netip.Prefix{lab.InsideNet},
}

// Rules take what inside hosts send to ports of peers, by translation or for a conntrack helper,
// in any chain of the prerouting hook. Port forwards, and rules of which that is not sure, are
// left out.
//
// Fails when a kind of rule is not followed, and when a port forward counts.
func TestDiversions(t *testing.T) {
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
		"all ports":                            {nft: fmt.Sprintf(nat, `iifname "lan0" ip protocol udp redirect to :5099`), want: "[] [0.0.0.0/0] [{0 65535}]"},
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
		"iptables-legacy, after some ports":    {iptables: "*nat\n-A PREROUTING -i lan0 -p udp -m udp --sport 5060 --dport 53 -j ACCEPT\n-A PREROUTING -i lan0 -p udp -m udp --dport 53 -j REDIRECT\nCOMMIT\n", variant: lab.IPTablesLegacy, want: "[] [0.0.0.0/0] [{53 53}]"},
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
			diverts(t, ruleset(t, l), tc.want)
		})
	}
}

// Conditions that may hold for all packets of hosts to peers do not hide a rule. Those that say
// that it is for other packets do, as do those of a rule for most of the ports, and so do rules
// before it that let packets pass.
//
// Fails when a rule with such a condition is missed, and when a rule for other packets counts.
func TestDiversionsWithOtherConditions(t *testing.T) {
	t.Parallel()
	const (
		nat    = "table ip nat { %s; chain pre { type nat hook prerouting priority dstnat; %s; }; }\n"
		filter = "table inet h { %s; chain pre { type filter hook prerouting priority mangle; %s; }; }\n"
		takes  = ` udp dport 5060 redirect`
		all    = "[] [0.0.0.0/0] [{5060 5060}]"
	)
	manyPeers, eachPeer := "11.0.0.0/25", "ip daddr 11.0.0.0/25 return; "
	for i := range 1022 { // as in lists of the prefixes of a country; they do not touch
		prefix := fmt.Sprintf("11.%d.%d.0/24", (i+1)>>8, (i+1)&0xff)
		manyPeers += ", " + prefix
		if eachPeer += "ip daddr " + prefix + " return; "; i == 0 {
			manyPeers += ", 203.0.113.5"
		}
	}
	lan := func(conditions string) string { return fmt.Sprintf(nat, "", `iifname "lan0" `+conditions) }
	with := func(set, rule string) string {
		return fmt.Sprintf(nat, "set hosts { type ipv4_addr; "+set+"; }", `iifname "lan0" `+rule)
	}
	ipt := func(table, rule string) string {
		return "*" + table + "\n:other - [0:0]\n-A PREROUTING " + rule + "\nCOMMIT\n"
	}
	for name, tc := range map[string]struct {
		nft, iptables string // iptables by both programs
		want          string // hosts, peers and ports
	}{
		"not to the gateway":            {nft: lan(`fib daddr type != local` + takes), want: all},
		"to unicast":                    {nft: lan(`fib daddr type unicast` + takes), want: all},
		"to the gateway":                {nft: lan(`fib daddr type local` + takes)},
		"to the gateway or broadcast":   {nft: lan(`fib daddr type { local, broadcast }` + takes)},
		"to its address on the link":    {nft: lan(`fib daddr . iif type local` + takes)},
		"to the gateway, by a map":      {nft: "table ip nat { chain local { udp dport 5060 redirect; }; chain pre { type nat hook prerouting priority dstnat; iifname \"lan0\" fib daddr type vmap { local : jump local }; }; }\n"},
		"first, those to the gateway":   {nft: fmt.Sprintf(nat, "", `iifname "lan0" fib daddr type local return; iifname "lan0"`+takes), want: all},
		"dnat not to the gateway":       {nft: fmt.Sprintf(nat, "", `fib daddr type != local udp dport 5060 dnat to 10.47.12.1`), want: all},
		"from the gateway":              {nft: lan(`fib saddr type local` + takes)},
		"a set of hosts":                {nft: with("elements = { 10.47.11.109 }", `ip saddr @hosts`+takes), want: all},
		"an empty set of hosts":         {nft: with("", `ip saddr @hosts`+takes), want: all},
		"a set of hosts with timeouts":  {nft: with("flags timeout; elements = { 10.47.11.109 timeout 1h }", `ip saddr @hosts`+takes), want: all},
		"a set of hosts and ports":      {nft: fmt.Sprintf(nat, "set h { type ipv4_addr . inet_service; elements = { 10.47.11.109 . 5060, 10.47.11.110 . 5070 }; }", `iifname "lan0" ip saddr . udp dport @h redirect`), want: "[] [0.0.0.0/0] [{5060 5060} {5070 5070}]"},
		"a fixed set of hosts":          {nft: with("flags interval; elements = { 10.47.11.64/26 }", `ip saddr @hosts`+takes), want: "[10.47.11.64/26] [0.0.0.0/0] [{5060 5060}]"},
		"each host with a port":         {nft: lan(`ip saddr . udp dport { 10.47.11.109 . 5060, 10.47.11.110 . 5070 } redirect`), want: "[10.47.11.109/32] [0.0.0.0/0] [{5060 5060}][10.47.11.110/32] [0.0.0.0/0] [{5070 5070}]"},
		"a set of peers with timeouts":  {nft: with("flags timeout; elements = { 203.0.113.5 timeout 1h }", `ip daddr @hosts`+takes), want: all},
		"a MAC address":                 {nft: lan(`ether saddr != 02:00:00:00:00:01` + takes), want: all},
		"a mark":                        {nft: lan(`meta mark 0` + takes), want: all},
		"a DSCP":                        {nft: lan(`ip dscp cs0` + takes), want: all},
		"a packet type":                 {nft: lan(`meta pkttype host` + takes), want: all},
		"another packet type":           {nft: lan(`meta pkttype broadcast` + takes)},
		"packets of hosts":              {nft: lan(`ct direction original` + takes), want: all},
		"the first packet's port":       {nft: lan(`meta l4proto udp ct original proto-dst 5060 redirect`), want: all},
		"answers":                       {nft: lan(`ct direction reply` + takes)},
		"flows without a status":        {nft: lan(`ct status dnat` + takes)},
		"dnat by a number":              {nft: lan(`udp dport 5060 dnat to numgen inc mod 2 map { 0 : 10.47.11.1, 1 : 10.47.11.2 } : 5099`), want: all},
		"a limit":                       {nft: lan(`limit rate 10/second` + takes), want: all},
		"a transparent proxy":           {nft: fmt.Sprintf(filter, "", `iifname "lan0" ct state new meta nfproto ipv4 udp dport 5060 tproxy ip to :5099 meta mark set 0x77`), want: all},
		"a transparent proxy of others": {nft: fmt.Sprintf(filter, "", `iifname "wan0" ct state new meta nfproto ipv4 udp dport 5060 tproxy ip to :5099 meta mark set 0x77`)},
		"a helper on the way elsewhere": {nft: "table inet h { ct helper s { type \"sip\" protocol udp; }; chain f { type filter hook forward priority filter; oifname \"lan1\" udp dport 5060 ct helper set \"s\"; oifname != \"wan0\" udp dport 5061 ct helper set \"s\"; oifname != \"lan1\" udp dport 5062 ct helper set \"s\"; }; }\n", want: "[] [] [{5062 5062}]"},

		"other hosts":                  {nft: lan(`ip saddr != 8.0.0.0-255.255.255.255` + takes), want: "[0.0.0.0/5] [0.0.0.0/0] [{5060 5060}]"},
		"other peers":                  {nft: lan(`ip daddr != { 0.0.0.0/1, 192.0.0.0/2 }` + takes), want: "[] [128.0.0.0/2] [{5060 5060}]"},
		"first, a host":                {nft: lan(`ip saddr 10.47.0.0/16 accept; iifname "lan0" ip saddr 10.46.0.0/15` + takes), want: "[10.46.0.0/16] [0.0.0.0/0] [{5060 5060}]"},
		"first, a peer":                {nft: lan(`ip daddr 203.0.113.0/25 return; iifname "lan0" ip daddr 203.0.113.0/24` + takes), want: "[] [203.0.113.128/25] [{5060 5060}]"},
		"first, a port":                {nft: lan(`udp dport 5060 accept; iifname "lan0" udp dport 5060-5061 redirect`), want: "[] [0.0.0.0/0] [{5061 5061}]"},
		"first, all of them":           {nft: lan(`udp dport 5000-5999 accept; iifname "lan0"` + takes)},
		"first, by a map":              {nft: lan(`ip saddr vmap { 10.47.0.0/16 : accept }; iifname "lan0" ip saddr 10.46.0.0/15` + takes), want: "[10.46.0.0/16] [0.0.0.0/0] [{5060 5060}]"},
		"all else, by a map":           {nft: "table ip nat { map m { type ct_state : verdict; elements = { established : accept, * : jump others }; }; chain others { udp dport 5060 redirect; }; chain pre { type nat hook prerouting priority dstnat; ct state vmap @m; }; }\n", want: all},
		"first, all else, by a map":    {nft: "table ip nat { map m { type ipv4_addr : verdict; flags interval; elements = { 10.47.11.9 : continue, * : accept }; }; chain pre { type nat hook prerouting priority dstnat; iifname \"lan0\" ip saddr vmap @m; iifname \"lan0\" udp dport 5060 redirect; }; }\n", want: all},
		"first, a set of peers":        {nft: with("elements = { 203.0.113.5, 203.0.113.4 }", `ip daddr @hosts return; iifname "lan0" ip daddr 203.0.113.4/30`+takes), want: "[] [203.0.113.6/31] [{5060 5060}]"},
		"first, a set that expires":    {nft: fmt.Sprintf(nat, "set s { type inet_service; flags timeout; elements = { 5060 timeout 1h }; }", `udp dport @s accept; iifname "lan0"`+takes), want: all},
		"first, one family":            {nft: "table inet nat { chain pre { type nat hook prerouting priority dstnat; iifname \"lan0\" ip daddr 0.0.0.0/1 accept; iifname \"lan0\" udp dport 5060 redirect; }; }\n", want: "[] [128.0.0.0/1] [{5060 5060}][] [::/0] [{5060 5060}]"},
		"other peers, in a named set":  {nft: with("flags interval; elements = { 0.0.0.0/1, 192.0.0.0/2 }", `ip daddr != @hosts`+takes), want: "[] [128.0.0.0/2] [{5060 5060}]"},
		"first, many peers":            {nft: with("flags interval; elements = { "+manyPeers+" }", `ip daddr @hosts accept; iifname "lan0" ip daddr 11.0.0.0/14`+takes), want: "[] [11.0.0.128/25 11.3.255.0/24] [{5060 5060}]"},
		"others than many peers":       {nft: with("flags interval; elements = { "+manyPeers+" }", `ip daddr != @hosts ip daddr 11.0.0.0/14`+takes), want: "[] [11.0.0.128/25 11.3.255.0/24] [{5060 5060}]"},
		"first, a rule for each peer":  {nft: lan(eachPeer + `iifname "lan0" ip daddr 11.0.0.0/14` + takes), want: "[] [11.0.0.128/25 11.3.255.0/24] [{5060 5060}]"},
		"first, a named set of hosts":  {nft: with("elements = { 10.46.0.1, 10.46.0.2, 10.46.0.3 }", `ip saddr @hosts return; iifname "lan0" ip saddr 10.46.0.0/29`+takes), want: "[10.46.0.0/32 10.46.0.4/30] [0.0.0.0/0] [{5060 5060}]"},
		"others than named hosts":      {nft: with("elements = { 10.46.0.1, 10.46.0.2, 10.46.0.3 }", `ip saddr != @hosts ip saddr 10.46.0.0/29`+takes), want: "[10.46.0.0/32 10.46.0.4/30] [0.0.0.0/0] [{5060 5060}]"},
		"none but named hosts":         {nft: with("elements = { 10.46.0.1 }", `ip saddr != @hosts return; iifname "lan0"`+takes), want: all},
		"first, hosts of a proxy":      {nft: fmt.Sprintf(filter, "set h { type ipv4_addr; elements = { 10.46.0.0 }; }", `iifname "lan0" ip saddr @h return; iifname "lan0" ip saddr 10.46.0.0/31 meta nfproto ipv4 udp dport 5060 tproxy ip to :5099 accept`), want: "[10.46.0.1/32] [0.0.0.0/0] [{5060 5060}]"},
		"first, dynamic hosts":         {nft: with("flags dynamic; size 99; elements = { 10.46.0.1 }", `ip saddr @hosts return; iifname "lan0"`+takes), want: all},
		"first, named hosts, by a map": {nft: "table ip nat { map m { type ipv4_addr : verdict; elements = { 10.46.0.0 : accept }; }; chain pre { type nat hook prerouting priority dstnat; iifname \"lan0\" ip saddr vmap @m; iifname \"lan0\" ip saddr 10.46.0.0/31 udp dport 5060 redirect; }; }\n", want: "[10.46.0.1/32] [0.0.0.0/0] [{5060 5060}]"},
		"first, hosts with a port":     {nft: lan(`ip saddr . udp dport { 10.46.0.0 . 5060, 10.46.0.1 . 5060, 10.46.0.2 . 5061 } accept; iifname "lan0" ip saddr 10.46.0.0/30` + takes), want: "[10.46.0.2/31] [0.0.0.0/0] [{5060 5060}]"},
		"first, a host to a peer":      {nft: lan(`ip saddr 10.47.11.5 ip daddr 203.0.113.5 accept; iifname "lan0"` + takes), want: all},
		"first, a mark":                {nft: lan(`meta mark 5 accept; iifname "lan0"` + takes), want: all},
		"first, drop":                  {nft: lan(`ip saddr 10.47.0.0/16 drop; iifname "lan0"` + takes), want: all},
		"first, in another chain":      {nft: "table ip nat { chain a { udp dport 5060 return; udp dport 5061 accept; }; chain b { udp dport 5062 redirect; }; chain pre { type nat hook prerouting priority dstnat; iifname \"lan0\" jump a; udp dport 5063 goto b; iifname \"lan0\" udp dport 5060-5063 redirect; }; }\n", want: "[] [0.0.0.0/0] [{5060 5060} {5062 5062}]"},
		"first, in another base":       {nft: "table ip nat { chain one { type nat hook prerouting priority -110; udp dport 5060 accept; }; chain pre { type nat hook prerouting priority dstnat; iifname \"lan0\" udp dport 5060 redirect; }; }\n", want: all},
		"all ports of a host":          {nft: lan(`ip saddr 10.47.11.109 meta l4proto udp redirect to :5099`), want: "[10.47.11.109/32] [0.0.0.0/0] [{0 65535}]"},
		"all ports, but with a mark":   {nft: lan(`meta mark 5 meta l4proto udp redirect to :5099`)},
		"all ports, first a mark":      {nft: lan(`meta mark 5 return; iifname "lan0" meta l4proto udp redirect to :5099`)},
		"all ports but DNS, a mark":    {nft: lan(`meta mark 5 udp dport != 53 redirect to :5099`)},
		"all ports, a set of hosts":    {nft: with("elements = { 10.47.11.109 }", `ip saddr @hosts meta l4proto udp redirect to :5099`)},
		"all ports, a timeout set":     {nft: with("flags timeout; elements = { 203.0.113.5 timeout 1h }", `ip daddr @hosts meta l4proto udp redirect to :5099`)},
		"a port forward with a mark":   {nft: fmt.Sprintf(nat, "", `meta mark 0 udp dport 5060 dnat to 10.47.11.5`)},
		"a port forward for all else":  {nft: fmt.Sprintf(nat, "", `ip saddr != 10.47.11.9 udp dport 5060 dnat to 10.47.11.5`)},

		"iptables, not to the gateway":     {iptables: ipt("nat", "-i lan0 -p udp -m addrtype ! --dst-type LOCAL -m udp --dport 5060 -j REDIRECT"), want: all},
		"iptables, not on the link":        {iptables: ipt("nat", "-i lan0 -p udp -m addrtype ! --dst-type LOCAL --limit-iface-in -m udp --dport 5060 -j REDIRECT"), want: all},
		"iptables, to the gateway":         {iptables: ipt("nat", "-i lan0 -p udp -m addrtype --dst-type LOCAL -m udp --dport 5060 -j REDIRECT")},
		"iptables, to its address":         {iptables: ipt("nat", "-i lan0 -p udp -m addrtype --dst-type LOCAL --limit-iface-in -m udp --dport 5060 -j REDIRECT")},
		"iptables, from the gateway":       {iptables: ipt("nat", "-i lan0 -p udp -m addrtype --src-type LOCAL -m udp --dport 5060 -j REDIRECT")},
		"iptables, a range of hosts":       {iptables: ipt("nat", "-i lan0 -p udp -m iprange --src-range 10.47.11.100-10.47.11.120 -m udp --dport 5060 -j REDIRECT"), want: all},
		"iptables, ports of both":          {iptables: ipt("nat", "-i lan0 -p udp -m multiport --ports 5060,5062:5063 -j REDIRECT"), want: "[] [0.0.0.0/0] [{5060 5060} {5062 5063}]"},
		"iptables, ports of hosts":         {iptables: ipt("nat", "-i lan0 -p udp -m multiport --sports 5060 -j REDIRECT")},
		"iptables, a MAC address":          {iptables: ipt("nat", "-i lan0 -p udp -m mac ! --mac-source 02:00:00:00:00:01 -m udp --dport 5060 -j REDIRECT"), want: all},
		"iptables, a mark":                 {iptables: ipt("nat", "-i lan0 -p udp -m mark --mark 0 -m udp --dport 5060 -j REDIRECT"), want: all},
		"iptables, packets of hosts":       {iptables: ipt("nat", "-i lan0 -p udp -m conntrack --ctdir ORIGINAL -m udp --dport 5060 -j REDIRECT"), want: all},
		"iptables, answers":                {iptables: ipt("nat", "-i lan0 -p udp -m conntrack --ctdir REPLY -m udp --dport 5060 -j REDIRECT")},
		"iptables, other hosts":            {iptables: ipt("nat", "-i lan0 ! -s 128.0.0.0/1 -p udp -m udp --dport 5060 -j REDIRECT"), want: "[0.0.0.0/1] [0.0.0.0/0] [{5060 5060}]"},
		"iptables, first some hosts":       {iptables: ipt("nat", "-i lan0 -s 10.47.0.0/20 -j ACCEPT\n-A PREROUTING -i lan0 -s 10.47.0.0/19 -p udp -m udp --dport 5060 -j REDIRECT"), want: "[10.47.16.0/20] [0.0.0.0/0] [{5060 5060}]"},
		"iptables, first in another chain": {iptables: ipt("nat", "-i lan0 -j other\n-A other -d 203.0.113.0/25 -j RETURN\n-A other -d 203.0.113.0/24 -p udp -m udp --dport 5060 -j REDIRECT"), want: "[] [203.0.113.128/25] [{5060 5060}]"},
		"iptables, a transparent proxy":    {iptables: ipt("mangle", "-i lan0 -p udp -m conntrack --ctstate NEW -m udp --dport 5060 -j TPROXY --on-port 5099 --tproxy-mark 0x77"), want: all},
	} {
		if tc.nft != "" {
			t.Run(name, func(t *testing.T) {
				l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
				check(t, l.NFT(tc.nft))
				diverts(t, ruleset(t, l), tc.want)
			})
			continue
		}
		for _, variant := range []string{lab.IPTablesNFT, lab.IPTablesLegacy} {
			t.Run(name+", "+variant, func(t *testing.T) {
				l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
				check(t, l.IPTables(variant, tc.iptables))
				diverts(t, ruleset(t, l), tc.want)
			})
		}
	}
}

// diverts compares the diversions of a ruleset, twice.
func diverts(t *testing.T, rs *userrules.Ruleset, want string) {
	t.Helper()
	var d userrules.Diverter
	var found []string
	all, same := d.Diversions(rs, sides)
	if same {
		t.Error("the first answer is the same as an earlier one")
	}
	if again, same := d.Diversions(rs, sides); !same || len(again) != len(all) {
		t.Errorf("the second answer has %d, and same is %v", len(again), same)
	}
	for _, x := range all {
		found = append(found, fmt.Sprint(userrules.Prefixes(x.Hosts), " ", userrules.Prefixes(x.Peers), " ", x.Ports))
		t.Log(x.Text)
	}
	slices.Sort(found) // the kernel returns elements of sets in any order
	if got := strings.Join(found, ""); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// Rules behind one that lets thousands of prefixes pass have the other peers in common: one list
// for all of them.
//
// Fails when each rule has a list of its own.
func TestDiversionsShareLongLists(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	rules := "table ip proxy { set spared { type ipv4_addr; flags interval; elements = { 203.0.113.0/25"
	for i := range 3000 {
		rules += fmt.Sprintf(", 11.%d.%d.0/25", i>>8, i&0xff)
	}
	rules += " }; }; chain pre { type nat hook prerouting priority dstnat; ip daddr @spared return\n"
	for i := range 200 {
		rules += fmt.Sprintf("ip saddr 10.47.11.%d udp dport %d redirect to :5099\n", i, 5000+i)
	}
	check(t, l.NFT(rules+"}; }"))
	var d userrules.Diverter
	all, _ := d.Diversions(ruleset(t, l), sides)
	if len(all) != 200 {
		t.Fatalf("%d diversions, want 200", len(all))
	}
	for _, x := range all {
		if len(x.Peers) != 3002 || &x.Peers[0] != &all[0].Peers[0] {
			t.Fatalf("%v has a list of %d peers, want the list of %v with 3,002", x.Ports, len(x.Peers), all[0].Ports)
		}
	}
}
