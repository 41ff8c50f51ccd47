// Package chaos proves that conenatd passes its bad days: each test makes one, and
// looks at the traffic and at what the kernel holds.
package chaos

import (
	"slices"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

func TestMain(m *testing.M) { stage.Main(m) }

// modes are the ways in which a permission can stand.
var modes = [][]string{stage.Auto, stage.Expect, stage.NFT, stage.NFTByEvent}

// serve puts the subnet of the inside hosts before the flags of a mode.
func serve(mode []string, more ...string) []string {
	return slices.Concat([]string{"--subnet", lab.InsideNet.String()}, mode, more)
}
