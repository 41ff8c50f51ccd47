package rules_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// Flows that leave a subnet are marked by their uplink, including IPv6 flows and flows by
// the second of two links. Flows between two subnets are not marked, even if an outside
// link leads to one of them.
//
// Fails when a family is left out, when marks do not follow the order of the links, or when
// a route by the mark could take packets away from an inside network.
func TestFlowsAreMarkedByTheirUplink(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true, Guest: true})
	d := rules.Desired{
		OutsideLinks: []string{"wan0", "guest0"}, Subnets: append(slices.Clone(both), lab.GuestNet),
		UplinkMarks: &rules.UplinkMarks{Mask: 0xff00, Links: []string{"guest0", "wan0"}},
	}
	set(t, open(t, l), d)
	in, guest := l.Inside(0), l.Guest
	for name, tc := range map[string]struct {
		from, to *lab.Host
		src, dst netip.Addr
		port     uint16
		family   string
		mark     int
	}{
		"IPv4":                {in, l.Outside, in.Addr, lab.PeerA, 5060, "ipv4", 0x200},
		"IPv6":                {in, l.Outside, in.Addr6, lab.Peer6A, 5061, "ipv6", 0x200},
		"between two subnets": {in, guest, in.Addr, guest.Addr, 5062, "ipv4", 0},
		"of no subnet":        {guest, l.Outside, guest.Addr6, lab.Peer6A, 5063, "ipv6", 0},
		"by the other uplink": {in, guest, in.Addr6, guest.Addr6, 5064, "ipv6", 0x100},
	} {
		t.Run(name, func(t *testing.T) {
			from, to := listen(t, tc.from, tc.src, tc.port), listen(t, tc.to, tc.dst, tc.port)
			for range 2 {
				if _, err := from.Contact(to); err != nil {
					t.Fatal(err)
				}
			}
			flow := entries(t, l, "-f", tc.family, "-p", "udp", "--sport", fmt.Sprint(tc.port))
			if len(flow) != 1 || !strings.Contains(flow[0], fmt.Sprintf("mark=%d ", tc.mark)) {
				t.Errorf("want mark %d: %q", tc.mark, flow)
			}
		})
	}
}
