package daemon

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/rulestest"
)

// Fails when the daemon believes that a denial is lifted which the kernel still has: nobody
// would ever lift it.
func TestDenialThatTheKernelKeepsIsLiftedLater(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	c := &rules.MapConfig{Size: 100, Lifetime: time.Minute, Subnets: []netip.Prefix{lab.InsideNet}, Learn: true, LearnRate: 1}
	m := rulestest.Set(t, l, rules.Desired{OutsideLinks: []string{"wan0"}, Map: c}).NewMap(c)
	ps := []cone.Permission{{
		Key: cone.Key{Ext: cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:5060")), Peer: cone.AddrFrom(lab.PeerA)},
		Int: cone.EndpointFrom(netip.MustParseAddrPort("10.47.11.109:5060")),
	}}
	denied := func() bool {
		t.Helper()
		out, err := l.Gateway.Output("nft", "list", "set", "ip", "conenat", "denied")
		must(err)
		return strings.Contains(out, lab.PeerA.String())
	}
	unprivileged(t, func() {
		if err := m.Deny(ps, cone.ReasonForwarded); err == nil || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
			t.Errorf("what the kernel did not deny: %v", err)
		}
	})
	must(m.Deny(ps, cone.ReasonForwarded))
	unprivileged(t, func() {
		if err := m.Deny(ps, cone.ReasonRevoked); err == nil { // lifts the old one first
			t.Error("what the kernel did not lift is no error")
		}
		refused := 0
		m.Grant(ps, func(int, cone.Reason, error) { refused++ })
		if refused != 1 {
			t.Error("what the kernel did not grant is not refused")
		}
	})
	if !denied() {
		t.Fatal("it is not denied")
	}
	m.Grant(ps, func(_ int, r cone.Reason, err error) { t.Fatal(r, err) })
	if denied() {
		t.Error("it is denied still")
	}
}

// Fails when counters that cannot be read count as zero.
func TestCountersHoldWhileTheyCannotBeRead(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	f := &firewall{tables: rulestest.Set(t, l, rules.Desired{OutsideLinks: []string{"wan0"}, Guard: true, Subnets: []netip.Prefix{lab.InsideNet}})}
	stranger, err := l.Outside.Socket(lab.PeerA, 5070)
	must(err)
	defer stranger.Close()
	var cfg config.Config
	for drops := uint64(0); drops == 0; {
		must(stranger.Send(netip.AddrPortFrom(l.Gateway.Addr, 5060), "x"))
		now, err := f.read(cfg)
		must(err)
		drops = now.Guard.Drops
	}
	before, err := f.read(cfg)
	must(err)
	unprivileged(t, func() {
		if now, err := f.read(cfg); err == nil || now.Guard != before.Guard {
			t.Errorf("counters: %+v, want %+v; %v", now.Guard, before.Guard, err)
		}
	})
}
