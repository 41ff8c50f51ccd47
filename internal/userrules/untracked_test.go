package userrules_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/lab"
)

// Rules that keep UDP packets of hosts, or of their peers, from conntrack are found before conntrack,
// with what they are for. Those for the gateway's own packets and ports, and those that come too
// late to matter, are left out.
//
// Fails when a kind of rule is not followed, and when a rule for something else counts.
func TestUntracked(t *testing.T) {
	nft := func(rules string) string {
		return `table inet early { chain more { notrack; }; chain pre { type filter hook prerouting priority raw; ` + rules + `; }; }`
	}
	ipt := func(rule string) string { return "*raw\n-A PREROUTING " + rule + "\nCOMMIT\n" }
	const (
		hosts = "10.47.11.0/24 from hosts"
		peers = "10.47.11.0/24 from peers"
		six   = "2001:db8:47::/64 from "
		sip   = " [{5060 5060}]"
		all   = " [{0 65535}]"
	)
	for name, tc := range map[string]struct {
		nft, iptables, variant string
		want                   []string
	}{
		"from hosts":               {nft: nft(`iifname "lan0" ip saddr 10.47.11.0/24 udp dport 5060 notrack`), want: []string{hosts + sip}},
		"from hosts, both":         {nft: nft(`iifname "lan0" udp dport 5060 notrack`), want: []string{hosts + sip, six + "hosts" + sip}},
		"some host":                {nft: nft(`ip saddr 10.47.11.109 meta l4proto udp notrack`), want: []string{hosts + all}},
		"another network":          {nft: nft(`ip saddr 10.48.0.0/16 meta l4proto udp notrack`)},
		"all":                      {nft: nft(`meta l4proto udp notrack`), want: []string{hosts + all, six + "hosts" + all, peers + all, six + "peers" + all}},
		"from outside":             {nft: nft(`iifname "wan0" meta nfproto ipv4 meta l4proto udp notrack`), want: []string{peers + all}},
		"from outside to a port":   {nft: nft(`iifname "wan0" udp dport 51820 notrack`)},
		"from outside from a port": {nft: nft(`iifname "wan0" udp sport 53 notrack`)},
		"to a routed subnet":       {nft: nft(`iifname "wan0" ip6 daddr 2001:db8:47::/48 notrack`), want: []string{six + "peers" + all}},
		"to the gateway's subnet":  {nft: nft(`iifname "wan0" fib daddr type local meta nfproto ipv4 meta l4proto udp notrack`), want: []string{peers + all}},
		"by a jump":                {nft: nft(`iifname vmap { "lan0" : jump more }`), want: []string{hosts + all, six + "hosts" + all}},
		"behind some ports":        {nft: nft(`iifname "lan0" udp dport != 5060 accept; iifname "lan0" meta nfproto ipv4 meta l4proto udp notrack`), want: []string{hosts + sip}},
		"to the gateway":           {nft: nft(`iifname "lan0" fib daddr type local udp dport 53 notrack`)},
		"TCP":                      {nft: nft(`iifname "lan0" tcp dport 5060 notrack`)},
		"behind conntrack":         {nft: `table inet early { chain pre { type filter hook prerouting priority mangle; meta l4proto udp notrack; }; }`},
		"of the gateway":           {nft: `table inet early { chain out { type filter hook output priority raw; meta l4proto udp notrack; }; }`},

		"iptables-nft":                 {iptables: ipt("-i lan0 -p udp -m udp --dport 5060 -j CT --notrack"), variant: lab.IPTablesNFT, want: []string{hosts + sip}},
		"iptables-nft, a helper":       {iptables: ipt("-i lan0 -p udp -m udp --dport 5060 -j CT --helper sip"), variant: lab.IPTablesNFT},
		"iptables-legacy":              {iptables: ipt("-i lan0 -p udp -m udp --dport 5060 -j CT --notrack"), variant: lab.IPTablesLegacy, want: []string{hosts + sip}},
		"iptables-legacy, all":         {iptables: ipt("-p udp -j CT --notrack"), variant: lab.IPTablesLegacy, want: []string{hosts + all, peers + all}},
		"iptables-legacy, own service": {iptables: ipt("-i lan0 -p udp -m udp --dport 53 -m addrtype --dst-type LOCAL -j CT --notrack"), variant: lab.IPTablesLegacy},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			if tc.nft != "" {
				check(t, l.NFT(tc.nft))
			}
			if tc.iptables != "" {
				check(t, l.IPTables(tc.variant, tc.iptables))
			}
			routed := netip.MustParsePrefix("2001:db8:47::/64")
			both := sides
			both.Subnets = []netip.Prefix{lab.InsideNet, routed}
			var got []string
			for _, u := range ruleset(t, l).Untracked(both, []netip.Prefix{routed}) {
				from := map[bool]string{false: "hosts", true: "peers"}[u.FromPeers]
				got = append(got, fmt.Sprint(u.Subnet, " from ", from, " ", u.Ports))
				if u.Text == "" {
					t.Error("no rule is named")
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Rules of iptables-legacy that keep packets from conntrack are deleted by the words that name them, of
// several equal rules one, and no other rule goes.
//
// Fails when a word is wrong or missing, and when words are given that iptables makes another rule of.
func TestUntrackedRulesOfLegacyAreDeletedByTheirWords(t *testing.T) {
	const other = "-A PREROUTING -i lan0 -p udp -m udp --dport 5061 -j ACCEPT\n"
	for _, tc := range []struct {
		rule string
		some bool // words say all of it
	}{
		{"-p udp -j CT --notrack", true},
		{"-j CT --notrack", true},
		{"-s 10.47.11.0/24 -i lan0 -p udp -m udp --dport 5060 -j CT --notrack", true},
		{"-s 10.47.11.109/32 ! -d 192.0.2.0/25 ! -i wan0 -p udp -m udp --sport 1024:65535 ! --dport 53 -j CT --notrack", true},
		{"-i lan+ -p udp -m multiport --dports 5060:5070,6000,7000:7001 -j CT --notrack", true},
		{"-i lan0 -p udp -m multiport ! --ports 53 -j CT --notrack", true},
		{"! -p tcp -i lan0 -j CT --notrack", true},
		{`-i lan0 -p udp -m comment --comment "it's \"SIP\"; $HOME" -j CT --notrack`, true},
		{"-i lan0 ! -f -p udp -j CT --notrack", false},
		{"-s 10.47.0.109/255.255.0.255 -p udp -j CT --notrack", false},
		{"-i lan0 -p udp -m mark --mark 0x0/0x1 -j CT --notrack", false},
		{"-i lan0 -p udp -m addrtype ! --dst-type LOCAL -j CT --notrack", false},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			rule := "-A PREROUTING " + tc.rule + "\n"
			check(t, l.IPTables(lab.IPTablesLegacy, "*raw\n"+other+rule+"-A PREROUTING -p udp -j TRACE\n"+rule+"COMMIT\n"))
			for left := 2; left > 0; left-- {
				found := ruleset(t, l).Untracked(sides, nil)
				if len(found) == 0 {
					t.Fatal("no rule is found")
				}
				if words := found[0].Spec; (words != nil) != tc.some {
					t.Fatalf("words %q", words)
				} else if words == nil {
					return
				}
				_, err := l.Gateway.Output("iptables-legacy", append([]string{"-t", "raw", "-D", "PREROUTING"}, found[0].Spec...)...)
				check(t, err)
			}
			if found := ruleset(t, l).Untracked(sides, nil); found != nil {
				t.Errorf("left: %+v", found)
			}
			out, err := l.Gateway.Output("iptables-legacy-save", "-t", "raw")
			check(t, err)
			if strings.Count(out, "\n-A ") != 2 || !strings.Contains(out, other) {
				t.Errorf("left:\n%s", out)
			}
		})
	}
}
