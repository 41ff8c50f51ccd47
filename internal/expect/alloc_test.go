package expect_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

// At thousands of permissions a second, garbage matters.
func TestGrantRenewAndRevokeDoNotAllocate(t *testing.T) {
	// The helper's own timeout suits the first lifetime and not the second.
	for _, lifetime := range []time.Duration{5 * time.Minute, time.Minute} {
		g := newGate(t, lab.Options{})
		b := g.open(lifetime)
		for _, n := range []int{1, 64} {
			ps := many(n)
			refused := func(i int, r cone.Reason, err error) { t.Fatalf("permission %d refused: %v: %v", i, r, err) }
			lost := func(i int) { t.Fatalf("permission %d lost", i) }
			if got := testing.AllocsPerRun(100, func() {
				b.Grant(ps, refused)
				b.Renew(ps, lost)
				if err := b.Revoke(ps); err != nil {
					t.Fatal(err)
				}
			}); got != 0 {
				t.Errorf("%v allocations for %d permissions with lifetime %v", got, n, lifetime)
			}
		}
	}
}

func BenchmarkGrantAndRevoke(b *testing.B) {
	for _, lifetime := range []time.Duration{5 * time.Minute, time.Hour} {
		for _, n := range []int{1, 64} {
			b.Run(fmt.Sprintf("lifetime=%v/batch=%d", lifetime, n), func(b *testing.B) {
				g := newGate(b, lab.Options{})
				e := g.open(lifetime)
				ps := many(n)
				b.ReportAllocs()
				for b.Loop() {
					e.Grant(ps, func(i int, r cone.Reason, err error) { b.Fatal(i, r, err) })
					if err := e.Revoke(ps); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(b.N*n)/b.Elapsed().Seconds(), "permissions/s")
			})
		}
	}
}
