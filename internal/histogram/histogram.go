package histogram

import (
	"math"
	"math/bits"
	"time"
)

// subBuckets is how many buckets there are between a power of two and the next.
const subBuckets = 128

// A Histogram counts durations in buckets of less than a hundredth of their value.
// The zero value is empty; recording allocates nothing.
type Histogram struct {
	buckets [64 * subBuckets]uint64
	Count   uint64        // of all durations
	Max     time.Duration // the longest one
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

// Record counts d.
func (h *Histogram) Record(d time.Duration) {
	h.buckets[bucket(d)]++
	h.Count++
	h.Max = max(h.Max, d)
}

// Sum returns the sum of all durations, at most a hundredth too high. It is computed here so
// that Record stays cheap.
func (h *Histogram) Sum() (d time.Duration) {
	for i, n := range h.buckets {
		if n > 0 {
			d += time.Duration(n) * min(bound(i), h.Max)
		}
	}
	return d
}

// UpTo returns how many durations are at most d. It may leave out those within a hundredth
// of d.
func (h *Histogram) UpTo(d time.Duration) (n uint64) {
	for i := bucket(0); i < len(h.buckets) && bound(i) <= d; i++ {
		n += h.buckets[i]
	}
	return n
}

// Quantile returns a bound that the share q of all durations does not exceed,
// at most a hundredth too high.
func (h *Histogram) Quantile(q float64) time.Duration {
	want := uint64(math.Ceil(q * float64(h.Count)))
	var seen uint64
	for i, n := range h.buckets {
		if seen += n; n > 0 && seen >= want {
			return min(bound(i), h.Max)
		}
	}
	return h.Max
}
