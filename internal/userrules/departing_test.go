package userrules_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// setOfHosts lets the hosts of a set out.
func setOfHosts(set string) string {
	return "table inet filter { set s { type ipv4_addr;" + set + " }; chain forward { type filter hook forward priority 0; policy drop; ip saddr @s accept; }; }\n"
}

// Fails when hosts count as blocked of which a packet may get out, and when they do not where none
// can. The rulesets in testdata/firewalls say the same of whole firewalls.
func TestWhatBlocksHosts(t *testing.T) {
	const forward = "inet filter forward"
	prerouting := func(priority, rules string) string {
		return "table inet early { chain pre { type filter hook prerouting priority " + priority + "; " + rules + "; }; }\n"
	}
	for name, tt := range map[string]struct{ nft, want string }{
		"no rules":               {"table inet empty { }", ""},
		"the lab's drop policy":  {lab.Masquerade + lab.DropPolicy, ""},
		"what began goes on":     {inForward("ct state established,related accept"), forward},
		"by links":               {inForward(`iifname "wan0" accept; oifname "lan0" accept`), forward},
		"in by the link":         {inForward(`iifname "lan0" accept`), ""},
		"out by the link":        {inForward(`oifname "wan0" accept`), ""},
		"out by another link":    {inForward(`iifname "lan0" oifname "guest0" accept`), forward},
		"the subnet is dropped":  {inForward("ip saddr 10.47.11.0/24 drop; accept"), forward},
		"the subnet is rejected": {inForward("ip saddr 10.0.0.0/8 reject; accept"), forward},
		"another subnet":         {inForward("ip saddr 10.47.12.0/24 accept"), forward},
		"one host gets out":      {inForward("ip saddr 10.47.11.109 accept"), ""},
		"hosts of a set":         {setOfHosts(" elements = { 10.47.11.109 };"), ""},
		"hosts of an empty set":  {setOfHosts(""), forward},
		"hosts that logged in":   {setOfHosts(" flags dynamic; timeout 1h;"), ""},
		"one port":               {inForward("udp dport 5060 accept"), ""},
		"one peer":               {inForward("ip daddr 203.0.113.5 accept"), ""},
		"to the subnet":          {inForward("ip daddr 10.47.11.0/24 accept"), forward},
		"a mark":                 {inForward("meta mark 1 accept"), ""},
		"a limit":                {inForward("limit rate 3/second accept"), ""},
		"TCP":                    {inForward("meta l4proto tcp accept"), forward},
		"IPv6":                   {inForward("meta nfproto ipv6 accept"), forward},
		"translated":             {inForward("ct status dnat accept"), forward},
		"before conntrack":       {prerouting("raw", `iifname "lan0" udp dport 1-65535 drop; iifname "lan0" drop`), "inet early pre"},
		"behind NAT":             {prerouting("0", `iifname "lan0" meta l4proto udp drop`), "inet early pre"},
		"a reverse path filter":  {prerouting("raw", "fib saddr . iif oif 0 drop"), ""},
		"another chain":          {prerouting("raw", "accept") + inForward("counter"), forward},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Guest: true, Rules: tt.nft})
			r := userrules.NewReader(userrules.Config{NetNS: l.Gateway.FD()})
			defer func() { _ = r.Close() }()
			rs, err := r.Read()
			check(t, err)
			wan, lan := wan0(t, l), userrules.Link{Index: 1 << 20, Name: "lan0"}
			subnets := []netip.Prefix{lab.InsideNet}
			got, err := rs.Blockers([]userrules.Link{wan}, []userrules.Link{lan}, subnets)
			check(t, err)
			if got[0].Chain != tt.want || got[0].Forward != strings.Contains(tt.want, "forward") {
				t.Errorf("%+v, want %q", got, tt.want)
			}
			other := userrules.Link{Index: 1<<20 + 1, Name: "wan1"}
			both, err := rs.Blockers([]userrules.Link{wan, other}, []userrules.Link{wan}, subnets)
			check(t, err)
			if both[0].Chain != "" {
				t.Errorf("with one arm: %+v", both)
			}
		})
	}
}

// Fails when hosts that get out by one of two uplinks count as blocked.
func TestHostsMayGetOutByAnotherUplink(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: inForward(`oifname "wan1" accept`)})
	r := userrules.NewReader(userrules.Config{NetNS: l.Gateway.FD()})
	defer func() { _ = r.Close() }()
	rs, err := r.Read()
	check(t, err)
	up := []userrules.Link{{Index: 11, Name: "wan0"}, {Index: 12, Name: "wan1"}}
	for n, want := range map[int]string{1: "inet filter forward", 2: ""} {
		got, err := rs.Blockers(up[:n], []userrules.Link{{Index: 13, Name: "lan0"}}, []netip.Prefix{lab.InsideNet})
		check(t, err)
		if got[0].Chain != want {
			t.Errorf("with %d uplinks: %+v, want %q", n, got, want)
		}
	}
}
