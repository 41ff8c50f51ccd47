package rules

import (
	"slices"
	"testing"
)

// Whatever the starting port, each try gives a port of the pool with the same parity, and
// no two tries give the same port.
func TestTriesAreInThePool(t *testing.T) {
	for _, pool := range [][]PortRange{
		{{61000, 65535}},
		{{50000, 59999}},
		{{50000, 50031}},
		{{50001, 50030}},
		{{50000, 50001}},
		{{1, 65535}},
		{{2, 3}, {40000, 40015}, {30001, 30001}},
		{{50001, 50001}},
		{{50001, 50002}},
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
				in := slices.ContainsFunc(pool, func(r PortRange) bool { return r.First <= port && port <= r.Last })
				if !in || int(port)&1 != first&1 || slices.Contains(seen, port) {
					t.Fatalf("%d becomes %d in %v, after %v", first, port, pool, seen)
				}
				seen = append(seen, port)
			}
		}
	}
	var blocks []PortRange // every 16th of 1,024, as MAP-E with an offset has them
	for first := 1 << 10; first < 1<<16; first += 1 << 10 {
		blocks = append(blocks, PortRange{First: uint16(first + 64), Last: uint16(first + 79)})
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
