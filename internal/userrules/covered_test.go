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
					f.Ports = append(f.Ports, cone.PortRange{First: a, Last: a + uint16(r.UintN(5))})
				}
			}
			for range r.IntN(3) {
				a, b := addr(), addr()
				if a.Compare(b) > 0 {
					a, b = b, a
				}
				if a.BitLen() == b.BitLen() {
					f.Addrs = append(f.Addrs, cone.AddrRange{First: a, Last: b})
				}
			}
			if r.IntN(2) == 0 {
				a := addr()
				f.Sources = cone.AddrRanges{{First: a, Last: a}}
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
				p.HostBits = 3
				p.Peer = p.Peer.WithoutLow(p.HostBits)
			}
			var leads cone.Forwarding
			for _, f := range all {
				if f.Covers(e) {
					leads = max(leads, leadsTo(f, p))
				}
			}
			if got := covered.Forwards(p); got != leads || covered.ConflictsWith(p) != (leads == cone.ForwardedElsewhere) {
				t.Fatalf("%v forwarded: %v, want %v, by %+v", p, got, leads, all)
			}
		}
		shuffled := slices.Clone(all)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if !covered.Equal(userrules.Cover(shuffled)) {
			t.Fatalf("another order, another value: %+v", all)
		}
		one := cone.PortRanges{{First: 50000, Last: 50000}}
		far := cone.AddrRanges{{First: netip.MustParseAddr("192.0.2.1"), Last: netip.MustParseAddr("192.0.2.1")}}
		if covered.Equal(userrules.Cover(append(shuffled, userrules.Forward{Ports: one, Addrs: far}))) {
			t.Fatal("one forward more, and the same value")
		}
	}
	var none *userrules.Covered
	if none.Covers(cone.EndpointFrom(netip.AddrPortFrom(addr(), 5060))) || !none.Equal(nil) {
		t.Error("nothing covers something")
	}
}

// leadsTo says where a forward of one source, or of all, may lead packets of peers of p.
func leadsTo(f userrules.Forward, p cone.Permission) cone.Forwarding {
	to := f.To
	if to.Port() == 0 {
		to = netip.AddrPortFrom(to.Addr(), p.Ext.Port)
	}
	switch {
	case f.Sources != nil && !p.Peers().Contains(f.Sources[0].First):
		return cone.NotForwarded
	case to == p.Int.Netip():
		return cone.ForwardedHere
	}
	return cone.ForwardedElsewhere
}

// Very many forwards of one port are one index. It gives the same answer as asking each forward.
//
// Fails when one of them is forgotten, takes packets of others, or leads elsewhere.
func TestManyForwardsOfAPortAreToldApart(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	addr := func() netip.Addr {
		n := r.Uint32N(500)
		if r.IntN(4) == 0 {
			return netip.AddrFrom16([16]byte{0: 0x20, 14: byte(n >> 8), 15: byte(n)})
		}
		return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0xcb007100+n)))
	}
	var times [3]int
	for range 20 {
		var all []userrules.Forward
		for range 65 + r.IntN(40) {
			f := userrules.Forward{Ports: cone.PortRanges{{First: 5060, Last: 5060 + uint16(r.UintN(2))}}}
			for range 1 + r.IntN(3) {
				a := addr()
				b := a
				for range r.IntN(4) {
					b = b.Next()
				}
				f.Sources = append(f.Sources, cone.AddrRange{First: a, Last: b})
			}
			if f.Sources = f.Sources.Merged(); r.IntN(4) > 0 {
				f.To = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 47, 11, byte(r.UintN(2))}), 5060)
			}
			all = append(all, f)
		}
		covered := userrules.Cover(all)
		for range 500 {
			e := cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), 5060+uint16(r.UintN(3))))
			in := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 47, 11, byte(r.UintN(2))}), 5060)
			p := cone.Permission{Key: cone.Key{Ext: e, Peer: cone.AddrFrom(addr())}, Int: cone.EndpointFrom(in)}
			if r.IntN(4) == 0 {
				p.HostBits = 3
				p.Peer = p.Peer.WithoutLow(p.HostBits)
			}
			var want cone.Forwarding
			for _, f := range all {
				for _, r := range f.Sources {
					switch {
					case !f.Covers(e) || !r.Has(p.Peers().Addr()) && !p.Peers().Contains(r.First):
					case f.To == in:
						want = max(want, cone.ForwardedHere)
					default:
						want = cone.ForwardedElsewhere
					}
				}
			}
			if got := covered.Forwards(p); got != want {
				t.Fatalf("%v forwarded: %v, want %v, by %+v", p, got, want, all)
			}
			times[want]++
		}
		shuffled := slices.Clone(all)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if !covered.Equal(userrules.Cover(shuffled)) {
			t.Fatal("another order, another value")
		}
	}
	if slices.Min(times[:]) < 100 {
		t.Errorf("each answer was right %v times", times)
	}
}

// Fails when forwards that would take too much work are forgotten, and when they are told apart at any
// cost.
func TestForwardsThatAreTooManyBarAll(t *testing.T) {
	var all []userrules.Forward
	for i := range uint16(4000) { // each is for more ports than the last
		a := netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)})
		all = append(all, userrules.Forward{
			Ports: cone.PortRanges{{First: 5000 - i, Last: 5000 + i}}, Sources: cone.AddrRanges{{First: a, Last: a}},
		})
	}
	covered := userrules.Cover(all)
	other := cone.AddrFrom(netip.MustParseAddr("192.0.2.1"))
	for port, want := range map[uint16]bool{5000: true, 5000 - 3990: false, 999: false} {
		ext := cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), port))
		if got := covered.ConflictsWith(cone.Permission{Key: cone.Key{Ext: ext, Peer: other}}); got != want {
			t.Errorf("port %d is barred for a peer of no forward: %v, want %v", port, got, want)
		}
	}
}

// The cost of asking 10,000 forwards matters when 50,000 permissions are checked.
func BenchmarkCovered(b *testing.B) {
	var all []userrules.Forward
	for i := range uint32(10_000) {
		a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0x0a600000+i)))
		all = append(all, userrules.Forward{Ports: cone.PortRanges{{First: uint16(i), Last: uint16(i)}}, Addrs: cone.AddrRanges{{First: a, Last: a}}})
	}
	covered := userrules.Cover(all)
	e := cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:5060"))
	for b.Loop() {
		if covered.Covers(e) {
			b.Fatal(e)
		}
	}
}
