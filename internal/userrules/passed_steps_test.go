package userrules

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
)

// Fails when subtracting many addresses from few costs more than those that are near.
func TestDifferenceOfFewCostsLittle(t *testing.T) {
	one := func(n int) cone.AddrRange {
		a := netip.AddrFrom4([4]byte{10, byte(n >> 15), byte(n >> 7), byte(n << 1)})
		return cone.AddrRange{First: a, Last: a}
	}
	var many cone.AddrRanges
	for n := range 10_000 {
		many = append(many, one(n))
	}
	var s subtraction
	for n := range many {
		left, some, ok := s.except(cone.AddrRanges{one(n)}, many)
		if len(left) != 0 || !some || !ok {
			t.Fatalf("%v without itself is %v", one(n), left)
		}
		between := cone.AddrRange{First: one(n).First.Next(), Last: one(n).First.Next()}
		if left, some, ok = s.except(cone.AddrRanges{between}, many); len(left) != 1 || some || !ok {
			t.Fatalf("%v without others is %v", between, left)
		}
	}
	if s.steps > 4*len(many) {
		t.Errorf("%d steps for %d addresses", s.steps, len(many))
	}
}
