package debian

import (
	"os"
	"testing"
)

// Missing skips a test that lacks something, or fails it in CI: there it must run.
func Missing(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}
