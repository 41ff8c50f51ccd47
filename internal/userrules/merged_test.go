package userrules

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
)

// Many rules become few: by their ports, by their peers, and by their hosts. What takes from all peers, or from
// all hosts, stays apart, and so does what takes most ports.
//
// Fails when rules of different hosts, or of different ports and peers, are mixed, and when more
// than mostDiversions kinds lose one.
func TestDiversionsAreMerged(t *testing.T) {
	one, two, host := addr("203.0.113.5"), addr("203.0.113.7"), addr("10.47.11.109")
	ports := func(all ...uint16) (ranges cone.PortRanges) {
		for _, p := range all {
			ranges = append(ranges, cone.PortRange{First: p, Last: p})
		}
		return ranges
	}
	got := MergedDiversions([]Diversion{
		{Peers: one, Ports: ports(5070)},
		{Peers: one, Ports: ports(5060, 5070)},
		{Peers: two, Ports: ports(5060, 5070)},
		{Ports: ports(5060, 5070)},
		{Hosts: host, Peers: one, Ports: ports(5060, 5070)},
		{Peers: two, Ports: ports(53)},
	})
	want := "[{[] [{203.0.113.5 203.0.113.5}] [{5060 5060} {5070 5070}] } " +
		"{[] [{203.0.113.7 203.0.113.7}] [{53 53} {5060 5060} {5070 5070}] } " +
		"{[] [] [{5060 5060} {5070 5070}] } " +
		"{[{10.47.11.109 10.47.11.109}] [{203.0.113.5 203.0.113.5}] [{5060 5060} {5070 5070}] }]"
	if fmt.Sprint(got) != want {
		t.Errorf("got  %v\nwant %s", got, want)
	}
	var many []Diversion
	for i := range 2000 {
		peer := addr(fmt.Sprintf("203.%d.%d.1", i>>8, i&0xff))
		many = append(many, Diversion{Peers: peer, Ports: ports(5060)})
	}
	if got := MergedDiversions(many); len(got) != 1 || len(got[0].Peers) != len(many) {
		t.Errorf("%d of %d are left", len(got), len(many))
	}
	for i := range many {
		many[i].Hosts, many[i].Peers = many[i].Peers, nil
	}
	if got := MergedDiversions(many); len(got) != 1 || len(got[0].Hosts) != len(many) {
		t.Errorf("%d of %d are left", len(got), len(many))
	}
	for i := range many {
		many[i].Hosts, many[i].Peers, many[i].Ports = nil, many[i].Hosts, ports(uint16(i))
	}
	many = append(many, Diversion{Hosts: host, Peers: one, Ports: cone.PortRanges{{First: 0, Last: 65535}}})
	kinds := MergedDiversions(slices.Clone(many))
	if len(kinds) != mostDiversions {
		t.Errorf("%d kinds are left, want %d", len(kinds), mostDiversions)
	}
	for _, d := range many {
		from := netip.AddrPortFrom(d.Peers[0].First, d.Ports[0].First)
		if !slices.ContainsFunc(kinds, func(k Diversion) bool { return k.Takes(host[0].First, from) }) {
			t.Fatalf("nothing takes %s", from)
		}
	}
	if from := netip.AddrPortFrom(two[0].First, 50000); slices.ContainsFunc(kinds, func(k Diversion) bool { return k.Takes(host[0].First, from) }) {
		t.Errorf("a rule for all ports of another peer takes %s", from)
	}
}

// Many rules for different hosts that are behind one long list share it. If there are too many
// ranges, the rules of the longest lists are for all peers, and the others stay as they are.
//
// Fails when a list is copied for each rule, and when the ranges have no bound.
func TestDiversionsShareLongLists(t *testing.T) {
	list := func(n int) (all cone.AddrRanges) {
		for i := range n {
			all = append(all, addr(fmt.Sprintf("11.%d.%d.1", i>>8, i&0xff))...)
		}
		return all
	}
	long, longest, short := list(mostDiverted/2), list(mostDiverted/2+1), list(3)
	var many []Diversion
	for i := range 200 {
		many = append(many, Diversion{Hosts: addr(fmt.Sprintf("10.47.%d.9", i)), Peers: long, Ports: cone.PortRanges{{First: uint16(i), Last: uint16(i)}}})
	}
	for _, d := range MergedDiversions(slices.Clone(many)) {
		if len(d.Peers) != len(long) || &d.Peers[0] != &long[0] {
			t.Fatalf("%v of %v has another list, with %d peers", d.Ports, d.Hosts, len(d.Peers))
		}
	}
	for i, peers := range []cone.AddrRanges{longest, short} {
		many = append(many, Diversion{Peers: peers, Ports: cone.PortRanges{{First: uint16(1000 + i), Last: uint16(1000 + i)}}})
	}
	for _, d := range MergedDiversions(many) {
		want := len(long)
		switch d.Ports[0].First {
		case 1000:
			want = 0
		case 1001:
			want = len(short)
		}
		if len(d.Peers) != want {
			t.Fatalf("%v has %d peers, want %d", d.Ports, len(d.Peers), want)
		}
	}
}

func addr(s string) cone.AddrRanges {
	a := netip.MustParseAddr(s)
	return cone.AddrRanges{{First: a, Last: a}}
}
