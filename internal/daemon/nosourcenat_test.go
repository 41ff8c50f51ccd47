package daemon

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Only routes show that IPv4 packets leave by some links, and the network that the reconcile keeps has
// none by outside links.
//
// Fails when a look at changed rules finds other links than a reconcile: a subnet without source NAT
// would be told now and then, and one that a rule translates on such a link would count as one without.
func TestLinksByWhichPacketsLeave(t *testing.T) {
	all := netip.MustParsePrefix("0.0.0.0/0")
	for name, tc := range map[string]struct {
		link gateway.Link
		addr string
		want bool
	}{
		"an unnumbered link":                    {gateway.Link{Kind: "ppp"}, "", true},
		"a macvlan with the default route":      {gateway.Link{Kind: "macvlan"}, "198.51.100.1/24", true},
		"a link for IPv6":                       {gateway.Link{Outside: gateway.IPv6}, "198.51.100.1/24", false},
		"a link with an address and no gateway": {gateway.Link{}, "198.51.100.1/24", true},
	} {
		l := tc.link
		if l.Index, l.Name = 2, "wan0"; l.Outside == 0 {
			l.Outside = gateway.IPv4
		}
		network := gateway.Network{Links: []gateway.Link{l}, Routes: []gateway.Route{{Prefix: all, Link: 2, Table: unix.RT_TABLE_MAIN}}}
		if tc.addr != "" {
			network.Addrs = []gateway.Addr{{Link: 2, Prefix: netip.MustParsePrefix(tc.addr)}}
		}
		f := &firewall{user: &userrules.Ruleset{}}
		f.setSides(network)
		subnet := netip.MustParsePrefix("10.47.11.0/24")
		cfg := config.Config{Subnets: []config.Subnet{{Prefix: subnet}}}
		if got := slices.Contains(f.neverTranslated(cfg), subnet); got != tc.want {
			t.Errorf("%s: the subnet has no source NAT: %v", name, got)
		}
	}
}
