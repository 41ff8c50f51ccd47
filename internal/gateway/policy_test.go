package gateway

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

func TestRoutesByMark(t *testing.T) {
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
	} {
		t.Run(rule.args, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			if rule.args != "" {
				if _, err := l.Gateway.Output("ip", strings.Fields(rule.args)...); err != nil {
					t.Fatal(err)
				}
			}
			if is, err := RoutesByMark(l.Gateway.FD(), 0xf000000); is != rule.want || err != nil {
				t.Error(is, err)
			}
		})
	}
}
