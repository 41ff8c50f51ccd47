package stage

import (
	"slices"
	"testing"
)

// Fails when a test is skipped whose daemon differs from that of another run, or runs once more
// with the same daemon.
func TestOnlyTheWholeModeIsOverridden(t *testing.T) {
	for _, tt := range []struct {
		args, mode []string
		want       bool
	}{
		{Expect, nil, false},
		{Expect, NFT, true},
		{[]string{"--backend", "nft"}, Expect, true},
		{[]string{"--reconcile=1s"}, NFT, false},
		{[]string{"--backends=1"}, NFT, false},
		{NFT, NFTByEvent, false},
		{Auto, NFTByEvent, false},
		{AutoByEvent, NFTByEvent, true},
		{Expect, NFTByEvent, true},
	} {
		if got := overrides(slices.Concat([]string{"--subnet=10.47.11.0/24"}, tt.args), tt.mode); got != tt.want {
			t.Errorf("%q in the mode %q: %v", tt.args, tt.mode, got)
		}
	}
}
