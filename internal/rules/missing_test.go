//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl/nfnltest"
)

// Fails when every refusal counts as that there is no such element.
func TestOnlyWhatTheKernelDoesNotFindIsMissing(t *testing.T) {
	for errno, want := range map[unix.Errno]int{unix.ENOENT: 1, unix.ENOMEM: 0} {
		c, kernel := nfnltest.New(t)
		kernel.Answer = nfnltest.RefuseAll(errno)
		var m Map
		m.begin(&writer{batch: c})
		missing := 0
		err := m.Missing(make([]cone.Permission, 1), func(int) { missing++ })
		if missing != want || (want == 0) != errors.Is(err, errno) {
			t.Errorf("%v: %d missing, want %d; %v", errno, missing, want, err)
		}
	}
}
