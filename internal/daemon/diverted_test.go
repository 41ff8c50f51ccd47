package daemon

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/internal/userrules"
)

// Many rules become few: by their ports, by their peers, and by their hosts. What takes from all peers, or from
// all hosts, stays apart, and so does what takes most ports.
//
// Fails when rules of different hosts, or of different ports and peers, are mixed, and when more
// than mostDiversions kinds lose one.
func TestDiversionsAreMerged(t *testing.T) {
	one, two, host := netip.MustParsePrefix("203.0.113.5/32"), netip.MustParsePrefix("203.0.113.6/32"), netip.MustParsePrefix("10.47.11.109/32")
	ports := func(all ...uint16) (ranges []userrules.PortRange) {
		for _, p := range all {
			ranges = append(ranges, userrules.PortRange{First: p, Last: p})
		}
		return ranges
	}
	f := firewall{diverted: merged([]userrules.Diversion{
		{Peers: []netip.Prefix{one}, Ports: ports(5070)},
		{Peers: []netip.Prefix{one}, Ports: ports(5060, 5070)},
		{Peers: []netip.Prefix{two}, Ports: ports(5060, 5070)},
		{Ports: ports(5060, 5070)},
		{Hosts: []netip.Prefix{host}, Peers: []netip.Prefix{one}, Ports: ports(5060, 5070)},
		{Peers: []netip.Prefix{two}, Ports: ports(53)},
	})}
	got := f.diversions()
	want := "[{[] [203.0.113.5/32] [{5060 5060} {5070 5070}]} " +
		"{[] [203.0.113.6/32] [{53 53} {5060 5060} {5070 5070}]} " +
		"{[] [] [{5060 5060} {5070 5070}]} " +
		"{[10.47.11.109/32] [203.0.113.5/32] [{5060 5060} {5070 5070}]}]"
	if fmt.Sprint(got) != want {
		t.Errorf("got  %v\nwant %s", got, want)
	}
	var many []userrules.Diversion
	for i := range 2000 {
		peer := netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), 32)
		many = append(many, userrules.Diversion{Peers: []netip.Prefix{peer}, Ports: ports(5060)})
	}
	if got := merged(many); len(got) != 1 || len(got[0].Peers) != len(many) {
		t.Errorf("%d of %d are left", len(got), len(many))
	}
	for i := range many {
		many[i].Hosts, many[i].Peers = many[i].Peers, nil
	}
	if got := merged(many); len(got) != 1 || len(got[0].Hosts) != len(many) {
		t.Errorf("%d of %d are left", len(got), len(many))
	}
	for i := range many {
		many[i].Hosts, many[i].Peers, many[i].Ports = nil, many[i].Hosts, ports(uint16(i))
	}
	many = append(many, userrules.Diversion{Hosts: []netip.Prefix{host}, Peers: []netip.Prefix{one}, Ports: []userrules.PortRange{{First: 0, Last: 65535}}})
	kinds := merged(slices.Clone(many))
	if len(kinds) != mostDiversions {
		t.Errorf("%d kinds are left, want %d", len(kinds), mostDiversions)
	}
	for _, d := range many {
		from := netip.AddrPortFrom(d.Peers[0].Addr(), d.Ports[0].First)
		if !slices.ContainsFunc(kinds, func(k userrules.Diversion) bool { return k.Takes(host.Addr(), from) }) {
			t.Fatalf("nothing takes %s", from)
		}
	}
	if from := netip.AddrPortFrom(two.Addr(), 50000); slices.ContainsFunc(kinds, func(k userrules.Diversion) bool { return k.Takes(host.Addr(), from) }) {
		t.Errorf("a rule for all ports of another peer takes %s", from)
	}
}
