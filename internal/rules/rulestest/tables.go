// Package rulestest has conenatd's tables for tests of other packages.
package rulestest

import (
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// Set sets conenatd's tables in the gateway, and keeps them open until the test ends.
func Set(t *testing.T, l *lab.Lab, d rules.Desired) *rules.Tables {
	t.Helper()
	tables, err := rules.Open(rules.Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tables.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := tables.Set(d); err != nil {
		t.Fatal(err)
	}
	return tables
}
