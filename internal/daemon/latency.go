package daemon

import (
	"math"
	"math/bits"
	"time"
)

// subBuckets is how many buckets there are between a power of two and the next.
const subBuckets = 128

// A histogram counts durations in buckets of less than a hundredth of their value.
// The zero value is empty; recording allocates nothing.
type histogram struct {
	buckets [64 * subBuckets]uint64
	count   uint64
	max     time.Duration
}

// bucket returns the bucket of d.
func bucket(d time.Duration) int {
	n := uint64(max(d, subBuckets))
	shift := bits.Len64(n) - bits.Len64(subBuckets)
	return shift*subBuckets + int(n>>shift)
}

// bound returns the longest duration in bucket i.
func bound(i int) time.Duration {
	shift := i/subBuckets - 1
	return time.Duration((uint64(i-shift*subBuckets)+1)<<shift - 1)
}

func (h *histogram) record(d time.Duration) {
	h.buckets[bucket(d)]++
	h.count++
	h.max = max(h.max, d)
}

// quantile returns a bound that the share q of all durations does not exceed,
// at most a hundredth too high.
func (h *histogram) quantile(q float64) time.Duration {
	want := uint64(math.Ceil(q * float64(h.count)))
	var seen uint64
	for i, n := range h.buckets {
		if seen += n; n > 0 && seen >= want {
			return min(bound(i), h.max)
		}
	}
	return h.max
}
