package daemon

import (
	"time"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/histogram"
)

// bounds are the upper bounds of the latencies that status counts.
var bounds = []time.Duration{
	50 * time.Microsecond, 100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, time.Second,
}

// latencyStatus returns h as status shows it.
func latencyStatus(h *histogram.Histogram) control.Latency {
	l := control.Latency{
		Count: h.Count, P50: microseconds(h.Quantile(0.50)), P99: microseconds(h.Quantile(0.99)),
		Max: microseconds(h.Max), Sum: microseconds(h.Sum()),
	}
	for _, d := range bounds {
		l.Buckets = append(l.Buckets, control.Bucket{UpTo: microseconds(d), Count: h.UpTo(d)})
	}
	return l
}
