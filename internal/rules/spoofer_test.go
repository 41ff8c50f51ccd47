package rules_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// A spoofer is outside and uses the address of the first inside host. Its packets go
// through the gateway and out again.
type spoofer struct {
	t    *testing.T
	l    *lab.Lab
	sent int
}

func newSpoofer(t *testing.T, l *lab.Lab) *spoofer {
	t.Helper()
	for _, name := range []string{"all", "wan0"} {
		check(t, l.Gateway.SetSysctl("net.ipv4.conf."+name+".rp_filter", "0"))
	}
	// For the spoofer, one outside address is behind the gateway.
	for _, args := range []string{
		"addr add 10.47.11.109/32 dev lo",
		"route add table local unicast 192.0.2.99/32 via 198.51.100.1",
	} {
		if _, err := l.Outside.Output("ip", strings.Fields(args)...); err != nil {
			t.Fatal(err)
		}
	}
	check(t, l.NFT(`table ip see { chain c {
		type filter hook postrouting priority 299; iifname "wan0" oifname "wan0" ct status snat counter; }; }`))
	return &spoofer{t: t, l: l}
}

// send sends from a port, and waits until the gateway has translated the packet.
func (s *spoofer) send(port uint16) {
	s.t.Helper()
	check(s.t, listen(s.t, s.l.Outside, s.l.Inside(0).Addr, port).Send(netip.MustParseAddrPort("192.0.2.99:5060"), "x"))
	s.sent++
	seen := fmt.Sprintf("packets %d ", s.sent)
	eventually(s.t, func() bool {
		return strings.Contains(output(s.t, s.l, "nft", "list", "chain", "ip", "see", "c"), seen)
	})
}
