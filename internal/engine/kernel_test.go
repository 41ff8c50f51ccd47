package engine

import (
	"net/netip"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/rulestest"
)

// A large map is not listed; what is missing is found all the same.
func TestMissingIsFoundWithoutAList(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	c := &rules.MapConfig{Size: 100, Lifetime: time.Minute, Subnets: []netip.Prefix{lab.InsideNet}}
	m := rulestest.Set(t, l, rules.Desired{OutsideLinks: []string{"wan0"}, Map: c}).NewMap(c)
	model := cone.New(cone.Policy{
		Subnets: []cone.Subnet{{Prefix: lab.InsideNet}}, Mapped: true, Lifetime: time.Minute, Retry: time.Minute,
	})
	model.SetTopology(0, cone.Topology{Routes: []cone.Route{{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Outside: true}}})
	var ps []cone.Permission
	for port := range uint16(3) {
		ps = append(ps, cone.Permission{
			Key: cone.Key{Ext: cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), 1+port)), Peer: cone.AddrFrom(lab.PeerA)},
			Int: cone.EndpointFrom(netip.MustParseAddrPort("10.47.11.109:1")),
		})
	}
	m.Grant(ps, func(i int, r cone.Reason, err error) { t.Fatal(ps[i], r, err) })
	for _, p := range ps {
		model.Adopt(0, p, cone.ByMap, time.Minute)
	}
	if err := m.Revoke(ps[1:2]); err != nil {
		t.Fatal(err)
	}
	e := New(model, Kernel{Map: m}, Config{Now: func() time.Duration { return 1 }})
	compare := Comparer{InLoop: func(f func(*Engine)) bool { f(e); return true }, Between: func() {}}
	for name, tc := range map[string]struct {
		list             bool
		listed, suspects int
	}{"listed": {true, 2, 1}, "not listed": {false, 0, 3}} {
		d, err := compare.look(scope{list: tc.list}, func(*Engine, *cone.View) {})
		if err != nil || d.Elements != tc.listed || len(d.Missing) != tc.suspects {
			t.Fatalf("%s: %+v, %v", name, d, err)
		}
		var lost []cone.Permission
		err = compare.confirm(d.Missing, func(_ *Engine, p *Placed) { lost = append(lost, p.Permission) })
		if err != nil || len(lost) != 1 || lost[0].Key != ps[1].Key || lost[0].Int != ps[1].Int {
			t.Errorf("%s: %v are missing, want %v; %v", name, lost, ps[1], err)
		}
		done := make(chan error)
		go func() {
			done <- lab.WithoutCapabilities(func() error {
				err := compare.confirm(d.Missing, func(_ *Engine, p *Placed) { t.Errorf("%v is missing", p) })
				if err == nil {
					t.Error("the kernel did not answer, and yet there is no error")
				}
				return nil
			})
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}
