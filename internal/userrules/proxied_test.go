package userrules_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/lab"
)

// What a rule gives to a transparent proxy of packets from outside is a forward, and never a certain
// one: it is partial if it may leave packets alone while the proxy listens. Rules for packets from inside are none, nor is one for most of the ports with a condition that
// may keep packets to the gateway from it.
//
// Fails when a rule is missed, counts for what it does not take, or counts as certain.
func TestProxiesOfPacketsFromOutsideAreForwards(t *testing.T) {
	t.Parallel()
	nft := func(rules string) string {
		return `table inet tp { set own { type ipv4_addr; }; chain pre { type filter hook prerouting priority mangle; ` + rules + `; }; }`
	}
	ipt := func(rule string) string {
		return "*mangle\n:proxy - [0:0]\n-A PREROUTING " + rule + "\nCOMMIT\n"
	}
	const (
		to      = ` meta nfproto ipv4 udp dport 6000-6999 tproxy ip to :9500 meta mark set 1 accept`
		all     = ` meta l4proto udp tproxy ip to :9500 meta mark set 1 accept`
		toIPT   = " -p udp -m udp --dport 6000:6999 -j TPROXY --on-port 9500 --tproxy-mark 0x1"
		allIPT  = " -p udp -j TPROXY --on-port 9500 --tproxy-mark 0x1"
		port    = "6000-6999 > ip"
		anyPort = "all > ip"
	)
	for name, tc := range map[string]struct {
		nft, iptables string
		want          []string
	}{
		"ports":                   {nft: nft(`iifname "wan0"` + to), want: []string{port}},
		"new flows":               {nft: nft(`iifname "wan0" ct state new` + to), want: []string{port}},
		"established flows":       {nft: nft(`iifname "wan0" ct state established` + to)},
		"to the gateway":          {nft: nft(`fib daddr type local` + to), want: []string{port}},
		"not to the gateway":      {nft: nft(`fib daddr type != local` + to)},
		"from inside":             {nft: nft(`iifname "lan0"` + to)},
		"both families":           {nft: nft(`iifname "wan0" udp dport 6000 tproxy to :9500`), want: []string{"6000"}},
		"the other family":        {nft: nft(`iifname "wan0" meta nfproto ipv6 udp dport 6000 tproxy ip6 to :9500`), want: []string{"6000 > ip6"}},
		"TCP":                     {nft: nft(`iifname "wan0" meta nfproto ipv4 tcp dport 6000 tproxy ip to :9500`)},
		"a source":                {nft: nft(`ip saddr 203.0.113.0/24` + to), want: []string{port + " of 203.0.113.0/24"}},
		"an address":              {nft: nft(`ip daddr 198.51.100.1` + to), want: []string{"6000-6999 > 198.51.100.1"}},
		"a mark":                  {nft: nft(`meta mark 7` + to), want: []string{port + ", partial"}},
		"by a jump":               {nft: `table inet tp { chain more { ` + to + `; }; chain pre { type filter hook prerouting priority -300; iifname "wan0" jump more; }; }`, want: []string{port}},
		"by a map":                {nft: `table inet tp { chain more { ` + to + `; }; chain pre { type filter hook prerouting priority 10; iifname vmap { "wan0" : jump more }; }; }`, want: []string{port}},
		"first, some ports":       {nft: nft(`udp dport 6000-6099 accept;` + to), want: []string{"6100-6999 > ip"}},
		"all from outside":        {nft: nft(`iifname "wan0"` + all), want: []string{anyPort}},
		"all but to the gateway":  {nft: nft(`fib daddr type local return;` + all)},
		"all marked from outside": {nft: nft(`iifname "wan0" meta mark 7` + all), want: []string{anyPort + ", partial"}},
		"all but to some":         {nft: nft(`ip daddr @own return;` + all)},
		"all but some marks":      {nft: nft(`meta mark 7 return;` + all)},
		"a drop beside NAT":       {nft: `table ip nat { chain a { type filter hook prerouting priority mangle; udp dport 6000 drop; }; chain b { type nat hook prerouting priority dstnat; udp dport 5060 dnat to 10.47.11.109; }; }`, want: []string{"5060 > ip, certain"}},

		"iptables, ports":                  {iptables: ipt("-i wan0" + toIPT), want: []string{port}},
		"iptables, new flows":              {iptables: ipt("-i wan0 -m conntrack --ctstate NEW" + toIPT), want: []string{port}},
		"iptables, established flows":      {iptables: ipt("-i wan0 -m conntrack --ctstate ESTABLISHED" + toIPT)},
		"iptables, from inside":            {iptables: ipt("-i lan0" + toIPT)},
		"iptables, by a jump":              {iptables: ipt("-i wan0 -j proxy\n-A proxy" + toIPT), want: []string{port}},
		"iptables, all from outside":       {iptables: ipt("-i wan0" + allIPT), want: []string{anyPort}},
		"iptables, all but to the gateway": {iptables: ipt("-m addrtype --dst-type LOCAL -j RETURN\n-A PREROUTING" + allIPT)},
	} {
		check := func(t *testing.T, l *lab.Lab) {
			var got []string
			for _, f := range forwards(t, l) {
				s := strings.TrimPrefix(brief(f), " > ")
				for _, r := range f.Sources {
					s += fmt.Sprintf(" of %v/24", r.First)
				}
				if f.Partial {
					s += ", partial"
				}
				if f.Certain() {
					s += ", certain"
				}
				got = append(got, s)
			}
			slices.Sort(got)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		}
		if tc.nft != "" {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
				if err := l.NFT(tc.nft); err != nil {
					t.Fatal(err)
				}
				check(t, l)
			})
			continue
		}
		withIPTables(t, name, tc.iptables, check)
	}
}
