package userrules

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// Conditions without those of earlier rules have all packets that the rules do not let pass,
// and no others unless they are wide.
//
// Fails when a packet is lost, or left, in any of 20,000 random sequences of conditions.
func TestConditionsWithoutOthers(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	ports := []uint16{0, 1, 2, 53, 65534, 65535}
	v4 := []netip.Addr{netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("255.255.255.255")}
	v6 := []netip.Addr{netip.MustParseAddr("::"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")}
	pick := func(from []netip.Addr) (all cone.AddrRanges) {
		for range random.IntN(3) {
			a := random.IntN(len(from))
			all = append(all, cone.AddrRange{First: from[a], Last: from[a+random.IntN(len(from)-a)]})
		}
		return all.Merged()
	}
	some := func() (c condition) {
		c.family = []byte{unix.NFPROTO_INET, unix.NFPROTO_IPV4, unix.NFPROTO_IPV6}[random.IntN(3)]
		switch c.family {
		case unix.NFPROTO_IPV4:
			c.sources, c.addrs = pick(v4), pick(v4)
		case unix.NFPROTO_IPV6:
			c.sources, c.addrs = pick(v6), pick(v6)
		}
		for range random.IntN(3) {
			a := random.IntN(len(ports))
			c.ports = append(c.ports, cone.PortRange{First: ports[a], Last: ports[a+random.IntN(len(ports)-a)]})
		}
		c.ports = c.ports.Merged()
		c.in = [][]int{nil, nil, {1}, {2}}[random.IntN(4)]
		return c
	}
	links := []Link{{Index: 1}, {Index: 2}}
	has := func(c condition, in int, from, to netip.Addr, port uint16) bool {
		return (c.in == nil || slices.Contains(c.in, in)) && (c.family == unix.NFPROTO_INET || c.family == familyOf(netip.PrefixFrom(from, 0))) &&
			(c.sources == nil || c.sources.Has(from)) && (c.addrs == nil || c.addrs.Has(to)) && (c.ports == nil || c.ports.Has(port))
	}
	subtracted := 0
	for range 20000 {
		c := some()
		var earlier []condition
		for range 1 + random.IntN(4) {
			e := some()
			e.wide = random.IntN(8) == 0
			earlier = append(earlier, e)
		}
		w := walker{table: &table{family: unix.NFPROTO_INET}, outside: links}
		for _, e := range earlier {
			w.accepted.fresh = append(w.accepted.fresh, e)
			if random.IntN(2) == 0 {
				w.notPassed(nil)
			}
		}
		e, left := earlier, w.notPassed([]condition{c})
		for _, all := range [][]netip.Addr{v4, v6} {
			for _, from := range all {
				for _, to := range all {
					for i, port := range append(ports, 52, 54, 100) {
						in := 1 + i%2
						was, is, passed, wide := has(c, in, from, to, port), false, false, false
						for _, e := range earlier {
							passed = passed || has(e, in, from, to, port) && !e.wide
						}
						for _, x := range left {
							is, wide = is || has(x, in, from, to, port), wide || x.wide && has(x, in, from, to, port)
						}
						packet := fmt.Sprint(from, " to ", to, " port ", port, " by ", in)
						if was && !passed && !is {
							t.Fatalf("%s is lost: %+v without %+v is %+v", packet, c, e, left)
						}
						if is && (!was || passed && !wide) {
							t.Fatalf("%s is left: %+v without %+v is %+v", packet, c, e, left)
						}
						if was && !is {
							subtracted++
						}
					}
				}
			}
		}
	}
	if subtracted == 0 {
		t.Error("nothing was taken out")
	}
}
