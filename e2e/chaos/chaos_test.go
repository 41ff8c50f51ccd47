// Package chaos proves that conenatd survives bad days: each test plays one, and
// checks the traffic and what the kernel holds.
package chaos

import (
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
)

func TestMain(m *testing.M) { stage.Main(m) }

// modes are the combinations of backends that can carry a permission.
var modes = [][]string{stage.Auto, stage.Expect, stage.NFT, stage.NFTByEvent}

// leavesNothing checks that daemon and kernel agree, and that the stopped daemon
// leaves nothing in the kernel.
func leavesNothing(s *stage.Scene) {
	s.T.Helper()
	s.Verified()
	s.Stop()
	if left := s.Leftovers(); len(left) > 0 {
		s.T.Errorf("%d left over, %q ...", len(left), left[0])
	}
}
