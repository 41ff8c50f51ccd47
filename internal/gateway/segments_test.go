package gateway

import (
	"maps"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// Packets of hosts come by bridges, and by links on top of others, whose segment is that of the link
// by which the gateway routes. A pair of veth that leads to another network namespace, or to another
// network of the gateway's, joins nothing.
//
// Fails when a link of another segment is among them: its hosts could fake inside addresses.
func TestSegments(t *testing.T) {
	for name, tc := range map[string]struct {
		commands []string
		want     map[string][]string
	}{
		"no links of this kind": {},
		"a bridge for a firewall": {
			[]string{
				"link add fwbr100 type bridge", "link add fwln100 master fwbr100 type veth peer name fwpr100", "link set fwpr100 master lan0",
				"link add fwbr101 type bridge", "link add fwln101 master fwbr101 type veth peer name fwpr101", "link set fwpr101 master lan0",
				"link add alone0 type bridge",
			},
			map[string][]string{"lan0": {"fwbr100", "fwbr101"}},
		},
		"bridges in a row": {
			[]string{
				"link add fwbr100 type bridge", "link add fwln100 master fwbr100 type veth peer name fwpr100",
				"link add mid0 type bridge", "link set fwpr100 master mid0", "link add mid0a master mid0 type veth peer name mid0b", "link set mid0b master lan0",
			},
			map[string][]string{"lan0": {"fwbr100", "mid0"}},
		},
		"no bridge behind it": {
			[]string{"link add fwbr100 type bridge", "link add fwln100 master fwbr100 type veth peer name end0", "addr add 10.60.0.1/24 dev end0"},
			map[string][]string{"end0": {"fwbr100"}},
		},
		"both are used": {
			[]string{"link add other0 type bridge", "link add other0a master other0 type veth peer name other0b", "link set other0b master lan0", "addr add 10.60.0.1/24 dev other0"},
			map[string][]string{"lan0": {"other0"}, "other0": {"lan0"}},
		},
		"a pair between two networks": {
			[]string{"link add one0 type veth peer name two0", "addr add 10.60.0.1/24 dev one0", "addr add 10.61.0.1/24 dev two0"}, nil,
		},
		"a pair to another namespace": {
			[]string{"addr flush dev guest0", "link set guest0 master lan0"}, nil,
		},
		"a link on top": {
			[]string{"link add vrrp0 link lan0 type macvlan", "link add vrrp1 link wan0 type macvlan", "addr add 10.60.0.1/24 dev vrrp1"},
			map[string][]string{"lan0": {"vrrp0"}, "vrrp1": {"wan0"}, "wan0": {"vrrp1"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := readNetwork(t, newGateway(t, tc.commands...)).Segments(); !maps.EqualFunc(got, tc.want, slices.Equal) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

// A bridge without a port passes no packet on, and the gateway routes by one with an address or a route.
//
// Fails when the address alone counts: a host behind such a bridge could fake the address of a peer.
func TestBridges(t *testing.T) {
	n := readNetwork(t, newGateway(t, "link add empty0 type bridge",
		"link add plain0 type bridge", "link add a0 master plain0 type veth peer name a1", "link add b0 master plain0 type veth peer name b1",
		"link add owned0 type bridge", "link add c0 master owned0 type veth peer name c1", "addr add 10.60.0.1/24 dev owned0",
		"link add routed0 type bridge", "link add d0 master routed0 type veth peer name d1", "link set routed0 up", "route add 10.61.0.0/24 dev routed0"))
	if got, want := n.Bridges(), []string{"plain0"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// A macvlan that came from another network namespace, as in a container, is on top of a link there,
// whatever link has the same index here. A VRF and a bond are no segments, and the ports of a bridge
// that filters VLANs may lead to different ones.
//
// Fails when only the index is compared, or any master joins.
func TestLinksThatJoinNoSegments(t *testing.T) {
	const lan, top = 3, 9
	for name, links := range map[string][]Link{
		"from another namespace": {{Index: lan, Name: "lan0"}, {Index: top, Name: "eth0", Kind: "macvlan", Lower: lan, Elsewhere: true}},
		"VRF":                    {{Index: lan, Name: "lan0", Master: 4}, {Index: top, Name: "lan1", Master: 4}, {Index: 4, Name: "red", Kind: "vrf"}},
		"VLANs": {
			{Index: lan, Name: "lan0", Kind: "bridge", VLANs: true},
			{Index: top, Name: "fwbr100", Kind: "bridge"},
			{Index: 5, Name: "fwln100", Kind: "veth", Lower: 6, Master: top},
			{Index: 6, Name: "fwpr100", Kind: "veth", Lower: 5, Master: lan},
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := Network{Links: links, Addrs: []Addr{{Prefix: lab.InsideNet, Link: lan}, {Prefix: lab.GuestNet, Link: top}}}
			if got := n.Segments(); len(got) > 0 {
				t.Errorf("got %v", got)
			}
		})
	}
}
