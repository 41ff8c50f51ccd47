package userrules

import (
	"net/netip"
	"testing"
)

// Fails when chains before NAT see the packets of a forward as they are behind it.
func TestPacketsOfAForwardArriveUntranslated(t *testing.T) {
	for _, tt := range []struct{ from, at, to string }{
		{"203.0.113.5:7000", "198.51.100.1:6003", "10.47.11.110:6002"},
		{"[2001:db8:203::5]:7000", "[2001:db8:198::1]:6003", "[2001:db8:47::110]:6002"},
	} {
		at, to := netip.MustParseAddrPort(tt.at), netip.MustParseAddrPort(tt.to)
		s := strangerStages(newStranger(nil, nil, nil, netip.MustParseAddrPort(tt.from), to), nil, at, to)
		for where, see := range map[string]struct {
			c          *child
			is         netip.AddrPort
			translated bool
		}{
			"before conntrack": {s.untracked, at, false}, "before NAT": {s.arrived, at, false},
			"behind NAT": {s.routing, to, true}, "forwarded": {s.forwarded, to, true},
		} {
			values := func(cells []cell) (b []byte) {
				for _, c := range cells {
					b = append(b, c.val)
				}
				return b
			}
			addr, _ := netip.AddrFromSlice(values(see.c.network[see.c.destination():]))
			port := values(see.c.transport[2:4])
			if got := netip.AddrPortFrom(addr, uint16(port[0])<<8|uint16(port[1])); got != see.is {
				t.Errorf("%s: a packet to %v, want %v", where, got, see.is)
			}
			if got := see.c.status&statusDstNAT != 0; got != see.translated {
				t.Errorf("%s, to %v: translated: %v", where, see.is, got)
			}
		}
	}
}
