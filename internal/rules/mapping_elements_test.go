package rules_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

func TestKeepRefusesWhatAnotherMappingHas(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	one, two := m.host(0, 3074), m.host(1, 3074)
	p := mapped(one, m.ext(3074))
	q := mapped(one, m.ext(4000)) // it has another outside endpoint
	r := mapped(two, m.ext(3074)) // it has another owner
	s := mapped(two, m.ext(5000))
	k := m.kept()
	k.Keep([]elements.Mapping{p}, func(_ int, err error) { t.Error(err) })
	k.SetLifetime(time.Hour)
	for range 2 { // the second time they stand already
		var refused []int
		k.Keep([]elements.Mapping{q, p, r, s}, func(i int, err error) {
			refused = append(refused, i)
			if !errors.Is(err, elements.ErrOtherMapping) {
				t.Error(i, err)
			}
		})
		if fmt.Sprint(refused) != "[0 2]" {
			t.Errorf("refused %v", refused)
		}
		m.holds(p, s)
		for p, left := range m.mappings() {
			if left < 59*time.Minute {
				t.Errorf("%v has %v left", p, left)
			}
		}
	}
	// The rules use the elements that were added: port 5000 of host two, and its owner.
	peer := m.peer(lab.PeerA, 1)
	m.maps(two, m.ext(5000), peer)
	m.maps(m.host(0, 5001), m.ext(5001), peer) // the outside address is known now
	if ext := m.contact(m.host(0, 5000), peer); !inPool(ext) {
		t.Errorf("an owned port was given away: %v", ext)
	}

	check(t, k.Revoke([]elements.Mapping{p, s, p}))
	if all := m.mappings(); len(all) != 2 {
		t.Errorf("mappings: %v", all)
	}
	if list := m.listSet("set", "owned"); strings.Contains(list, "3074") || strings.Contains(list, "5000 timeout") {
		t.Error(list)
	}
}

func TestTakeKeepsAMappingFromBeingUsed(t *testing.T) {
	m := newMapper(t, lab.Options{}, mapping)
	peers := m.peers()
	in := m.host(0, 3074)
	m.maps(in, m.ext(3074), peers[0])
	taken := []elements.Taken{{Remote: cone.EndpointFrom(peers[1].Addr()), Port: 3074}}
	for range 2 {
		check(t, m.kept().Take(taken))
	}
	m.maps(in, m.ext(3074), peers[1:]...)
	if c := count(t, m.tables); c.LeftToRules != 1 {
		t.Errorf("%+v", c)
	}
}

// The address of the link changes.
func TestForgetEndsAllOfAnOutsideAddress(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	one, two, peer := m.host(0, 3074), m.host(1, 3074), m.peer(lab.PeerA, 1)
	m.contact(one, peer)
	m.contact(two, peer)
	k := m.kept()
	check(t, k.Forget(netip.MustParseAddr("198.51.100.3")))
	if all := m.mappings(); len(all) != 2 {
		t.Errorf("mappings: %v", all)
	}
	unanswered := m.peer(lab.PeerB, 1)
	send := func() {
		t.Helper()
		if _, err := one.Contact(unanswered); err != nil {
			t.Error(err)
		}
	}
	send()
	const second = "198.51.100.2"
	output(t, m.Lab, "ip", "address", "add", second+"/24", "dev", "wan0")
	output(t, m.Lab, "ip", "address", "del", m.Gateway.Addr.String()+"/24", "dev", "wan0")
	output(t, m.Lab, "ip", "address", "replace", second+"/24", "dev", "wan0")
	output(t, m.Lab, "ip", "route", "replace", "default", "via", "198.51.100.254")
	if _, err := m.Outside.Output("ip", "neigh", "add", second, "lladdr", "02:47:c6:33:64:01", "dev", "eth0", "nud", "permanent"); err != nil {
		t.Fatal(err)
	}
	check(t, k.Forget(m.Gateway.Addr))
	send() // by the flow that there is
	m.holds()
	check(t, k.Return(m.Gateway.Addr))
	send()
	m.holds(mapped(one, m.ext(3074)))
	check(t, k.Forget(m.Gateway.Addr))
	for _, set := range []string{"map addresses_wan0", "set translated_wan0", "set owned"} {
		kind, name, _ := strings.Cut(set, " ")
		if list := m.listSet(kind, name); strings.Contains(list, "elements") {
			t.Error(list)
		}
	}
	check(t, m.Flush())
	m.maps(one, netip.AddrPortFrom(netip.MustParseAddr(second), 3074), peer)
	if ext := m.contact(two, peer); ext.Addr().String() != second || !inPool(ext) {
		t.Errorf("the second host got %v", ext)
	}
	check(t, k.Forget(netip.Addr{}))
	m.holds()
}

// A host's packet makes a mapping on another address in the place of one on a lost address, which is
// about to end.
//
// Fails when the host's next flow gets another port, because somebody seems to own the old one.
func TestAMappingMadeMeanwhileLeavesNoPortBehind(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	one, two, peers := m.host(0, 3074), m.host(1, 5000), []*lab.Socket{m.peer(lab.PeerA, 1), m.peer(lab.PeerB, 1)}
	m.contact(one, peers[0])
	m.contact(two, peers[0])
	check(t, m.kept().RevokeLost([]elements.Mapping{mapped(one, netip.MustParseAddrPort("198.51.100.9:3074"))}))
	m.holds(mapped(two, m.ext(5000)))
	m.maps(one, m.ext(3074), peers[1])
	if list := m.listSet("set", "owned"); !strings.Contains(list, "5000 timeout") {
		t.Error(list)
	}
}

func TestKeepAndTakeDoNotAllocate(t *testing.T) {
	m := newMapper(t, lab.Options{}, mapping)
	refused := func(i int, err error) { t.Fatal(i, err) }
	k := m.kept()
	for _, n := range []int{1, 256, 600} { // 600 is three batches
		var ms []elements.Mapping
		var flows []elements.Taken
		for i := range n {
			e := cone.EndpointFrom(netip.AddrPortFrom(m.Inside(0).Addr, uint16(1000+i)))
			ms = append(ms, elements.Mapping{Link: "wan0", Int: e, Ext: cone.EndpointFrom(m.ext(e.Port))})
			flows = append(flows, elements.Taken{Remote: e, Port: e.Port})
		}
		if got := testing.AllocsPerRun(20, func() {
			k.Keep(ms, refused)
			if err := errors.Join(k.Take(flows), k.Revoke(ms)); err != nil {
				t.Fatal(err)
			}
		}); got != 0 {
			t.Errorf("%v allocations for %d mappings", got, n)
		}
	}
}

// A daemon that starts knows mappings from flows that the kernel's rules have not seen.
func TestTeachTellsOnWhichAddressTheirPoolIs(t *testing.T) {
	for name, tc := range map[string]struct {
		more  []string // further outside addresses of the link
		teach bool
		moved bool
	}{
		"not taught":        {nil, false, false},
		"one address":       {nil, true, true},
		"several addresses": {[]string{"198.51.100.77"}, true, false}, // which one is the newcomer's?
	} {
		t.Run(name, func(t *testing.T) {
			m := newMapper(t, lab.Options{Inside: 2}, mapping)
			one, two := m.Inside(0).Addr, m.host(1, 3074)
			ms := []elements.Mapping{{
				Link: "wan0", Int: cone.EndpointFrom(netip.AddrPortFrom(one, 3074)), Ext: cone.EndpointFrom(m.ext(3074)),
			}}
			m.kept().Keep(ms, func(_ int, err error) { t.Fatal(err) })
			for _, a := range tc.more {
				ms = append(ms, elements.Mapping{
					Link: "wan0", Int: cone.EndpointFrom(netip.AddrPortFrom(one, 3075)),
					Ext: cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr(a), 3075)),
				})
			}
			if tc.teach {
				check(t, m.kept().Teach(ms))
				check(t, m.kept().Teach(ms)) // again, it changes nothing
			}
			if list := m.listSet("set", "translated_wan0"); strings.Contains(list, "198.51.100.1") != tc.teach {
				t.Error(list)
			}
			if ext := m.contact(two, m.peer(lab.PeerA, 3074)); inPool(ext) != tc.moved {
				t.Errorf("the newcomer leaves as %v", ext)
			}
		})
	}
}

// A flow that is older than its mapping may have another outside endpoint. It does not
// become the owner of that endpoint.
func TestAnOlderFlowOwnsNothing(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	one, two, peer := m.host(0, 3074), m.host(1, 3074), m.peer(lab.PeerA, 1)
	m.maps(one, m.ext(3074), peer)
	old, err := two.Contact(peer) // not answered: each packet of it meets the rules
	check(t, err)
	check(t, m.kept().Forget(m.Gateway.Addr))
	check(t, m.kept().Return(m.Gateway.Addr))
	ext := netip.AddrPortFrom(netip.MustParseAddr("198.51.100.77"), old.Port())
	m.kept().Add([]elements.Mapping{mapped(two, ext)}, func(_ int, err error) { t.Error(err) })
	if again, err := two.Contact(peer); again != old || err != nil {
		t.Error(again, err)
	}
	m.holds(mapped(two, ext))
	if list := m.listSet("set", "owned"); strings.Contains(list, m.Gateway.Addr.String()+" .") {
		t.Error(list)
	}
}
