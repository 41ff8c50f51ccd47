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

// ForTest makes a lab that is closed when the test ends. It skips the test
// where the privilege is missing, but fails it when the environment variable
// CI is set: there it must run.
func ForTest(t TB, o Options) *Lab {
	t.Helper()
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
