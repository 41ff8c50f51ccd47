// Package chaos proves that conenatd passes its bad days: each test makes one, and
// looks at the traffic and at what the kernel holds.
package chaos

import (
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
)

func TestMain(m *testing.M) { stage.Main(m) }

// modes are the ways in which a permission can stand.
var modes = [][]string{stage.Auto, stage.Expect, stage.NFT, stage.NFTByEvent}

// leavesNothing checks that daemon and kernel agree, and that nothing is left of the
// daemon when it stops.
func leavesNothing(s *stage.Scene) {
	s.T.Helper()
	s.Verified()
	s.Stop()
	if left := s.Leftovers(); len(left) > 0 {
		s.T.Errorf("%d left over, %q ...", len(left), left[0])
	}
}
