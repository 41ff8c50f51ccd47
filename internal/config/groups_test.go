package config

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// Fails when a prefix is compared with the previous one, although that does not contain it.
func TestGroupsAreComparedWithAllThatTheyMayOverlap(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 1))
	some := func(n int) (all []netip.Prefix) {
		for range r.IntN(n) {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, byte(r.UintN(4)), byte(r.UintN(256))}), 21+r.IntN(12))
			if r.IntN(4) == 0 {
				p = netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: byte(r.UintN(16))}), 120+r.IntN(9))
			}
			all = append(all, p.Masked())
		}
		return all
	}
	bad := 0
	for range 3000 {
		c := Config{PeerGroups: some(4), ExcludePeers: some(5)}
		for _, p := range some(3) {
			c.Subnets = append(c.Subnets, Subnet{Prefix: p})
		}
		want := false
		for i, g := range c.PeerGroups {
			want = want || slices.ContainsFunc(c.PeerGroups[:i], g.Overlaps) || slices.ContainsFunc(c.ExcludePeers, g.Overlaps) ||
				slices.ContainsFunc(c.Subnets, func(s Subnet) bool { return g.Overlaps(s.Prefix) })
		}
		if err := c.checkGroups(); (err != nil) != want {
			t.Fatalf("groups %v, excluded %v, subnets %v: %v", c.PeerGroups, c.ExcludePeers, c.Subnets, err)
		}
		if want {
			bad++
		}
	}
	if bad < 500 || bad > 2500 {
		t.Errorf("%d of 3000 overlap", bad)
	}
}

func BenchmarkCheckManyGroups(b *testing.B) {
	var c Config
	for i := range uint32(20_000) {
		a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0x64000000+i<<8)))
		c.PeerGroups = append(c.PeerGroups, netip.PrefixFrom(a, 24))
		x := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0x0a000000+i<<8)))
		c.ExcludePeers = append(c.ExcludePeers, netip.PrefixFrom(x, 24))
	}
	for b.Loop() {
		if _, err := c.check(); err != nil {
			b.Fatal(err)
		}
	}
}
