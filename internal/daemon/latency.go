package daemon

import (
	"math"
	"math/bits"
	"time"

	"github.com/conenatd/conenatd/internal/control"
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

// sum returns the sum of all durations, at most a hundredth too high. It is computed here so
// that record stays cheap.
func (h *histogram) sum() (d time.Duration) {
	for i, n := range h.buckets {
		if n > 0 {
			d += time.Duration(n) * min(bound(i), h.max)
		}
	}
	return d
}

// upTo returns how many durations are at most d. It may leave out those within a hundredth
// of d.
func (h *histogram) upTo(d time.Duration) (n uint64) {
	for i := bucket(0); i < len(h.buckets) && bound(i) <= d; i++ {
		n += h.buckets[i]
	}
	return n
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

// bounds are the upper bounds of the latencies that status counts.
var bounds = []time.Duration{
	50 * time.Microsecond, 100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, time.Second,
}

// status returns the histogram as status shows it.
func (h *histogram) status() control.Latency {
	l := control.Latency{
		Count: h.count, P50: microseconds(h.quantile(0.50)), P99: microseconds(h.quantile(0.99)),
		Max: microseconds(h.max), Sum: microseconds(h.sum()),
	}
	for _, d := range bounds {
		l.Buckets = append(l.Buckets, control.Bucket{UpTo: microseconds(d), Count: h.upTo(d)})
	}
	return l
}
