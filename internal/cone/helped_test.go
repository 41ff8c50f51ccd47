package cone

import (
	"net/netip"
	"testing"
	"time"
)

// Where a conntrack helper of the user's works for two hosts, no expectation of ours
// stands in its way: the map alone carries the permissions, or nothing does.
func TestNoExpectationWhereAHelperWorks(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	inside, peer := ep(in).Addr, ep("203.0.113.5:9").Addr
	flow := func(more func(*Flow)) func(d *desk, now time.Duration) {
		return func(d *desk, now time.Duration) {
			f := &Flow{ID: 77, Status: StatusSrcNAT, Helped: true, Src: ep("10.47.11.109:2"), ReplySrc: ep("203.0.113.5:53"), ReplyDst: ep("198.51.100.1:2")}
			if more != nil {
				more(f)
			}
			f.Dst = f.ReplySrc
			d.m.FlowSeen(now, f)
		}
	}
	foreign := func(src, dst, peer, in Addr) func(d *desk, now time.Duration) {
		return func(d *desk, now time.Duration) { d.m.SeeForeign(now, Foreign{src, dst, peer, in}) }
	}
	gateway, other := ep(ext).Addr, ep("192.0.2.9:1").Addr
	for name, tc := range map[string]struct {
		see  func(d *desk, now time.Duration)
		want bool // it is in the way
	}{
		"a flow from inside, to an excluded port": {flow(nil), true},
		"one of a dump":          {func(d *desk, now time.Duration) { d.m.BeginSnapshot(now); flow(nil)(d, now) }, true},
		"a flow of another host": {flow(func(f *Flow) { f.Src = ep("10.47.11.110:1") }), false},
		"a flow of another host, with the same outside endpoint": {flow(func(f *Flow) { f.Src, f.ReplyDst = ep("10.47.11.110:1"), ep(ext) }), true},
		"the same to another peer": {flow(func(f *Flow) {
			f.Src, f.ReplyDst, f.ReplySrc = ep("10.47.11.110:1"), ep(ext), ep("192.0.2.9:53")
		}), false},
		"a flow to another peer": {flow(func(f *Flow) { f.ReplySrc = ep("192.0.2.9:53") }), false},
		"a flow from the peer": {flow(func(f *Flow) {
			f.Src, f.ReplySrc, f.ReplyDst, f.Status = ep("203.0.113.5:77"), ep(in), ep("203.0.113.5:77"), StatusDstNAT
		}), true},
		"a child with the helper of its anchor": {flow(func(f *Flow) {
			f.Src, f.ReplySrc, f.ReplyDst, f.Status = ep("203.0.113.5:77"), ep(in), ep("203.0.113.5:77"), StatusDstNAT|StatusExpected
			f.MasterSrc, f.MasterDst = Endpoint{Addr: inside}, Endpoint{peer, 1}
		}), false},
		"the kernel found the helper's": {func(d *desk, now time.Duration) {
			d.m.Failed(now, d.view(in).Permission, ByExpectation, ReasonHelper)
		}, true},
		"an expectation of a flow to the peer":        {foreign(inside, peer, other, inside), true},
		"an expectation of another flow for the peer": {foreign(inside, other, peer, inside), true},
		"one for anybody":                             {foreign(inside, other, Addr{}, Addr{}), true},
		"one of a flow from the peer":                 {foreign(peer, gateway, other, inside), true},
		"the same, and it does not say whereto":       {foreign(peer, gateway, other, Addr{}), true},
		"one of other hosts":                          {foreign(ep("10.47.11.110:1").Addr, peer, peer, ep("10.47.11.110:1").Addr), false},
		"one of a network that is not enabled":        {foreign(ep("10.47.12.1:1").Addr, peer, peer, ep("10.47.12.1:1").Addr), false},
		"one of a flow from elsewhere":                {foreign(other, gateway, Addr{}, Addr{}), false},
	} {
		t.Run(name, func(t *testing.T) {
			for mode, change := range map[string]func(*Policy){"both": both, "chosen": choose(ChooseExpectation), "expected": func(*Policy) {}} {
				d := newDesk(t, change)
				f := d.open(0, in, "203.0.113.5:9")
				normal := d.view(in).Placement
				if normal.By&ByExpectation == 0 {
					t.Fatalf("%s: it stands by %v", mode, normal.By)
				}
				want := Placement{By: ByMap, Why: ReasonHelper}
				if mode != "both" {
					want = Placement{}
				}
				if !tc.want {
					want = normal
				}
				tc.see(d, 1)
				d.carry()
				if v := d.view(in); v.Placement != want || d.by[v.Key] != want.By || (v.State == StateStanding) != (want.By != 0) || v.State == StateRefused && v.Reason != ReasonHelper {
					t.Fatalf("%s: it is %v (%v) by %+v, %v in the kernel; want %+v", mode, v.State, v.Reason, v.Placement, d.by[v.Key], want)
				}
				if !tc.want {
					continue
				}
				// It is not tried again while it is wanted.
				d.ops = nil
				for now := time.Second; now < lifetime*4; now += time.Second {
					d.m.Retry(now, d.view(in).Permission)
					d.m.SetForwards(now, nil, true)
					d.seen(now, f)
					d.m.Tick(now, 10)
					d.carry()
				}
				for _, o := range d.ops {
					if o.Kind == Grant {
						t.Fatalf("%s: %v by %v", mode, o.Kind, o.By)
					}
				}
				// After helperMemory a new permission stands as usual.
				d.gone(lifetime*4, f)
				d.m.Revoke(lifetime*4, func(Permission) bool { return true })
				d.carry()
				d.m.Tick(helperMemory+lifetime*5, 10)
				d.open(helperMemory+lifetime*5, in, "203.0.113.5:9")
				if v := d.view(in); v.Placement != normal {
					t.Errorf("%s: after an hour it stands by %+v, want %+v", mode, v.Placement, normal)
				}
			}
		})
	}
}

// An expectation for a group of peers is in the way of a helper for each of them.
//
// Fails when only the address by which the group is known counts.
func TestNoExpectationForAGroupWhereAHelperWorks(t *testing.T) {
	const in = "[2001:db8:47::110]:1"
	helped := func(in, peer string) func(m *Model) {
		return func(m *Model) { m.SeeHelped(0, ep(in).Addr, ep(peer).Addr, ep(in)) }
	}
	for name, tc := range map[string]struct {
		see  func(m *Model)
		want bool // it is in the way
	}{
		"one of the group":         {helped(in, "[2001:db8:113::5]:1"), true},
		"a flow from there":        {helped("[2001:db8:113::5]:1", in), true},
		"anybody":                  {func(m *Model) { m.SeeHelper(0, ep(in).Addr, Addr{}) }, true},
		"a peer outside the group": {helped(in, "[2001:db8:114::5]:1"), false},
		"another host":             {helped("[2001:db8:47::111]:1", "[2001:db8:113::5]:1"), false},
		"hosts of other networks":  {helped("[2001:db8:48::1]:1", "[2001:db8:113::5]:1"), false},
	} {
		for when, early := range map[string]bool{"before": true, "after": false} {
			t.Run(name+"/"+when, func(t *testing.T) {
				d := newDesk(t, wildPolicy)
				top := testTopology
				top.Routes = append(top.Routes, Route{Prefix: netip.MustParsePrefix("::/0"), Outside: true})
				d.m.SetTopology(0, top)
				if early {
					tc.see(d.m)
				}
				d.seen(0, &Flow{ID: 1, Src: ep(in), Dst: ep("[2001:db8:113::9]:9"), ReplySrc: ep("[2001:db8:113::9]:9"), ReplyDst: ep(in)})
				if !early {
					if d.m.Stats().Expected != 1 {
						t.Fatal("it does not stand")
					}
					tc.see(d.m)
				}
				d.carry()
				s := d.m.Stats()
				if stands := s.Expected == 1; stands == tc.want || len(d.up) != s.Expected || tc.want != (s.Refusals[ReasonHelper]+s.Revoked[ReasonHelper] > 0) {
					t.Errorf("%d stand, %d in the kernel, refused %v, revoked %v", s.Expected, len(d.up), s.Refusals, s.Revoked)
				}
			})
		}
	}
}

func TestPairsOfAHelperAreBounded(t *testing.T) {
	d := newDesk(t, nil)
	for i := range maxHelped + 10 {
		d.m.SeeHelper(0, Addr{14: byte(i >> 8), 15: byte(i)}, Addr{15: byte(i >> 16)})
	}
	if n := len(d.m.pairs); n > maxHelped {
		t.Errorf("%d are remembered, want at most %d", n, maxHelped)
	}
}
