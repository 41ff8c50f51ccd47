package userrules_test

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Asking the kernel for a missing table creates it.
func TestReadingMakesNoTableOfIPTablesLegacy(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	names := func() (s string) {
		check(t, l.Gateway.Do(func() error {
			b, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			s = strings.Join(strings.Fields(string(b)), " ")
			return err
		}))
		return s
	}
	for _, some := range []bool{false, true} {
		if some {
			check(t, l.IPTables(lab.IPTablesLegacy, "*raw\nCOMMIT\n"))
		}
		want := names()
		forwards(t, l)
		children(t, l, []userrules.Link{wan0(t, l)}, lab.InsideNet)
		if got := names(); got != want {
			t.Errorf("tables %q, want %q", got, want)
		}
	}
}
