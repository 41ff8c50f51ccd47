package rules

import (
	"slices"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
)

// Whatever the starting port, each try gives a port of the pool with the same parity, and
// no two tries give the same port.
func TestTriesAreInThePool(t *testing.T) {
	for _, pool := range []cone.PortRanges{
		{{First: 61000, Last: 65535}},
		{{First: 50000, Last: 59999}},
		{{First: 50000, Last: 50031}},
		{{First: 50001, Last: 50030}},
		{{First: 50000, Last: 50001}},
		{{First: 1, Last: 65535}},
		{{First: 2, Last: 3}, {First: 40000, Last: 40015}, {First: 30001, Last: 30001}},
		{{First: 50001, Last: 50001}},
		{{First: 50001, Last: 50002}},
	} {
		tries := poolTries(pool)
		if len(tries) == 0 || len(tries) > poolSteps {
			t.Errorf("%d tries in %v", len(tries), pool)
		}
		for first := range 1 << 16 {
			port, seen := uint16(first), []uint16{}
			for _, try := range tries {
				if try.mask == 0 && int(try.xor)&1 != first&1 {
					continue
				}
				port = port&try.mask ^ try.xor
				in := pool.Has(port)
				if !in || int(port)&1 != first&1 || slices.Contains(seen, port) {
					t.Fatalf("%d becomes %d in %v, after %v", first, port, pool, seen)
				}
				seen = append(seen, port)
			}
		}
	}
	var blocks cone.PortRanges // every 16th of 1,024, as MAP-E with an offset has them
	for first := 1 << 10; first < 1<<16; first += 1 << 10 {
		blocks = append(blocks, cone.PortRange{First: uint16(first + 64), Last: uint16(first + 79)})
	}
	tried := map[uint16]bool{}
	for _, try := range poolTries(blocks) {
		tried[try.xor&^15] = true
	}
	if len(tried) != len(blocks) {
		t.Errorf("ports of %d blocks of %d are tried", len(tried), len(blocks))
	}
	if tries := poolTries(nil); len(tries) > 0 {
		t.Errorf("%v without a pool", tries)
	}
}
