package expect

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

func TestChooseHelperTriesEachAndSaysWhatWouldMend(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true})
	c, err := nfnl.Dial(l.Gateway.FD())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	for _, v6 := range []bool{false, true} {
		h, err := chooseHelper(c, []string{"conenat-none", nfnl.KernelHelpers[0]}, v6)
		if err != nil || h.name != nfnl.KernelHelpers[0] || h.policy == 0 {
			t.Errorf("IPv6 %v: helper %+v, error %v", v6, h, err)
		}
		_, err = chooseHelper(c, []string{"conenat-none", "conenat-nor"}, v6)
		if !errors.Is(err, ErrNoHelper) || !strings.Contains(err.Error(), "conenat-nor: create anchor: operation not supported") ||
			!strings.Contains(err.Error(), "load one of the modules") {
			t.Errorf("IPv6 %v: error %v", v6, err)
		}
		if errors.Is(err, unix.EPERM) {
			t.Errorf("taken for want of privilege: %v", err)
		}
	}
	for _, args := range [][]string{{"expect"}, {"-p", "udp"}, {"-p", "udp", "-f", "ipv6"}} {
		if left, err := l.Conntrack(args...); err != nil || len(left) != 0 {
			t.Errorf("left by the probe: %q, %v", left, err)
		}
	}
}

func TestHelperTimeoutSuits(t *testing.T) {
	for _, tt := range []struct {
		policy, timeout uint32
		want            bool
	}{
		{300, 300, true},
		{240, 300, true},
		{225, 300, true},
		{224, 300, false},
		{301, 300, false},
		{3, 300, false},
		{0, 300, false},
		{0, 0, true},
	} {
		if got := (helper{policy: tt.policy}).suits(tt.timeout); got != tt.want {
			t.Errorf("%d for %d: %v", tt.policy, tt.timeout, got)
		}
	}
}
