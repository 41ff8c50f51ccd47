package rules_test

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

// A packet that comes while its permission is renewed finds it, before the renewal or after it.
// Before Linux 6.17 a look-up that began before the renewal may miss both the old element, which is
// gone, and the new one, which was not there yet (kernel commit b2f742c846ca).
//
// Fails when a renewal takes two transactions.
func TestRenewalLosesNoPacket(t *testing.T) {
	const ports, rounds = 2000, 5
	l := lab.ForTest(t, lab.Options{})
	renewed, p := byMap(t, l, 0, 0), []cone.Permission{groupPermission(0)}
	f := newFlood(t, l, ports)
	for i := range ports {
		f.Aim(i, netip.AddrPortFrom(lab.PeerA, uint16(20_000+i)), benchExt)
	}
	end, ended := make(chan struct{}), make(chan int)
	go func() {
		for n := 1; ; n++ {
			renewed.Renew(p, func(int) { t.Error("the permission was not there") })
			select {
			case <-end:
				ended <- n
				return
			default:
			}
		}
	}()
	lost := 0
	for range rounds {
		check(t, f.Send(0, ports))
		lost += ports - f.came(t)
		output(t, l, "conntrack", "-D", "-p", "udp", "-s", lab.PeerA.String())
	}
	close(end)
	t.Logf("%d of %d first packets were lost in %d renewals", lost, rounds*ports, <-ended)
	if lost == 0 {
		return
	}
	before, release, err := lab.KernelBefore(6, 17)
	if !before {
		t.Fatalf("Linux %s (%v): renewals hid the permission", release, err)
	}
	t.Skipf("Linux %s does not look again when a transaction comes between", release)
}
