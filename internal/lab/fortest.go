package lab

import (
	"errors"
	"os"
)

// TB is the part of testing.TB that ForTest uses; importing testing here would
// link it into the program.
type TB interface {
	Helper()
	Cleanup(func())
	Skip(...any)
	Fatal(...any)
}

// ForTest makes a lab that is closed when the test ends. It skips the test if
// CONENATD_NO_LAB is set, and if the privilege is missing, unless the environment
// variable CI is set: then it fails the test.
func ForTest(t TB, o Options) *Lab {
	t.Helper()
	if os.Getenv("CONENATD_NO_LAB") != "" {
		t.Skip("it needs a lab, and CONENATD_NO_LAB is set")
	}
	l, err := New(o)
	if errors.Is(err, ErrPrivilege) && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
	return l
}
