package userrules_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// wan0 is the outside link of the lab.
func wan0(t *testing.T, l *lab.Lab) userrules.Link {
	t.Helper()
	link := userrules.Link{Name: "wan0"}
	for line := range strings.Lines(output(t, l, "ip", "-oneline", "link")) {
		if strings.Contains(line, "wan0@") {
			if _, err := fmt.Sscan(line[:strings.Index(line, ":")], &link.Index); err != nil {
				t.Fatal(err)
			}
		}
	}
	return link
}

// verdict writes an answer as "DNATed related dropper". The answer for most packets follows
// each in parentheses if it differs.
func verdict(v userrules.ChildVerdicts) string {
	one := func(all, most userrules.Answer) string {
		if all == most {
			return all.String()
		}
		return fmt.Sprintf("%v (%v)", all, most)
	}
	return strings.TrimSpace(one(v.DNATed, v.MostDNATed) + " " + one(v.Related, v.MostRelated) + " " + v.Dropper().Chain)
}

// inForward puts rules into a chain with policy drop.
func inForward(rules string) string {
	return "table inet filter { chain forward { type filter hook forward priority filter; policy drop; " + rules + "; }; }\n"
}

func TestChildrenOfNftRules(t *testing.T) {
	tests := []struct{ name, nft, want string }{
		{"no rules", lab.NoRules, "accepted accepted"},
		{"no forward chain", lab.Masquerade, "accepted accepted"},
		{"drop policy of the lab", lab.Masquerade + lab.DropPolicy, "dropped accepted inet filter forward"},
		{"drop policy alone", inForward("counter"), "dropped dropped inet filter forward"},
		{"accept policy", strings.Replace(inForward("counter"), "policy drop", "policy accept", 1), "accepted accepted"},
		{"established, related", inForward("ct state established,related accept"), "dropped accepted inet filter forward"},
		{"set of states", inForward("ct state { established, related } accept"), "dropped accepted inet filter forward"},
		{"related for ICMP", inForward("ct state established accept; ip protocol icmp ct state related accept; meta l4proto icmp ct state related accept"), "dropped dropped inet filter forward"},
		{"new and DNAT", inForward("ct state established accept; ct state new ct status dnat accept"), "accepted dropped inet filter forward"},
		{"DNAT", inForward("ct status dnat accept"), "accepted accepted"},
		{"not DNAT is dropped", inForward("ct status & dnat != dnat drop; accept"), "accepted accepted"},
		{"expected", inForward("ct status expected accept"), "dropped accepted inet filter forward"},
		{"confirmed", inForward("ct status confirmed accept"), "dropped dropped inet filter forward"},
		{"map of states", inForward("ct state vmap { established : accept, related : accept, invalid : drop }"), "dropped accepted inet filter forward"},
		{"map of states with chains", "table inet filter { chain more { ct status dnat accept; }; chain forward { type filter hook forward priority filter; policy drop; ct state vmap { new : jump more, related : goto more, invalid : drop }; }; }", "accepted accepted"},
		{"map with another verdict for the rest", inForward("ct state vmap { established : accept, * : drop }; accept"), "dropped dropped inet filter forward"},
		{"label", inForward("ct label 126 accept"), "accepted dropped inet filter forward"},
		{"another label", inForward("ct label 125 accept"), "unknown unknown"},
		{"related to a helper's flow", inForward(`ct state related ct helper "ftp" accept; ct helper { "ftp", "sip" } accept`), "dropped dropped inet filter forward"},
		{"not of a helper", inForward(`ct helper != "ftp" accept`), "dropped accepted inet filter forward"},
		{"a helper that an anchor may have", inForward(`ct helper "RAS" accept`), "dropped unknown inet filter forward"},
		{"to one outside port", inForward("meta l4proto udp ct original proto-dst 5060 accept"), "unknown (dropped) unknown (dropped) inet filter forward"},
		{"to most outside ports", inForward("meta l4proto udp ct original proto-dst 1024-65535 accept"), "unknown (accepted) unknown (accepted)"},
		{"flows that inside hosts began", inForward("ct original ip saddr 10.47.11.0/24 accept"), "dropped dropped inet filter forward"},
		{"flows that others began", inForward("ct original ip saddr != 10.47.11.0/24 accept"), "accepted accepted"},
		{"flows to inside hosts", inForward("ct reply ip saddr 10.47.11.0/24 accept"), "unknown unknown"},
		{"direction", inForward("ct direction reply accept"), "dropped dropped inet filter forward"},
		{"original direction", inForward("ct direction original accept"), "accepted accepted"},
		{"in by the outside link", inForward(`iifname "wan0" accept`), "accepted accepted"},
		{"in by the outside link, by index", inForward(`iif "wan0" accept`), "accepted accepted"},
		{"in by links of a pattern", inForward(`iifname "wan*" accept`), "accepted accepted"},
		{"in by the inside link", inForward(`iifname "lan0" accept`), "dropped dropped inet filter forward"},
		{"in by a link of a set", inForward(`iifname { "lan0", "wan0" } accept`), "accepted accepted"},
		{"in by a link of another set", inForward(`iifname { "lan0", "guest0" } accept`), "dropped dropped inet filter forward"},
		{"out by the outside link", inForward(`oifname "wan0" drop; oif "wan0" drop; accept`), "accepted accepted"},
		{"map of links", inForward(`iifname vmap { "lan0" : accept, "wan0" : drop }`), "dropped dropped inet filter forward"},
		{"to the subnet", inForward("ip daddr 10.47.11.0/24 accept"), "accepted accepted"},
		{"to more than the subnet", inForward("ip daddr 10.0.0.0/8 accept"), "accepted accepted"},
		{"to a range around the subnet", inForward("ip daddr 10.40.0.0-10.50.0.0 accept"), "accepted accepted"},
		{"to a set of networks", inForward("ip daddr { 10.0.0.0/8, 192.168.0.0/16 } accept"), "accepted accepted"},
		{"to another network", inForward("ip daddr { 10.48.0.0/16, 192.168.0.0/16 } accept"), "dropped dropped inet filter forward"},
		{"to one host", inForward("ip daddr 10.47.11.109 accept"), "unknown (dropped) unknown (dropped) inet filter forward"},
		{"to one port", inForward("udp dport 5060 accept"), "unknown (dropped) unknown (dropped) inet filter forward"},
		{"to most ports", inForward("udp dport 1024-65535 accept"), "unknown (accepted) unknown (accepted)"},
		{"to half of the ports", inForward("udp dport 32768-60999 accept"), "unknown unknown"},
		{"from the subnet", inForward("ip saddr 10.47.11.0/24 accept; ip saddr 10.47.11.109 accept"), "dropped dropped inet filter forward"},
		{"from a blocked network", inForward("ip saddr 203.0.113.0/24 drop; accept"), "unknown (accepted) unknown (accepted)"},
		{"from a list that is blocked", "table inet filter { set s { type ipv4_addr; flags interval; }; chain forward { type filter hook forward priority 0; policy drop; ip saddr @s drop; ct status dnat accept; }; }", "unknown (accepted) unknown (accepted)"},
		{"from anywhere but a list that is blocked", "table inet filter { set s { type ipv4_addr; flags interval; }; chain forward { type filter hook forward priority 0; policy drop; ip saddr != @s ct status dnat accept; }; }", "unknown (accepted) unknown (accepted)"},
		{"from countries of a list", "table inet filter { set s { type ipv4_addr; flags interval; }; chain forward { type filter hook forward priority 0; policy drop; ip saddr != @s drop; accept; }; }", "unknown unknown"},
		{"from a set", "table inet filter { set s { type ipv4_addr; }; chain forward { type filter hook forward priority 0; policy drop; ip saddr @s accept; }; }", "unknown unknown"},
		{"mark", inForward("meta mark 1 accept"), "unknown unknown"},
		{"mark of conntrack", inForward("ct mark & 0xff == 1 accept"), "unknown unknown"},
		{"limit", inForward("limit rate 3/second accept"), "unknown unknown"},
		{"an expression that the library drops", inForward("rt classid 1 accept"), "unknown unknown"},
		{"TCP", inForward("tcp dport 80 accept; meta l4proto tcp accept"), "dropped dropped inet filter forward"},
		{"UDP", inForward("meta l4proto { tcp, udp } accept"), "accepted accepted"},
		{"IPv6", inForward("meta nfproto ipv6 accept; ip6 nexthdr udp accept"), "dropped dropped inet filter forward"},
		{"IPv4", inForward("meta protocol ip accept"), "accepted accepted"},
		{"another family", "table ip6 filter { chain forward { type filter hook forward priority 0; policy drop; }; }", "accepted accepted"},
		{"two chains", inForward("accept") + "table ip later { chain f { type filter hook forward priority 10; reject; }; }", "dropped dropped ip later f"},
		{"the first of two chains", "table ip later { chain f { type filter hook forward priority 10; drop; }; }\n" + inForward("counter"), "dropped dropped inet filter forward"},
		{"reject", inForward("ct state related accept; reject with icmpx type admin-prohibited"), "dropped accepted inet filter forward"},
		{"queue", inForward("queue num 1"), "unknown unknown"},
		{"statements", inForward(`log prefix "x" counter meta mark set 1 ct mark set meta mark meta priority set 1:1 accept`), "accepted accepted"},
		{"flow offload", "table inet filter { flowtable f { hook ingress priority 0; devices = { lan0, wan0 }; }; chain forward { type filter hook forward priority 0; policy drop; ct status dnat flow add @f accept; }; }", "dropped dropped inet filter forward"},
		{"return from a chain", "table inet filter { chain a { ct state new return; accept; }; chain forward { type filter hook forward priority 0; policy drop; jump a; }; }", "dropped accepted inet filter forward"},
		{"end of a chain", "table inet filter { chain a { tcp dport 1 accept; }; chain forward { type filter hook forward priority 0; policy drop; jump a; accept; }; }", "accepted accepted"},
		{"chain for one port", "table inet filter { chain a { udp dport 5060 accept; }; chain forward { type filter hook forward priority 0; policy accept; jump a; ct state new drop; }; }", "unknown (dropped) accepted inet filter forward"},
		{"end of a chain of goto", "table inet filter { chain a { tcp dport 1 accept; }; chain forward { type filter hook forward priority 0; policy drop; goto a; accept; }; }", "dropped dropped inet filter forward"},
		{"dormant", "table inet filter { flags dormant; chain forward { type filter hook forward priority 0; policy drop; }; }", "accepted accepted"},
		{"ours", "table inet conenat { chain made_by_conenatd { }; chain forward { type filter hook forward priority 0; policy drop; }; }", "accepted accepted"},
		{"other hooks", "table inet filter { chain input { type filter hook input priority 0; policy drop; }; chain post { type filter hook postrouting priority 0; drop; }; }", "accepted accepted"},
		{"fragments", inForward("ip frag-off & 0x1fff != 0 drop; accept"), "accepted accepted"},
		{"unicast", inForward("meta pkttype != unicast drop; fib daddr type local drop; accept"), "accepted accepted"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Guest: true, Rules: lab.NoRules})
			if test.nft != lab.NoRules {
				err := l.NFT(test.nft)
				if err != nil && strings.Contains(err.Error(), "No such file or directory") { // nft_queue, nf_flow_table
					t.Skipf("this kernel lacks what these rules need: %v", err)
				}
				check(t, err)
			}
			got, err := childrenOf(l.Gateway.FD(), []userrules.Link{wan0(t, l)}, []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24")})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, verdict(got[0])); diff != "" {
				t.Errorf("%s\n%s", diff, output(t, l, "nft", "-n", "--debug=netlink", "list", "ruleset"))
			}
		})
	}
}

func TestChildrenOfIPTablesRules(t *testing.T) {
	tests := []struct{ name, rules, want string }{
		{"nothing", "", "dropped dropped @ filter FORWARD"},
		{"established, related", "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "dropped accepted @ filter FORWARD"},
		{"established", "-A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT", "dropped dropped @ filter FORWARD"},
		{"state", "-A FORWARD -m state --state RELATED,ESTABLISHED -j ACCEPT", "dropped accepted @ filter FORWARD"},
		{"related for ICMP", "-A FORWARD -p icmp -m conntrack --ctstate RELATED -j ACCEPT", "dropped dropped @ filter FORWARD"},
		{"DNAT", "-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT", "accepted accepted"},
		{"new and DNAT", "-A FORWARD -m conntrack --ctstate NEW -m conntrack --ctstate DNAT -j ACCEPT", "accepted dropped @ filter FORWARD"},
		{"not DNAT", "-A FORWARD -m conntrack ! --ctstate DNAT -j DROP\n-A FORWARD -j ACCEPT", "accepted accepted"},
		{"status", "-A FORWARD -m conntrack --ctstatus EXPECTED -j ACCEPT", "dropped accepted @ filter FORWARD"},
		{"not status", "-A FORWARD -m conntrack ! --ctstatus EXPECTED -j ACCEPT", "accepted dropped @ filter FORWARD"},
		{"protocol of conntrack", "-A FORWARD -m conntrack --ctproto tcp -j DROP\n-A FORWARD -m conntrack --ctproto udp -j ACCEPT", "accepted accepted"},
		{"direction", "-A FORWARD -m conntrack --ctdir REPLY -j ACCEPT", "dropped dropped @ filter FORWARD"},
		{"source of replies", "-A FORWARD -m conntrack --ctreplsrc 10.47.11.0/24 -j ACCEPT", "accepted accepted"},
		{"original destination", "-A FORWARD -m conntrack --ctorigdst 198.51.100.1 -j ACCEPT", "unknown unknown"},
		{"reject", "-A FORWARD -m conntrack --ctstate RELATED -j ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-port-unreachable", "dropped accepted @ filter FORWARD"},
		{"comment", `-A FORWARD -m comment --comment "all of it" -j ACCEPT`, "accepted accepted"},
		{"link", "-A FORWARD -i wan0 ! -o wan0 -j ACCEPT", "accepted accepted"},
		{"links of a pattern", "-A FORWARD -i wan+ -j ACCEPT", "accepted accepted"},
		{"inside link", "-A FORWARD -i lan0 -j ACCEPT", "dropped dropped @ filter FORWARD"},
		{"subnet", "-A FORWARD -d 10.47.11.0/24 -p udp -j ACCEPT", "accepted accepted"},
		{"odd subnet", "-A FORWARD -d 10.47.0.0/18 -p udp -j ACCEPT", "accepted accepted"},
		{"not a subnet", "-A FORWARD ! -d 10.47.0.0/18 -j DROP\n-A FORWARD -j ACCEPT", "accepted accepted"},
		{"port", "-A FORWARD -p udp -m udp --dport 5060 -j ACCEPT", "unknown (dropped) unknown (dropped) @ filter FORWARD"},
		{"TCP", "-A FORWARD -p tcp -m tcp --dport 5060 -j ACCEPT", "dropped dropped @ filter FORWARD"},
		{"ports", "-A FORWARD -p udp -m multiport --dports 5060,6000:7000 -j ACCEPT", "unknown (dropped) unknown (dropped) @ filter FORWARD"},
		{"limit", "-A FORWARD -m limit --limit 3/second -j ACCEPT", "unknown unknown"},
		{"mark", "-A FORWARD -m mark --mark 1 -j ACCEPT", "unknown unknown"},
		{"type of address", "-A FORWARD -m addrtype --dst-type LOCAL -j DROP\n-A FORWARD -m addrtype --dst-type UNICAST -j ACCEPT", "accepted accepted"},
		{"targets that go on", "-A FORWARD -j LOG\n-A FORWARD -j MARK --set-mark 1\n-A FORWARD -j CONNMARK --save-mark\n-A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu\n-A FORWARD -j ACCEPT", "accepted accepted"},
		{"queue", "-A FORWARD -j NFQUEUE", "unknown unknown"},
		{"fragments", "-A FORWARD -f -j DROP\n-A FORWARD ! -f -j ACCEPT", "accepted accepted"},
		{"related to a helper's flow", "-A FORWARD -m conntrack --ctstate RELATED -m helper --helper ftp -j ACCEPT\n-A FORWARD -m helper --helper sip -j ACCEPT", "dropped dropped @ filter FORWARD"},
		{"not of a helper", "-A FORWARD -m conntrack --ctstate RELATED -m helper ! --helper ftp -j ACCEPT", "dropped accepted @ filter FORWARD"},
		{"a helper with the number of a port", "-A FORWARD -m helper --helper tftp-6969 -j ACCEPT", "dropped unknown @ filter FORWARD"},
		{"a helper that an anchor may have", "-A FORWARD -m helper --helper RAS -j ACCEPT", "dropped unknown @ filter FORWARD"},
		{"outside port", "-A FORWARD -m conntrack --ctorigdstport 5060 -j ACCEPT", "unknown (dropped) unknown (dropped) @ filter FORWARD"},
		{"outside ports", "-A FORWARD -m conntrack --ctorigdstport 1024:65535 -j ACCEPT", "unknown (accepted) unknown (accepted)"},
		{"began inside", "-A FORWARD -m conntrack --ctorigsrc 10.47.11.0/24 -j ACCEPT", "dropped dropped @ filter FORWARD"},
		{"began elsewhere", "-A FORWARD -m conntrack ! --ctorigsrc 10.47.11.0/24 -j ACCEPT", "accepted accepted"},
		{"no target", "-A FORWARD -p udp", "dropped dropped @ filter FORWARD"},
		{"return to the policy", "-A FORWARD -m conntrack --ctstate NEW -j RETURN\n-A FORWARD -j ACCEPT", "dropped accepted @ filter FORWARD"},
		{"return", ":A - [0:0]\n-A FORWARD -j A\n-A A -m conntrack --ctstate NEW -j RETURN\n-A A -j ACCEPT", "dropped accepted @ filter FORWARD"},
		{"goto", ":A - [0:0]\n-A FORWARD -g A\n-A FORWARD -j ACCEPT\n-A A -m conntrack --ctstate NEW -j ACCEPT", "accepted dropped @ filter FORWARD"},
	}
	for variant, title := range map[string]string{lab.IPTablesNFT: "ip", lab.IPTablesLegacy: "iptables-legacy"} {
		for _, test := range tests {
			t.Run(variant+"/"+test.name, func(t *testing.T) {
				t.Parallel()
				l := lab.ForTest(t, lab.Options{Guest: true, Rules: lab.NoRules})
				check(t, l.IPTables(variant, "*filter\n:FORWARD DROP [0:0]\n"+test.rules+"\nCOMMIT\n"))
				got, err := childrenOf(l.Gateway.FD(), []userrules.Link{wan0(t, l)}, []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24")})
				check(t, err)
				if diff := cmp.Diff(strings.ReplaceAll(test.want, "@", title), verdict(got[0])); diff != "" {
					t.Errorf("%s\n%s", diff, output(t, l, variant+"-save"))
				}
			})
		}
	}
}
