package debian

import (
	"os"
	"testing"
)

// Missing skips a test for this reason, or fails it in CI, where the test must run.
func Missing(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}
