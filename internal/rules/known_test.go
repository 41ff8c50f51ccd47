package rules_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// replaceAddress gives wan0 another address, as a provider may while no daemon runs.
func (m *mapper) replaceAddress(with netip.Addr) {
	m.t.Helper()
	for _, args := range []string{
		"address del " + m.Gateway.Addr.String() + "/24 dev wan0",
		"address add " + with.String() + "/24 dev wan0",
		"route replace default via 198.51.100.254",
	} {
		_, err := m.Gateway.Output("ip", strings.Fields(args)...)
		check(m.t, err)
	}
}

var newAddress = netip.MustParseAddr("198.51.100.77")

// Both hosts have one mapping each, with and without the own port. There is no daemon.
func TestMappingsFollowALostAddress(t *testing.T) {
	for _, d := range []rules.Desired{
		mapping, hairpinning, withMapping(func(_ *rules.Desired, m *rules.MappingConfig) { m.Pools = nil }),
		withMapping(func(_ *rules.Desired, m *rules.MappingConfig) { m.Differ = []string{"wan0"} }),
	} {
		m := newMapper(t, lab.Options{Inside: 2}, d)
		one, two, peers := m.host(0, 3074), m.host(1, 4000), m.peers()
		if len(d.Mapping.Pools) > 0 && len(d.Mapping.Differ) == 0 {
			two = m.host(1, 3074)
		}
		m.maps(one, m.ext(3074), peers[0])
		m.contact(two, peers[0])
		check(t, m.kept().SetMasqueraded([]netip.Addr{m.Gateway.Addr}))
		m.replaceAddress(newAddress)
		for _, in := range []*lab.Socket{one, two} {
			ext := m.contact(in, peers[1])
			if ext.Addr() != newAddress || in == one && ext.Port() != 3074 {
				t.Errorf("%v leaves as %v", in.Addr(), ext)
			}
			m.maps(in, ext, peers[1:]...)
		}
		if all := m.mappings(); len(all) != 2 {
			t.Errorf("mappings: %v", all)
		}
		for _, set := range []string{"owned", "translated_wan0"} {
			if list := m.listSet("set", set); strings.Contains(list, m.Gateway.Addr.String()) {
				t.Error(list)
			}
		}
	}
}

// A rule names the address, which is away for a moment: both hosts keep their outside ports.
func TestMappingsOfAnAddressThatIsAwayStay(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2, Rules: strings.Replace(lab.Masquerade, "masquerade", "snat to 198.51.100.1", 1)}, mapping)
	hosts, proxy := []*lab.Socket{m.host(0, 3074), m.host(1, 3074)}, m.peer(lab.PeerA, 3074)
	exts := []netip.AddrPort{m.contact(hosts[0], proxy), m.contact(hosts[1], proxy)}
	check(t, m.kept().SetMasqueraded([]netip.Addr{m.Gateway.Addr}))
	check(t, m.kept().SetMasqueraded([]netip.Addr{newAddress}))
	m.replaceAddress(newAddress)
	other := m.peer(lab.PeerB, 3074)
	for i := range hosts {
		in := hosts[1-i]
		m.forget(in) // or the kernel would give it the port of that flow
		check(t, in.Send(other.Addr(), "x"))
		if from, err := other.Expect("x"); err != nil || from != exts[1-i] {
			t.Errorf("%v leaves as %v, want %v (%v)", in.Addr(), from, exts[1-i], err)
		}
	}
	m.holds(mapped(hosts[0], exts[0]), mapped(hosts[1], exts[1]))
}

// Somebody else on the Internet has the address now.
func TestNoHairpinToALostAddress(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, hairpinning)
	one, two, peer := m.host(0, 3074), m.host(1, 9), m.peer(lab.PeerA, 3074)
	m.maps(one, m.ext(3074), peer)
	check(t, m.kept().SetMasqueraded([]netip.Addr{m.Gateway.Addr}))
	m.replaceAddress(newAddress)
	_, err := m.Outside.Output("ip", "address", "add", m.Gateway.Addr.String()+"/32", "dev", "eth0")
	check(t, err)
	other := m.peer(m.Gateway.Addr, 3074)
	if got := m.contact(two, other); got != netip.AddrPortFrom(newAddress, 9) {
		t.Errorf("it leaves as %v", got)
	}
}

// An unanswered flow is older than the loss of its address. Its packets teach no mapping.
func TestFlowThatIsOlderThanItsAddressTeachesNothing(t *testing.T) {
	m := newMapper(t, lab.Options{Rules: strings.Replace(lab.Masquerade, "masquerade", "snat to 198.51.100.1", 1)}, mapping)
	in, peer := m.host(0, 3074), m.peer(lab.PeerA, 3074)
	check(t, in.Send(peer.Addr(), "first"))
	_, err := peer.Expect("first")
	check(t, err)
	check(t, m.kept().Revoke([]elements.Mapping{mapped(in, m.ext(3074))}))
	check(t, m.kept().SetMasqueraded([]netip.Addr{m.Gateway.Addr}))
	m.replaceAddress(newAddress)
	check(t, in.Send(peer.Addr(), "second"))
	if from, err := peer.Expect("second"); err != nil || from != m.ext(3074) {
		t.Errorf("from %v: %v", from, err)
	}
	m.holds()
}

func TestSetMasqueradedReplaces(t *testing.T) {
	m := newMapper(t, lab.Options{}, mapping)
	for _, as := range [][]string{{"192.0.2.1", "192.0.2.2"}, {"192.0.2.2", "192.0.2.3"}, {"192.0.2.2", "192.0.2.3"}, nil} {
		var addrs []netip.Addr
		for _, a := range as {
			addrs = append(addrs, netip.MustParseAddr(a))
		}
		check(t, m.kept().SetMasqueraded(addrs))
		list := m.listSet("set", elements.MasqueradedSet)
		for _, a := range []string{"192.0.2.1", "192.0.2.2", "192.0.2.3"} {
			if want := strings.Contains(strings.Join(as, " "), a); strings.Contains(list, a) != want {
				t.Errorf("after %v:\n%s", as, list)
			}
		}
	}
}
