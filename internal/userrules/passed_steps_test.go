package userrules

import (
	"net/netip"
	"testing"
)

// Fails when subtracting many addresses from few costs more than those that are near.
func TestDifferenceOfFewCostsLittle(t *testing.T) {
	one := func(n int) AddrRange {
		a := netip.AddrFrom4([4]byte{10, byte(n >> 15), byte(n >> 7), byte(n << 1)})
		return AddrRange{a, a}
	}
	var many []AddrRange
	for n := range 10_000 {
		many = append(many, one(n))
	}
	var s subtraction
	for n := range many {
		left, some, ok := s.except([]AddrRange{one(n)}, many)
		if len(left) != 0 || !some || !ok {
			t.Fatalf("%v without itself is %v", one(n), left)
		}
		between := AddrRange{one(n).First.Next(), one(n).First.Next()}
		if left, some, ok = s.except([]AddrRange{between}, many); len(left) != 1 || some || !ok {
			t.Fatalf("%v without others is %v", between, left)
		}
	}
	if s.steps > 4*len(many) {
		t.Errorf("%d steps for %d addresses", s.steps, len(many))
	}
}
