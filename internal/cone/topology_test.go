package cone

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// longestMatch is what spans have to answer, route by route.
func longestMatch(routes []Route, a netip.Addr) bool {
	outside, bits := false, -1
	for _, r := range routes {
		if p := r.Prefix; p.Contains(a) && p.Bits() >= bits {
			outside = r.Outside && (p.Bits() > bits || outside)
			bits = p.Bits()
		}
	}
	return outside
}

func TestSpansAnswerByLongestMatch(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	addr := func() netip.Addr {
		n := r.Uint32N(64)
		edge := []uint32{0, 0xffffffff - 63, 0xc6336400}[r.IntN(3)]
		if r.IntN(3) == 0 {
			var b [16]byte
			switch r.IntN(3) {
			case 0:
				b[0] = 0x20
			case 1:
				for i := range b {
					b[i] = 0xff
				}
			}
			b[15] = byte(n) | b[15]&0xc0
			return netip.AddrFrom16(b)
		}
		return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, edge+n)))
	}
	for range 2000 {
		var routes []Route
		for range r.IntN(12) {
			a := addr()
			bits := a.BitLen() - r.IntN(8)
			if r.IntN(6) == 0 {
				bits = r.IntN(a.BitLen() + 1)
			}
			routes = append(routes, Route{netip.PrefixFrom(a, bits), r.IntN(2) == 0})
			if r.IntN(4) == 0 {
				routes = append(routes, Route{routes[0].Prefix, r.IntN(2) == 0})
			}
		}
		s := newSpans(routes)
		for range 200 {
			a := addr()
			if got, want := s.has(a), longestMatch(routes, a); got != want {
				t.Fatalf("%v outside: %v, want %v, by %v: %v", a, got, want, routes, s)
			}
		}
		r.Shuffle(len(routes), func(i, j int) { routes[i], routes[j] = routes[j], routes[i] })
		if again := newSpans(routes); !s.equal(again) {
			t.Fatalf("another order, another value: %v: %v, %v", routes, s, again)
		}
	}
}

// What a default route covers changes no answer, however many routes it is.
func TestSpansOfManyRoutesBehindADefaultAreFew(t *testing.T) {
	routes := []Route{{netip.MustParsePrefix("0.0.0.0/0"), true}}
	for i := range 1000 {
		routes = append(routes, Route{netip.MustParsePrefix(fmt.Sprintf("100.%d.%d.0/24", i/250, i%250)), true})
	}
	if s := newSpans(routes); len(s.v4) > 2 || len(s.v6) > 0 {
		t.Errorf("%v", s)
	}
}

func TestSetTopologyTellsWhetherFlowsWereMisjudged(t *testing.T) {
	m := New(testPolicy)
	outside := func(prefixes ...string) (top Topology) {
		for _, p := range prefixes {
			top.Routes = append(top.Routes, Route{netip.MustParsePrefix(p), true})
		}
		return top
	}
	see := func(id uint32, peer string) {
		m.FlowSeen(0, &Flow{
			ID: id, Status: StatusSrcNAT, Src: ep("10.47.11.109:5060"), Dst: ep(peer), ReplySrc: ep(peer), ReplyDst: ep("198.51.100.1:5060"),
		})
	}
	if m.SetTopology(0, outside("203.0.113.0/24")) {
		t.Error("without a flow")
	}
	see(1, "203.0.113.5:5060")
	if m.SetTopology(0, outside("203.0.113.0/25")) {
		t.Error("with a flow that was permitted")
	}
	see(2, "192.0.2.5:5060") // no route leads there yet
	if m.SetTopology(0, outside("203.0.113.0/25")) {
		t.Error("with the same routes")
	}
	if !m.SetTopology(0, outside("203.0.113.0/25", "192.0.2.0/24")) {
		t.Error("not with a flow that has a route now")
	}
	m.BeginSnapshot(0)
	m.EndSnapshot(0)
	if m.SetTopology(0, outside("203.0.113.0/25")) {
		t.Error("after a snapshot that showed no such flow")
	}
	m.BeginSnapshot(0)
	m.SnapshotFlow(0, &Flow{
		ID: 2, Status: StatusSrcNAT, Src: ep("10.47.11.109:5060"), Dst: ep("192.0.2.5:5060"),
		ReplySrc: ep("192.0.2.5:5060"), ReplyDst: ep("198.51.100.1:5060"),
	})
	m.EndSnapshot(0)
	if !m.SetTopology(0, outside("192.0.2.0/24")) {
		t.Error("not after a snapshot that showed one")
	}
}

func BenchmarkOutside(b *testing.B) {
	var routes []Route
	for i := range uint32(50_000) {
		a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0x64000000+i<<9)))
		routes = append(routes, Route{netip.PrefixFrom(a, 24), true})
	}
	b.Run("compile", func(b *testing.B) {
		for b.Loop() {
			newSpans(routes)
		}
	})
	s, a := newSpans(routes), netip.MustParseAddr("100.77.2.1")
	b.Run("ask", func(b *testing.B) {
		for b.Loop() {
			s.has(a)
		}
	})
}
