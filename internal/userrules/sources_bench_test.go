package userrules_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// prefixesIn writes a set of n prefixes that do not touch.
func prefixesIn(n int) string {
	var s strings.Builder
	a := netip.MustParseAddr("11.0.0.0").As4()
	for i := range n {
		a[1], a[2], a[3] = byte(i>>15), byte(i>>7), byte(i<<1)
		fmt.Fprintf(&s, "%v/32,", netip.AddrFrom4(a))
	}
	return "set them { type ipv4_addr; flags interval; elements = { " + s.String() + " }; }; "
}

// Ten forwards for the prefixes of one set. A change elsewhere makes the reader look whether the set is
// the same.
func BenchmarkForwardsForManySources(b *testing.B) {
	for _, n := range []int{1000, 20_000} {
		var rules strings.Builder
		for port := range 10 {
			fmt.Fprintf(&rules, "ip saddr @them udp dport %d dnat to 10.47.11.%d; ", 5060+port, 100+port)
		}
		l := lab.ForTest(b, lab.Options{Rules: inPrerouting(prefixesIn(n) + "@@ " + rules.String() + "}")})
		r := newReader(b, l)
		if _, err := r.Read(); err != nil {
			b.Fatal(err)
		}
		links := []userrules.Link{{Index: 2, Name: "wan0"}}
		b.Run(fmt.Sprint(n, "/same"), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				if err := l.NFT("table ip other { chain c { }; }; delete table ip other"); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				if _, err := r.Read(); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprint(n, "/first"), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				r := newReader(b, l)
				b.StartTimer()
				if _, err := r.Read(); err != nil {
					b.Fatal(err)
				}
			}
		})
		rs, err := r.Read()
		if err != nil {
			b.Fatal(err)
		}
		var all []userrules.Forward
		b.Run(fmt.Sprint(n, "/forwards"), func(b *testing.B) {
			for b.Loop() {
				all = rs.Forwards(links)
			}
		})
		b.Run(fmt.Sprint(n, "/cover"), func(b *testing.B) {
			for b.Loop() {
				userrules.Cover(all)
			}
		})
	}
}
