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
)

// setTables sets conenatd's tables in the gateway, and keeps them open until the test ends.
func setTables(t *testing.T, l *lab.Lab, d rules.Desired) *rules.Tables {
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

// A large map is not listed; what is missing is found all the same.
func TestMissingIsFoundWithoutAList(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	c := &rules.MapConfig{Size: 100, Lifetime: time.Minute, Subnets: []netip.Prefix{lab.InsideNet}}
	b := newBackends()
	b.nft = setTables(t, l, rules.Desired{OutsideLinks: []string{"wan0"}, Map: c}).NewMap(c)
	var ps []cone.Permission
	var ops []cone.Op
	for port := range uint16(3) {
		ps = append(ps, cone.Permission{
			Key: cone.Key{Ext: cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), 1+port)), Peer: cone.AddrFrom(lab.PeerA)},
			Int: cone.EndpointFrom(netip.MustParseAddrPort("10.47.11.109:1")),
		})
	}
	for _, p := range ps {
		ops = append(ops, cone.Op{Permission: p, By: cone.ByMap})
	}
	b.Grant(ops, func(i int, _ cone.Carriers, r cone.Reason, err error) { t.Fatal(ps[i], r, err) })
	if err := b.nft.Revoke(ps[1:2]); err != nil {
		t.Fatal(err)
	}
	for name, ofMap := range map[string]bool{"listed": true, "not listed": false} {
		f, err := b.list(ofMap)
		if err != nil || (f.nft != nil) != ofMap {
			t.Fatalf("%s: %v, %v", name, f, err)
		}
		var lost []cone.Permission
		err = b.missing(ops, f, func(p cone.Permission, _ cone.Carriers) { lost = append(lost, p) })
		if err != nil || len(lost) != 1 || lost[0] != ps[1] {
			t.Errorf("%s: %v are missing, want %v; %v", name, lost, ps[1], err)
		}
	}
	unprivileged(t, func() {
		for _, some := range [][]cone.Op{ops, ops[1:2]} {
			if err := b.missing(some, found{}, func(p cone.Permission, _ cone.Carriers) { t.Errorf("%v is missing", p) }); err == nil {
				t.Error("the kernel did not answer, and yet there is no error")
			}
		}
	})
}

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
	b := newBackends()
	b.nft = setTables(t, l, rules.Desired{OutsideLinks: []string{"wan0"}, Map: c}).NewMap(c)
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
		if err := b.Deny(ps, cone.ReasonForwarded); err == nil || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
			t.Errorf("what the kernel did not deny: %v", err)
		}
	})
	must(b.Deny(ps, cone.ReasonForwarded))
	unprivileged(t, func() {
		if err := b.Deny(ps, cone.ReasonRevoked); err == nil { // lifts the old one first
			t.Error("what the kernel did not lift is no error")
		}
		refused := 0
		b.nft.Grant(ps, func(int, cone.Reason, error) { refused++ })
		if refused != 1 {
			t.Error("what the kernel did not grant is not refused")
		}
	})
	if !denied() {
		t.Fatal("it is not denied")
	}
	b.nft.Grant(ps, func(_ int, r cone.Reason, err error) { t.Fatal(r, err) })
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
	f := &firewall{tables: setTables(t, l, rules.Desired{OutsideLinks: []string{"wan0"}, Guard: true, Subnets: []netip.Prefix{lab.InsideNet}})}
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
