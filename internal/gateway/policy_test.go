package gateway

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

func TestHidesWaysBack(t *testing.T) {
	for _, rule := range []struct {
		args string
		want bool
	}{
		{"", false},
		{"rule add from 10.47.11.200 lookup 100", false},
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
	} {
		t.Run(rule.args, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			if rule.args != "" {
				if _, err := l.Gateway.Output("ip", strings.Fields(rule.args)...); err != nil {
					t.Fatal(err)
				}
			}
			if is, err := HidesWaysBack(l.Gateway.FD(), 0xf000000); is != rule.want || err != nil {
				t.Error(is, err)
			}
		})
	}
}
