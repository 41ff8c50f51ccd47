package rules_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// before makes a chain of the prerouting hook.
func before(priority, rules string) string {
	return "table inet pr { chain p { type filter hook prerouting priority " + priority + "; " + rules + "; }; }\n"
}

// The children of a gateway whose forward chain accepts them meet chains of prerouting. Each
// kind is sent through the kernel; its fate is what Children says of most.
func TestChildrenMeetWhatPreroutingSays(t *testing.T) {
	const conntrack, dnat = "-199", "-100"
	iptables := func(table, rules string) string {
		return "*" + table + "\n" + rules + "\nCOMMIT\n"
	}
	for _, f := range []struct {
		name, nft, iptables string // the latter for iptables-nft and iptables-legacy
		want                string // of most children, with the chain that drops them
	}{
		{name: "new", nft: before("mangle", `iifname "wan0" ct state new drop`), want: "dropped accepted inet pr p"},
		{name: "new, right behind conntrack", nft: before(conntrack, `iifname "wan0" ct state new drop`), want: "dropped accepted inet pr p"},
		{name: "new, behind NAT", nft: before("filter", `iifname "wan0" ct state new drop`), want: "dropped accepted inet pr p"},
		{name: "new, on the inside link", nft: before("mangle", `iifname "lan0" ct state new ct direction reply drop`), want: "accepted accepted"},
		{name: "new to other ports", nft: before("mangle", `iifname "wan0" ct state new udp dport != { 53, 443 } drop`), want: "dropped accepted inet pr p"},
		{name: "new to local addresses", nft: before("mangle", `iifname "wan0" ct state new fib daddr type local udp dport != { 53 } drop`), want: "dropped accepted inet pr p"},
		{name: "new to addresses of the link", nft: before("mangle", `ct state new fib daddr . iif type local iifname "wan0" drop`), want: "dropped accepted inet pr p"},
		{name: "to addresses of no link", nft: before("mangle", `fib daddr . iif type != { local, broadcast, multicast } iifname "wan0" drop`), want: "accepted accepted"},
		{name: "to the outside address", nft: before("mangle", `ct state new ip daddr 198.51.100.1 drop`), want: "dropped accepted inet pr p"},
		{name: "to private addresses", nft: before("mangle", `iifname "wan0" ip daddr { 10.0.0.0/8, 192.168.0.0/16 } drop`), want: "accepted accepted"},
		{name: "to the subnet, before NAT", nft: before("mangle", `iifname "wan0" ip daddr 10.47.11.0/24 drop`), want: "accepted accepted"},
		{name: "to the subnet, behind NAT", nft: before("-99", `iifname "wan0" ip daddr 10.47.11.0/24 ct state new,related drop`), want: "dropped dropped inet pr p"},
		{name: "not DNATed, before NAT", nft: before("mangle", `iifname "wan0" ct state new,related ct status ! dnat drop`), want: "dropped accepted inet pr p"},
		{name: "not DNATed, behind NAT", nft: before("-99", `iifname "wan0" ct state new,related ct status ! dnat drop`), want: "accepted accepted"},
		{name: "related", nft: before("mangle", `iifname "wan0" ct state related drop`), want: "accepted dropped inet pr p"},
		{name: "new and related", nft: before("mangle", `iifname "wan0" ct state new,related drop`), want: "dropped dropped inet pr p"},
		{name: "map of states", nft: before("mangle", `iifname "wan0" ct state vmap { new : drop, related : accept }`), want: "dropped accepted inet pr p"},
		{name: "chain for a link", nft: `table inet pr { chain wan { ct state established,related accept; udp dport { 53, 443 } accept; drop; }
			chain p { type filter hook prerouting priority mangle; iifname vmap { "wan0" : goto wan }; }; }`, want: "dropped accepted inet pr p"},
		{name: "policy", nft: before("mangle", `policy drop; iifname "lan0" accept; ct state established,related accept`), want: "dropped accepted inet pr p"},
		{name: "reverse-path filter", nft: before("mangle + 10", `policy drop; meta nfproto ipv4 udp sport . udp dport { 67 . 68, 68 . 67 } accept; fib saddr . mark . iif oif exists accept`), want: "accepted accepted"},
		{name: "reverse-path filter of firewalld", nft: before("raw", `fib saddr . mark . iif oif missing drop`), want: "accepted accepted"},
		{name: "NAT chain", nft: `table ip pr { chain p { type nat hook prerouting priority dstnat; iifname "wan0" ct state new,related drop; }; }`, want: "dropped accepted ip pr p"},
		{name: "NAT chain with forwards", nft: `table ip pr { chain p { type nat hook prerouting priority 5; iifname "lan0" accept; udp dport 99 dnat to 10.47.11.9; udp dport 98 redirect to :97; drop; }; }`, want: "dropped accepted ip pr p"},
		{name: "before conntrack, most peers", nft: before("raw", `iifname "wan0" ip saddr != 203.0.113.5 drop`), want: "dropped dropped inet pr p"},
		{name: "before conntrack, new", nft: before("raw", `iifname "wan0" ct state new drop; ct mark 0 drop; ct status ! dnat drop`), want: "accepted accepted"},
		{name: "blocklist before conntrack", nft: before("raw", `iifname "wan0" ip saddr { 198.18.0.0/15, 100.64.0.0/10 } drop; ip saddr 10.0.0.0/8 iifname "wan0" drop`), want: "accepted accepted"},
		{name: "where conntrack is, established alone", nft: before(dnat, `iifname "wan0" ct state != { established, related } drop`), want: "dropped accepted inet pr p"},
		{name: "IPv6", nft: before("mangle", `meta nfproto ipv6 ct state new drop`), want: "accepted accepted"},
		{name: "TCP", nft: before("mangle", `iifname "wan0" ct state new meta l4proto tcp drop`), want: "accepted accepted"},
		{name: "marks the rest", nft: before("mangle", `iifname "wan0" ct state new meta mark set 1; ip dscp set cs0`), want: "accepted accepted"},

		{name: "mangle", iptables: iptables("mangle", "-A PREROUTING -i wan0 -m conntrack --ctstate NEW -j DROP"), want: "dropped accepted @ mangle PREROUTING"},
		{name: "mangle, ports", iptables: iptables("mangle", "-A PREROUTING -i wan0 -p udp -m conntrack --ctstate NEW -m multiport ! --dports 53,443 -j DROP"), want: "dropped accepted @ mangle PREROUTING"},
		{name: "mangle, invalid", iptables: iptables("mangle", "-A PREROUTING -m conntrack --ctstate INVALID -j DROP"), want: "accepted accepted"},
		{name: "mangle, local", iptables: iptables("mangle", ":wan - [0:0]\n-A PREROUTING -i wan0 -j wan\n-A wan -m conntrack --ctstate RELATED,ESTABLISHED -j RETURN\n-A wan -m addrtype --dst-type LOCAL -j DROP"), want: "dropped accepted @ mangle PREROUTING"},
		{name: "mangle, not local", iptables: iptables("mangle", "-A PREROUTING -i wan0 -m addrtype ! --dst-type LOCAL -j DROP"), want: "accepted accepted"},
		{name: "mangle, answers from the address", iptables: iptables("mangle", "-A PREROUTING -i wan0 -m conntrack --ctstate NEW,RELATED --ctreplsrc 198.51.100.1 -j DROP"), want: "dropped accepted @ mangle PREROUTING"},
		{name: "mangle, policy", iptables: iptables("mangle", ":PREROUTING DROP [0:0]\n-A PREROUTING -i lan0 -j ACCEPT\n-A PREROUTING -m state --state RELATED,ESTABLISHED -j ACCEPT"), want: "dropped accepted @ mangle PREROUTING"},
		{name: "raw, reverse-path filter", iptables: iptables("raw", "-A PREROUTING -m rpfilter --validmark --invert -j DROP"), want: "accepted accepted"},
		{name: "raw, state", iptables: iptables("raw", "-A PREROUTING -i wan0 -m conntrack --ctstate NEW,RELATED,DNAT -j DROP\n-A PREROUTING -m conntrack --ctstatus NONE -j DROP"), want: "accepted accepted"},
		{name: "raw, most peers", iptables: iptables("raw", "-A PREROUTING -i wan0 ! -s 203.0.113.5 -p udp -j DROP"), want: "dropped dropped @ raw PREROUTING"},
		{name: "raw of Docker", iptables: iptables("raw", "-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP"), want: "accepted accepted"},
		{name: "nat of Docker", iptables: iptables("nat", ":DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n-A DOCKER ! -i docker0 -p udp --dport 99 -j DNAT --to-destination 172.17.0.2:99\n-A POSTROUTING -o wan0 -j MASQUERADE"), want: "accepted accepted"},
	} {
		run := func(name, variant, want string) {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				g := newGate(t, lab.Options{Rules: lab.Masquerade}, granting)
				load(t, g.Lab, firewall{nft: f.nft})
				if f.iptables != "" {
					check(t, g.IPTables(variant, f.iptables))
				}
				got := children(t, g.Lab)
				if s := strings.TrimSpace(fmt.Sprint(got.MostDNATed, " ", got.MostRelated, " ", got.Dropper().Chain)); s != want {
					t.Errorf("got %s, want %s\n%s", s, want, output(t, g.Lab, "nft", "list", "ruleset"))
				}
				for _, all := range [][2]userrules.Answer{{got.DNATed, got.MostDNATed}, {got.Related, got.MostRelated}} {
					if all[0] != all[1] && all[0] != userrules.Unknown {
						t.Errorf("%v of all, but %v of most", all[0], all[1])
					}
				}
				g.sendsChildren(got)
			})
		}
		if f.iptables == "" {
			run(f.name, "", f.want)
			continue
		}
		run(f.name+" by iptables-nft", lab.IPTablesNFT, strings.ReplaceAll(f.want, "@", "ip"))
		run(f.name+" by iptables-legacy", lab.IPTablesLegacy, strings.ReplaceAll(f.want, "@", "iptables-legacy"))
	}
}
