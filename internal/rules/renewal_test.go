package rules_test

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

// A packet that comes while its permission is renewed finds it, before the renewal or after it.
// Linux before 6.17 may look in the old generation when the new element is there, and the old one is
// not (b2f742c846ca, "netfilter: nf_tables: restart set lookup on base_seq change").
//
// Fails when a renewal takes two transactions.
func TestRenewalLosesNoPacket(t *testing.T) {
	const ports, rounds = 2000, 5
	l := lab.ForTest(t, lab.Options{})
	d, m := learning, *learning.Map
	m.MaxChildren = 0
	d.Map, d.Helpers = &m, nil
	tables := open(t, l)
	set(t, tables, d)
	renewed, p := tables.NewMap(d.Map), []cone.Permission{groupPermission(0)}
	renewed.Grant(p, func(_ int, r cone.Reason, err error) { t.Fatal(r, err) })
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
