package userrules_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// What firewalls drop of the user's forwards to a host, or to the hosts of a prefix.
//
// Fails when Shut says that a firewall drops what it may let through, when one open port or peer counts
// for all, and when a match of several ports is for all if the port is not the same in all packets.
func TestShut(t *testing.T) {
	const none = "none"
	for name, tc := range map[string]struct{ rules, hosts, want string }{
		"closed":            {inForward("ct state established,related accept"), "", "any 10.47.11.109 0-65535"},
		"open":              {lab.NoRules, "", none},
		"a port":            {inForward("udp dport 5060 accept"), "", "any 10.47.11.109 0-5059, any 10.47.11.109 5061-65535"},
		"of the host":       {inForward("ip daddr 10.47.11.109 udp dport 5060 accept"), "", "any 10.47.11.109 0-5059, any 10.47.11.109 5061-65535"},
		"of another host":   {inForward("ip daddr 10.47.11.110 udp dport 5060 accept"), "", "any 10.47.11.109 0-65535"},
		"ports":             {inForward("udp dport { 53, 10000-20000 } accept"), "", "any 10.47.11.109 0-52, any 10.47.11.109 54-9999, any 10.47.11.109 20001-65535"},
		"a named set":       {inForward("udp dport @open accept; }; set open { type inet_service; elements = { 53 }"), "", "any 10.47.11.109 0-52, any 10.47.11.109 54-65535"},
		"a verdict map":     {inForward("udp dport vmap { 53 : accept, 5000-65535 : drop }"), "", "any 10.47.11.109 0-52, any 10.47.11.109 54-65535"},
		"with the host":     {inForward("ip daddr . udp dport { 10.47.11.109 . 53, 10.47.11.110 . 54 } accept"), "", "any 10.47.11.109 0-52, any 10.47.11.109 54-65535"},
		"all but a port":    {inForward("udp dport != 53 accept"), "", "any 10.47.11.109 53-53"},
		"few at a time":     {inForward("udp dport 53 limit rate 1/second accept"), "", "any 10.47.11.109 0-52, any 10.47.11.109 54-65535"},
		"peers":             {inForward("ip saddr 128.0.0.0/1 accept"), "", "0.0.0.0/1 10.47.11.109 0-65535"},
		"a port of peers":   {inForward("ip saddr 128.0.0.0/1 udp dport 32768-65535 accept"), "", "any 10.47.11.109 0-32767, 0.0.0.0/1 10.47.11.109 32768-65535"},
		"peers of a set":    {inForward("ip saddr @trusted udp dport 53 accept; }; set trusted { type ipv4_addr; flags interval; elements = { 128.0.0.0/1 }"), "", "any 10.47.11.109 0-52, any 10.47.11.109 54-65535, 0.0.0.0/1 10.47.11.109 53-53"},
		"peers of the time": {inForward("ip saddr @seen udp dport 53 accept; }; set seen { type ipv4_addr; flags timeout; elements = { 203.0.113.5 }"), "", "any 10.47.11.109 0-52, any 10.47.11.109 54-65535"},
		"a prefix":          {inForward("ip daddr 10.47.11.110 udp dport 0-32767 accept"), "10.47.11.108/30", "any 10.47.11.108/30 32768-65535, any 10.47.11.108/31 0-32767, any 10.47.11.111 0-32767"},
		"ports before NAT":  {inForward("ct state related accept") + "table ip raw { chain pre { type filter hook prerouting priority mangle; udp dport 5060 accept; drop; }; }", "", "any 10.47.11.109 0-65535"},
		"open before NAT":   {strings.ReplaceAll(inForward(""), "policy drop", "policy accept") + "table ip raw { chain pre { type filter hook prerouting priority mangle; udp dport 5060 drop; }; }", "", none},
		"behind NAT":        {"table ip raw { chain pre { type filter hook prerouting priority dstnat + 1; udp dport 5060 drop; }; }", "", "any 10.47.11.109 5060-5060"},
		"dropped by others": {"table ip fw { chain pre { type nat hook prerouting priority dstnat; ip daddr 198.51.100.1 udp dport 5060 dnat to 10.47.11.109; drop; }; }", "", none},
		"rewritten":         {inForward("udp dport 7000 accept") + "table ip raw { chain pre { type filter hook prerouting priority dstnat + 1; udp dport 5060 udp dport set 7000; }; }", "", "any 10.47.11.109 0-5059, any 10.47.11.109 5061-6999, any 10.47.11.109 7001-65535"},
		"by one link alone": {inForward(`iifname "wan0" udp dport 53 accept; iifname "wan1" udp dport 54 accept`), "", "any 10.47.11.109 0-52, any 10.47.11.109 55-65535"},
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: tc.rules})
			if got := shutOf(t, l, tc.hosts); got != tc.want {
				t.Errorf("%s, want %s", got, tc.want)
			}
		})
	}
	for _, variant := range []string{lab.IPTablesNFT, lab.IPTablesLegacy} {
		for name, tc := range map[string]struct{ rule, want string }{
			"a port":    {"-p udp --dport 53 -j ACCEPT", "any 10.47.11.109 0-52, any 10.47.11.109 54-65535"},
			"multiport": {"-d 10.47.11.109 -p udp -m multiport --dports 53,10000:20000 -j ACCEPT", "any 10.47.11.109 0-52, any 10.47.11.109 54-9999, any 10.47.11.109 20001-65535"},
			"but these": {"-p udp -m multiport ! --dports 53,54 -j ACCEPT", "any 10.47.11.109 53-54"},
		} {
			t.Run(variant+"/"+name, func(t *testing.T) {
				l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
				check(t, l.IPTables(variant, "*filter\n:FORWARD DROP [0:0]\n-A FORWARD "+tc.rule+"\nCOMMIT\n"))
				if got := shutOf(t, l, ""); got != tc.want {
					t.Errorf("%s, want %s", got, tc.want)
				}
			})
		}
	}
}

// shutOf returns what the rules drop of forwards to hosts, by default the first one of the lab.
func shutOf(t testing.TB, l *lab.Lab, hosts string) string {
	t.Helper()
	rs, err := newReader(t, l).Read()
	check(t, err)
	to := netip.PrefixFrom(l.Inside(0).Addr, 32)
	if hosts != "" {
		to = netip.MustParsePrefix(hosts)
	}
	outside := []userrules.Link{{Index: 2, Name: "wan0"}, {Index: 4, Name: "wan1"}}
	all, err := rs.Shut(outside, []userrules.Link{{Index: 3, Name: "lan0"}}, []netip.Prefix{to})
	check(t, err)
	if len(all) == 0 {
		return "none"
	}
	texts := make([]string, len(all))
	for i, s := range all {
		peers := s.Peers.String()
		if s.Peers.Bits() == 0 {
			peers = "any"
		}
		texts[i] = strings.Replace(fmt.Sprintf("%s %v %d-%d", peers, s.Hosts, s.Ports.First, s.Ports.Last), "/32 ", " ", 1)
	}
	return strings.Join(texts, ", ")
}

// The firewall of a host with many open ports and peers, and of one behind thousands of rules.
func BenchmarkShut(b *testing.B) {
	ports := func(n int) string {
		var s strings.Builder
		for i := range n {
			fmt.Fprintf(&s, "ip saddr 203.0.%d.0/24 ip daddr 10.47.11.%d udp dport %d accept\n", i%250, 1+i%254, 1024+3*i)
		}
		return inForward("ct state established,related accept\n" + s.String())
	}
	for _, n := range []int{10, 100, 10_000} {
		l := lab.ForTest(b, lab.Options{Rules: ports(n)})
		rs, err := newReader(b, l).Read()
		check(b, err)
		links, hosts := []userrules.Link{{Index: 2, Name: "wan0"}}, []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24")}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var all []cone.Shut
			began := cpuTime(b)
			for b.Loop() {
				all, err = rs.Shut(links, []userrules.Link{{Index: 3, Name: "lan0"}}, slices.Clone(hosts))
				check(b, err)
			}
			b.ReportMetric(float64(cpuTime(b)-began)/1e6/float64(b.N), "ms-CPU/op")
			b.ReportMetric(float64(len(all)), "parts")
		})
	}
}
