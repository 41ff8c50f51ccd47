package rules

import (
	"cmp"
	"math/bits"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
)

// Each of the lowest bits of an inside address, if set, changes the first port to try by
// its mixer. Mixers are even, so an odd port stays odd.
var mixers = [...]uint16{0x0d3a, 0x0b56, 0x0e9c, 0x07e2, 0x1a64, 0x0c8e, 0x13d8, 0x0f12, 0x09b4, 0x1466}

// poolSteps is how many ports of the pool are tried for a newcomer: with half of the pool
// in use, one newcomer in 256 finds no port. For a pool of many small blocks (MAP-E) one
// port of each of the largest blocks is tried, up to mostSteps.
const poolSteps, mostSteps = 8, 64

// A poolTry makes a port of the pool from a hash, or from the port that was tried before:
// it keeps the bits of mask and flips those of xor. With mask 0 it makes the single port
// xor, for newcomers with the parity of xor only.
type poolTry struct{ mask, xor uint16 }

// A block is a part of the pool. Its size is a power of two, and it begins at a multiple of
// it.
type block struct{ first, size, tries int }

// poolTries returns the ports to try, in order. Each block gets tries in proportion to its
// size.
func poolTries(pool cone.PortRanges) (all []poolTry) {
	blocks := blocksOf(pool)
	size := 0
	for _, b := range blocks {
		size = max(size, b.size)
	}
	large := len(slices.DeleteFunc(slices.Clone(blocks), func(b block) bool { return b.size < size }))
	for range max(poolSteps, min(large, mostSteps)) {
		var best *block
		for i := range blocks {
			b := &blocks[i]
			// Half of the ports of a block have the parity that a newcomer needs.
			if b.tries < max(1, b.size/2) && (best == nil || b.size*(best.tries+1) > best.size*(b.tries+1)) {
				best = b
			}
		}
		if best != nil {
			best.tries++
		}
	}
	slices.SortStableFunc(blocks, func(a, b block) int { return cmp.Compare(b.size, a.size) }) // the largest keep most bits of the hash
	for _, b := range blocks {
		last := 0
		for i := range b.tries {
			const step = 2 * 723 // twice an odd number, so no two tries are the same
			at := i * step & (b.size - 1)
			all = append(all, poolTry{uint16(b.size - 1), uint16(b.first | (at ^ last))})
			last = at
		}
	}
	return all
}

// blocksOf splits the pool into blocks.
func blocksOf(pool cone.PortRanges) (blocks []block) {
	for _, r := range pool {
		for first, end := int(r.First), int(r.Last)+1; first < end; {
			size := 1 << (bits.Len(uint(end-first)) - 1)
			if first > 0 {
				size = min(size, first&-first)
			}
			blocks = append(blocks, block{first: first, size: size})
			first += size
		}
	}
	return blocks
}

// largest returns the largest range of the pool.
func largest(pool cone.PortRanges) cone.PortRange {
	return slices.MaxFunc(pool, func(a, b cone.PortRange) int { return cmp.Compare(a.Last-a.First, b.Last-b.First) })
}
