package daemon

import (
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/histogram"
)

// Fails when a bucket of status lacks durations well below its bound, has ones above it, or
// the sum leaves some out.
func TestStatusCountsLatenciesUpToEachBound(t *testing.T) {
	var h histogram.Histogram
	for i := range 100 {
		for range 2 {
			h.Record(time.Duration(i+1) * 7 * time.Microsecond) // up to 700 µs
		}
	}
	h.Record(2 * time.Second) // in no bucket of status
	l := latencyStatus(&h)
	for _, b := range l.Buckets {
		if want := 2 * uint64(min(b.UpTo/7, 100)); b.Count > want || b.Count < want-want/50 {
			t.Errorf("%d up to %v µs, want %d", b.Count, b.UpTo, want)
		}
	}
	if want := 2e6 + 2*7*5050; l.Sum < want || l.Sum > want*1.01 {
		t.Errorf("sum %v µs, want %v or a hundredth more", l.Sum, want)
	}
}
