package rules_test

import (
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

// At thousands of permissions per second, garbage would matter.
func TestGrantRenewAndRevokeDoNotAllocate(t *testing.T) {
	g := newGate(t, lab.Options{}, granting)
	refused := func(i int, r cone.Reason, err error) { t.Fatalf("permission %d refused: %v: %v", i, r, err) }
	lost := func(i int) { t.Fatalf("permission %d lost", i) }
	for _, n := range []int{1, 256, 600} { // 600 is three batches
		ps := strangers(0, n)
		if got := testing.AllocsPerRun(20, func() {
			g.m.Grant(ps, refused)
			g.m.Renew(ps, lost)
			if err := g.m.Revoke(ps); err != nil {
				t.Fatal(err)
			}
		}); got != 0 {
			t.Errorf("%v allocations for %d permissions", got, n)
		}
	}
}
