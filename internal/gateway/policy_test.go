package gateway

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

func TestRulesThatHideWaysBack(t *testing.T) {
	for _, rule := range []struct {
		args string
		want bool
	}{
		{"", false},
		{"rule add from 10.47.11.200 lookup 100", false},
		{"-6 rule add not from 2001:db8::/32 lookup 100", false},
		{"rule add fwmark 7 lookup 100", true},
		{"rule add not fwmark 0xca6c lookup 100", true},
		{"-6 rule add fwmark 0x100/0xff00 lookup 100", true},
		{"rule add fwmark 0x1000000/0xf000000 lookup 100", false},
		{"rule add not fwmark 0x1000000/0xf000000 lookup 100", true},
		{"rule add fwmark 0x1000000/0xf000001 lookup 100", true},
		{"rule add iif lan0 lookup 100", true},
		{"rule add not iif lan0 lookup 100", true},
		{"rule add iif lo lookup 100", true},
		{"-6 rule add iif lan0 lookup 100", true},
		{"rule add oif wan0 lookup 100", false},
		{"rule add ipproto udp lookup 100", true},
		{"rule add ipproto udp dport 5060 lookup 100", true},
		{"rule add ipproto udp sport 5060-5070 lookup 100", true},
		{"rule add ipproto tcp dport 80 lookup 100", false},
		{"rule add ipproto tcp fwmark 7 lookup 100", false},
		{"rule add tos 0x10 lookup 100", true},
		{"rule add tun_id 7 lookup 100", true},
		{"rule add table main suppress_prefixlength 0", false},
		{"rule add table main suppress_ifgroup 7", false},
		{"rule add to 10.47.11.0/24 goto 32766", false},
		{"rule add fwmark 7 table main suppress_prefixlength 0", true},
		{"rule add iif lan0 goto 32766", true},
		{"-6 rule add ipproto udp dport 5060 goto 32766", true},
		{"rule add not ipproto tcp goto 32766", false},
		{"rule add uidrange 0-0 lookup 100", false},
		{"mrule add iif lan0 lookup 100", false},
	} {
		t.Run(rule.args, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			if rule.args != "" {
				if _, err := l.Gateway.Output("ip", strings.Fields(rule.args)...); err != nil {
					t.Fatal(err)
				}
			}
			ways, err := ReadWaysBack(l.Gateway.FD(), 0xf000000)
			if bySource := strings.Contains(rule.args, " from "); ways.Hidden != rule.want || ways.BySource != bySource || err != nil {
				t.Error(ways, err)
			}
		})
	}
}

// A rule has its DSCP in these attributes from Linux 6.13 on, and the mask from 6.15 on.
//
// Fails when the DSCP is decoded as 4 times as much or as little, when a rule for DSCP 0 is
// taken for a rule for all packets, or when a part of the DSCP is taken for the whole.
func TestRulesAskForADSCP(t *testing.T) {
	ofDSCP := func(dscp, mask uint8) []byte {
		const fraDSCP, fraDSCPMask = 25, 30
		e := nfnl.Encoder{B: append([]byte{unix.AF_INET}, make([]byte, fibRuleHeaderLen-1)...)}
		e.U8(fraDSCP, dscp)
		e.U8(fraDSCPMask, mask)
		return e.B
	}
	rule := func(dscps ...uint8) (n Network) {
		for _, d := range dscps {
			r, err := decodeRule(ofDSCP(d, 0x3f))
			if err != nil {
				t.Fatal(err)
			}
			n.Rules = append(n.Rules, r)
		}
		return n
	}
	for _, tt := range []struct {
		n    Network
		want []uint8
	}{
		{rule(), []uint8{0}},
		{rule(46), []uint8{0, 0xb8}},
		{rule(46, 10, 46), []uint8{0, 0xb8, 0x28}},
		{rule(0, 1), []uint8{8, 0, 4}},
	} {
		if got := tt.n.toses(); !slices.Equal(got, tt.want) || tt.n.HidesWays(IPv4) {
			t.Errorf("%x, want %x; ways are hidden: %v", got, tt.want, tt.n.HidesWays(IPv4))
		}
	}
	if r, err := decodeRule(ofDSCP(0x28, 0x38)); err != nil || !(Network{Rules: []Rule{r}}).HidesWays(IPv4) {
		t.Errorf("a rule for a part of the DSCP is %+v, %v", r, err)
	}
}
