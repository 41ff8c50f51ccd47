//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"cmp"
	"math/bits"
	"slices"
)

// mixers are what each of the lowest bits of an inside address changes in the port that
// it is given first. They are even: an odd port stays odd.
var mixers = [...]uint16{0x0d3a, 0x0b56, 0x0e9c, 0x07e2, 0x1a64, 0x0c8e, 0x13d8, 0x0f12, 0x09b4, 0x1466}

// poolSteps are how many ports of the pool are looked at for a newcomer: with half of
// the pool owned one in 256 finds none. Of a pool that is many small blocks (MAP-E) there is
// one in each of the largest, up to mostSteps.
const poolSteps, mostSteps = 8, 64

// A poolTry makes a port of the pool from a hash, or from the port that was tried
// before: it takes the bits of mask from that, and changes those of xor. Without mask it is
// for newcomers with the parity of xor alone.
type poolTry struct{ mask, xor uint16 }

// A block is a part of the pool that begins at a multiple of its size, a power of two.
type block struct{ first, size, tries int }

// poolTries returns what is tried, in order. The blocks of the pool have a share in it
// as large as they are.
func poolTries(pool []PortRange) (all []poolTry) {
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
			// There is one port of a parity in two.
			if b.tries < max(1, b.size/2) && (best == nil || b.size*(best.tries+1) > best.size*(b.tries+1)) {
				best = b
			}
		}
		if best != nil {
			best.tries++
		}
	}
	slices.SortStableFunc(blocks, func(a, b block) int { return cmp.Compare(b.size, a.size) }) // what has many bits comes first
	for _, b := range blocks {
		last := 0
		for i := range b.tries {
			const step = 2 * 723 // times an odd number, so that no two are the same
			at := i * step & (b.size - 1)
			all = append(all, poolTry{uint16(b.size - 1), uint16(b.first | (at ^ last))})
			last = at
		}
	}
	return all
}

// blocksOf takes the pool apart.
func blocksOf(pool []PortRange) (blocks []block) {
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
func largest(pool []PortRange) PortRange {
	return slices.MaxFunc(pool, func(a, b PortRange) int { return cmp.Compare(a.Last-a.First, b.Last-b.First) })
}
