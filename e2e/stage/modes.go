package stage

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// Flags of the modes that a daemon can have.
var (
	NFT         = []string{"--backend=nft"}
	NFTByEvent  = []string{"--backend=nft", "--learn=false"}
	Auto        = []string{"--backend=auto"}
	AutoByEvent = []string{"--backend=auto", "--learn=false"}
	Expect      = []string{"--backend=expect"}
)

// InModes runs a test once in each mode, whatever mode the others are run in (ModeEnv).
func InModes(t *testing.T, modes [][]string, test func(t *testing.T, mode ...string)) {
	t.Helper()
	if os.Getenv(ModeEnv) != "" {
		t.Skip("it chooses its modes itself")
	}
	if os.Getenv("CONENATD_GUEST") != "" {
		modes = modes[:1] // an emulated machine has no time for all
	}
	for _, mode := range modes {
		t.Run(strings.ReplaceAll(strings.Join(mode, " "), "--", ""), func(t *testing.T) { test(t, mode...) })
	}
}

// OfTheDaemon skips a test, which looks at the daemon and at no kernel, in an emulated
// machine, which has little time.
func OfTheDaemon(t *testing.T) {
	t.Helper()
	if os.Getenv("CONENATD_GUEST") != "" {
		t.Skip("it is of the daemon, not of the kernel: the host runs it")
	}
}

// Flags puts what every daemon needs before the flags of a mode.
func Flags(mode []string, more ...string) []string {
	return slices.Concat([]string{"--subnet", lab.InsideNet.String()}, mode, more)
}
