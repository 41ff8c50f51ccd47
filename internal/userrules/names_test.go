package userrules

import (
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// Fails when flowtables are listed that do not exist, or their absence is an error. An
// end-to-end test has one, on kernels with flowtables.
func TestWithoutFlowtablesNoneIsListed(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	if names, err := Flowtables(l.Gateway.FD()); err != nil || len(names) > 0 {
		t.Errorf("%q, %v", names, err)
	}
}

// Fails when tables or chains that packets can reach are not found, or others are.
func TestTablesAndChainsAreFoundByTheirNames(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: `table inet f {
	chain reached { }
	chain left_out { }
	chain forward {
		type filter hook forward priority filter;
		jump reached
	}
}
`})
	r := NewReader(Config{NetNS: l.Gateway.FD()})
	defer r.Close()
	rs, err := r.Read()
	if err != nil {
		t.Fatal(err)
	}
	if !rs.HasTable("inet f") || rs.HasTable("ip f") {
		t.Error("tables")
	}
	for chain, want := range map[string]bool{"forward": true, "reached": true, "left_out": false, "none": false} {
		if rs.HasChain("inet f", chain) != want {
			t.Errorf("%s: %v", chain, !want)
		}
	}
}
