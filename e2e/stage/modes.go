package stage

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// ModeEnv has flags for every daemon, such as "--backend=nft --learn=false", to run
// the same tests in another mode. A test's own flags override them. With --events=lean
// Start waits until the kernel hides flows: use it only with tests whose settings allow that.
const ModeEnv = "CONENATD_MODE"

// Flags of the daemon's modes.
var (
	NFT         = []string{"--backend=nft"}
	NFTByEvent  = []string{"--backend=nft", "--learn=false"}
	Auto        = []string{"--backend=auto"}
	AutoByEvent = []string{"--backend=auto", "--learn=false"}
	Expect      = []string{"--backend=expect"}
)

// overrides reports whether args have all flags of a mode, with whatever value. The backend
// "expect" does not learn.
func overrides(args, mode []string) bool {
	has := func(flag string) bool {
		name, _, _ := strings.Cut(flag, "=")
		return slices.ContainsFunc(args, func(a string) bool { return a == name || strings.HasPrefix(a, name+"=") }) ||
			name == "--learn" && slices.Contains(args, Expect[0])
	}
	return len(mode) > 0 && !slices.ContainsFunc(mode, func(flag string) bool { return !has(flag) })
}

// UsesExpect reports whether the daemons of this run have the expect backend, unless
// a test chooses another mode.
func UsesExpect() bool { return !strings.Contains(os.Getenv(ModeEnv), "--backend=nft") }

// NeedsExpect skips a test of behaviour that the nft backend alone does not offer.
func NeedsExpect(t *testing.T) {
	t.Helper()
	if !UsesExpect() {
		t.Skip("conntrack expectations alone do this, and this run is without them")
	}
}

// UsesExpectAlone reports whether these daemons have no other backend.
func UsesExpectAlone() bool { return strings.Contains(os.Getenv(ModeEnv), "--backend=expect") }

// InModes runs a test once in each mode, and overrides the mode of the run (ModeEnv).
func InModes(t *testing.T, modes [][]string, test func(t *testing.T, mode ...string)) {
	t.Helper()
	if os.Getenv(ModeEnv) != "" {
		t.Skip("it chooses its modes itself")
	}
	if os.Getenv("CONENATD_GUEST") != "" {
		modes = modes[:1] // an emulated machine is too slow for all
	}
	for _, mode := range modes {
		t.Run(strings.ReplaceAll(strings.Join(mode, " "), "--", ""), func(t *testing.T) { test(t, mode...) })
	}
}

// OfTheDaemon skips a test in an emulated machine, which is slow, if the test depends
// on the daemon and not on the kernel.
func OfTheDaemon(t *testing.T) {
	t.Helper()
	if os.Getenv("CONENATD_GUEST") != "" {
		t.Skip("it is of the daemon, not of the kernel: the host runs it")
	}
}

// Flags puts the flags that every daemon needs before those of a mode.
func Flags(mode []string, more ...string) []string {
	return slices.Concat([]string{"--subnet", lab.InsideNet.String()}, mode, more)
}
