package cone

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// Fails when the number of an inner prefix counts although the prefix around it comes
// first.
func TestPrefixTableFindsTheFirstThatHoldsAnAddress(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 1))
	four := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(r.UintN(2)), byte(r.UintN(16))}) }
	six := func() netip.Addr {
		return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 7: byte(r.UintN(2)), 15: byte(r.UintN(16))})
	}
	for range 2000 {
		var prefixes []netip.Prefix
		for range r.IntN(8) {
			p := netip.PrefixFrom(four(), 22+r.IntN(11))
			if r.IntN(2) == 0 {
				p = netip.PrefixFrom(six(), []int{0, 55, 63, 64, 65, 124, 128}[r.IntN(7)])
			}
			prefixes = append(prefixes, p.Masked())
		}
		table := NewPrefixTable(prefixes)
		for range 20 {
			for _, a := range []netip.Addr{four(), six()} {
				want := slices.IndexFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
				if got := table.Find(a); got != want {
					t.Fatalf("%v is in number %d of %v, want %d", a, got, prefixes, want)
				}
			}
		}
	}
}

// manyPrefixes returns n prefixes of 24 bits from first on.
func manyPrefixes(first uint32, n int) (all []netip.Prefix) {
	for i := range uint32(n) {
		a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, first+i<<8)))
		all = append(all, netip.PrefixFrom(a, 24))
	}
	return all
}

func BenchmarkManyGroupsAndSubnets(b *testing.B) {
	p := testPolicy
	p.Mapped, p.PeerGroups, p.Subnets = true, manyPrefixes(0x64000000, 20_000), nil
	for _, s := range manyPrefixes(0x0a000000, 10_000) {
		p.Subnets = append(p.Subnets, Subnet{Prefix: s})
	}
	m := New(p)
	m.SetTopology(0, testTopology)
	f := &Flow{
		ID: 1, Status: StatusSrcNAT, Src: ep("10.39.15.9:5060"), ReplyDst: ep("198.51.100.1:5060"),
		Dst: ep("100.78.31.5:5060"), ReplySrc: ep("100.78.31.5:5060"),
	}
	b.Run("flow", func(b *testing.B) {
		for b.Loop() {
			m.FlowSeen(0, f)
		}
	})
	for i := range uint32(36_000) {
		g := *f
		g.ID, g.Src.Port, g.ReplyDst.Port = i+1, uint16(1024+i), uint16(1024+i)
		m.FlowSeen(0, &g)
	}
	b.Run("reload with 36,000 permissions", func(b *testing.B) {
		for b.Loop() {
			m.SetPolicy(0, p)
		}
	})
}
