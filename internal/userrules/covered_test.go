package userrules_test

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/userrules"
)

// The fast lookup gives the same answer as asking each forward.
func TestCoveredIsWhatAnyForwardCovers(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	addr := func() netip.Addr {
		n := r.Uint32N(40)
		if r.IntN(4) == 0 {
			return netip.AddrFrom16([16]byte{0: 0x20, 15: byte(n)})
		}
		return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0xc6336400+n)))
	}
	port := func() uint16 { return uint16(r.UintN(40)) }
	for range 300 {
		var all []userrules.Forward
		for range r.IntN(12) {
			f := userrules.Forward{All: r.IntN(8) == 0}
			for range r.IntN(4) {
				if a := port(); !f.All {
					f.Ports = append(f.Ports, userrules.PortRange{First: a, Last: a + uint16(r.UintN(5))})
				}
			}
			for range r.IntN(3) {
				a, b := addr(), addr()
				if a.Compare(b) > 0 {
					a, b = b, a
				}
				if a.BitLen() == b.BitLen() {
					f.Addrs = append(f.Addrs, userrules.AddrRange{First: a, Last: b})
				}
			}
			if r.IntN(2) == 0 {
				a := addr()
				f.Sources = []userrules.AddrRange{{First: a, Last: a}}
			}
			if r.IntN(2) == 0 {
				f.To = netip.AddrPortFrom(addr(), port()%3)
			}
			all = append(all, f)
		}
		covered := userrules.Cover(all)
		for range 300 {
			e := cone.EndpointFrom(netip.AddrPortFrom(addr(), port()))
			want := slices.ContainsFunc(all, func(f userrules.Forward) bool { return f.Covers(e) })
			if got := covered.Covers(e); got != want {
				t.Fatalf("%v covered: %v, want %v, by %+v", e, got, want, all)
			}
			p := cone.Permission{Key: cone.Key{Ext: e, Peer: cone.AddrFrom(addr())}, Int: cone.EndpointFrom(netip.AddrPortFrom(addr(), e.Port%3))}
			if r.IntN(4) == 0 {
				p.Wild = 3
				p.Peer = p.Peer.WithoutLow(p.Wild)
			}
			want = slices.ContainsFunc(all, func(f userrules.Forward) bool { return f.Covers(e) && bars(f, p) })
			if got := covered.ConflictsWith(p); got != want {
				t.Fatalf("%v barred: %v, want %v, by %+v", p, got, want, all)
			}
		}
		shuffled := slices.Clone(all)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if !covered.Equal(userrules.Cover(shuffled)) {
			t.Fatalf("another order, another value: %+v", all)
		}
		one := []userrules.PortRange{{First: 50000, Last: 50000}}
		far := []userrules.AddrRange{{First: netip.MustParseAddr("192.0.2.1"), Last: netip.MustParseAddr("192.0.2.1")}}
		if covered.Equal(userrules.Cover(append(shuffled, userrules.Forward{Ports: one, Addrs: far}))) {
			t.Fatal("one forward more, and the same value")
		}
	}
	var none *userrules.Covered
	if none.Covers(cone.EndpointFrom(netip.AddrPortFrom(addr(), 5060))) || !none.Equal(nil) {
		t.Error("nothing covers something")
	}
}

// bars asks peer by peer.
func bars(f userrules.Forward, p cone.Permission) bool {
	to := f.To
	if to.Port() == 0 {
		to = netip.AddrPortFrom(to.Addr(), p.Ext.Port)
	}
	if to == p.Int.Netip() {
		return false
	}
	return f.Sources == nil || p.Peers().Contains(f.Sources[0].First)
}

// Fails when takers of a port beyond the limit are forgotten.
func TestManyTakersOfAPortBarAll(t *testing.T) {
	at := func(n int) cone.Addr { return cone.AddrFrom4([4]byte{203, 0, 113, byte(n)}) }
	p := cone.Permission{Key: cone.Key{Ext: cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:5060")), Peer: at(200)}}
	var all []userrules.Forward
	for i := range 100 {
		a := at(i).Netip()
		all = append(all, userrules.Forward{All: true, Sources: []userrules.AddrRange{{First: a, Last: a}}})
		if got, want := userrules.Cover(all).ConflictsWith(p), i >= 64; got != want {
			t.Fatalf("%d forwards for others bar: %v, want %v", i+1, got, want)
		}
	}
}

// The cost of asking 10,000 forwards matters when 50,000 permissions are checked.
func BenchmarkCovered(b *testing.B) {
	var all []userrules.Forward
	for i := range uint32(10_000) {
		a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0x0a600000+i)))
		all = append(all, userrules.Forward{Ports: []userrules.PortRange{{First: uint16(i), Last: uint16(i)}}, Addrs: []userrules.AddrRange{{First: a, Last: a}}})
	}
	covered := userrules.Cover(all)
	e := cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:5060"))
	for b.Loop() {
		if covered.Covers(e) {
			b.Fatal(e)
		}
	}
}
