package cone

import "testing"

// Fails when place ignores connected sockets, and when no expectation is made again after
// they are closed.
func TestNoExpectationTakesThePacketsOfAConnectedSocket(t *testing.T) {
	const in, peer = "10.47.11.109:1", "203.0.113.5:9"
	key := Key{Ext: ep("198.51.100.1:1"), Peer: ep(peer).Addr}
	other := Key{Ext: ep("198.51.100.1:1"), Peer: ep("203.0.113.6:9").Addr}
	for name, tc := range map[string]struct {
		change          func(*Policy)
		free, connected Carriers // what carries it before and after, and then
	}{
		"without the map": {nil, ByExpectation, 0},
		"with the map": {func(p *Policy) {
			p.Mapped, p.Subnets = true, []Subnet{{Prefix: p.Subnets[0].Prefix, Choice: ChooseBoth}}
		}, AllCarriers, ByMap},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, tc.change)
			want := func(when string, by Carriers) {
				t.Helper()
				if d.carry(); d.by[key] != by {
					t.Errorf("%s: carried by %q, want %q", when, d.by[key], by)
				}
			}
			d.open(0, in, peer)
			d.m.SetConnected(0, map[Key]struct{}{other: {}})
			want("connected to somebody else", tc.free)
			d.m.SetConnected(1, map[Key]struct{}{key: {}})
			want("connected to the peer", tc.connected)
			if v := d.view(in); tc.connected == 0 && (v.State != StateRefused || v.Reason != ReasonLocalSocket) {
				t.Errorf("it is %v for %q", v.State, v.Reason)
			}
			d.m.SetConnected(2, nil)
			d.m.Tick(2*testPolicy.Retry, 10) // what was refused waits for that
			want("closed", tc.free)
		})
	}
}

// Fails when a permission that the map refused once is never put there again.
func TestMapThatWasFullIsTriedAgain(t *testing.T) {
	for name, choice := range map[string]Choice{"the map in the first place": ChooseMap, "both": ChooseBoth} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, func(p *Policy) {
				p.Mapped, p.Subnets = true, []Subnet{{Prefix: p.Subnets[0].Prefix, Choice: choice}}
			})
			full, tries := true, 0
			carry := func() {
				for ops := d.m.Ops(); len(ops) > 0; ops = d.m.Ops() {
					for _, o := range ops {
						switch {
						case o.Kind == Grant && o.By&ByMap != 0 && full:
							tries++
							d.m.Failed(0, o.Permission, ByMap, ReasonTableFull)
						case o.Kind == Grant:
							d.m.Granted(o.Permission)
						}
					}
				}
			}
			want := func(when string, by Carriers) {
				t.Helper()
				if v := d.view("10.47.11.109:1"); v.By != by {
					t.Errorf("%s: carried by %q, want %q", when, v.By, by)
				}
			}
			f := &Flow{
				ID: 1, Status: StatusSrcNAT, Src: ep("10.47.11.109:1"), Dst: ep("203.0.113.5:9"),
				ReplySrc: ep("203.0.113.5:9"), ReplyDst: ep("198.51.100.1:1"),
			}
			d.m.FlowSeen(0, f)
			carry()
			want("the map is full", 0) // an expectation would lead nowhere
			d.m.Tick(lifetime/2, 10)
			carry()
			want("it is still full", 0)
			if tries != 2 {
				t.Errorf("tried %d times, want 2", tries)
			}
			full = false
			d.m.FlowSeen(lifetime/2, f)
			d.m.Tick(lifetime, 10)
			carry()
			want("there is room", map[Choice]Carriers{ChooseMap: ByMap, ChooseBoth: AllCarriers}[choice])
		})
	}
}

// Without expectations nothing carries a flow whose answers come in a conntrack zone.
//
// Fails when such a permission is not counted, when one that the map carries is, and when the count
// survives a policy by which something carries it, or the end of its flow.
func TestUncarriedPermissionsAreCounted(t *testing.T) {
	policy := func(expected bool) Policy {
		p := testPolicy
		p.Mapped, p.Expected = true, expected
		return p
	}
	d := newDesk(t, func(p *Policy) { *p = policy(false) })
	want := func(when string, n int) {
		t.Helper()
		d.carry()
		if got := d.m.Uncarried(testPolicy.Subnets[0].Prefix); got != n {
			t.Errorf("%s: %d, want %d", when, got, n)
		}
	}
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	want("in zone 0", 0)
	f := d.translated("10.47.11.109:2", "203.0.113.6:9")
	f.OrigZone, f.ReplyZone = 5, 5
	d.m.FlowSeen(0, f)
	want("in zone 5", 1)
	d.m.SetPolicy(1, policy(false))
	want("another policy", 1)
	d.m.SetPolicy(2, policy(true))
	d.m.Tick(2*testPolicy.Retry, 10)
	want("with expectations", 0)
	d.m.SetPolicy(2*testPolicy.Retry, policy(false))
	want("without them again", 1)
	d.m.FlowGone(2*testPolicy.Retry, f)
	d.m.Tick(4*testPolicy.Retry, 10)
	want("the flow has ended", 0)
}
