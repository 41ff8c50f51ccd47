package histogram

import (
	"testing"
	"time"
)

func TestQuantilesAreExactToAHundredth(t *testing.T) {
	var h Histogram
	for i := range 1000 {
		h.Record(time.Duration(i+1) * time.Microsecond)
	}
	for q, want := range map[float64]time.Duration{
		0.5: 500 * time.Microsecond, 0.99: 990 * time.Microsecond, 1: time.Millisecond,
	} {
		if got := h.Quantile(q); got < want || got > want+want/100+1 {
			t.Errorf("quantile %v is %v, want %v or a hundredth more", q, got, want)
		}
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
	var h Histogram
	if n := testing.AllocsPerRun(100, func() { h.Record(time.Second) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
