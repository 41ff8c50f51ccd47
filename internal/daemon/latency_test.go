package daemon

import (
	"testing"
	"time"
)

func TestQuantilesAreExactToAHundredth(t *testing.T) {
	var h histogram
	for i := range 1000 {
		h.record(time.Duration(i+1) * time.Microsecond)
	}
	for q, want := range map[float64]time.Duration{
		0.5: 500 * time.Microsecond, 0.99: 990 * time.Microsecond, 1: time.Millisecond,
	} {
		if got := h.quantile(q); got < want || got > want+want/100+1 {
			t.Errorf("quantile %v is %v, want %v or a hundredth more", q, got, want)
		}
	}
}

// Fails when a bucket of status lacks durations well below its bound, has ones above it, or
// the sum leaves some out.
func TestStatusCountsLatenciesUpToEachBound(t *testing.T) {
	var h histogram
	for i := range 100 {
		for range 2 {
			h.record(time.Duration(i+1) * 7 * time.Microsecond) // up to 700 µs
		}
	}
	h.record(2 * time.Second) // in no bucket of status
	l := h.status()
	for _, b := range l.Buckets {
		if want := 2 * uint64(min(b.UpTo/7, 100)); b.Count > want || b.Count < want-want/50 {
			t.Errorf("%d up to %v µs, want %d", b.Count, b.UpTo, want)
		}
	}
	if want := 2e6 + 2*7*5050; l.Sum < want || l.Sum > want*1.01 {
		t.Errorf("sum %v µs, want %v or a hundredth more", l.Sum, want)
	}
}

func TestEveryDurationIsInTheBucketThatBoundsIt(t *testing.T) {
	for d := time.Duration(1); d > 0 && d < 1<<62; d += d/40 + 1 {
		i := bucket(d)
		if bound(i) < d || i > 0 && d > subBuckets && bound(i-1) >= d {
			t.Fatalf("%v is in bucket %d up to %v", d, i, bound(i))
		}
	}
}

func TestRecordingAllocatesNothing(t *testing.T) {
	var h histogram
	if n := testing.AllocsPerRun(100, func() { h.record(time.Second) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
