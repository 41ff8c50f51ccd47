package cone

import (
	"slices"
	"testing"
	"time"
)

func learned(p *Policy) { p.Mapped, p.Learned = true, true }

// If a permission is refused, what the kernel learned of it must go, and must not come back
// with the next packet.
func TestRefusedPermissionIsDeniedToAKernelThatLearns(t *testing.T) {
	const in, second = "10.47.11.109:1", "10.47.11.109:2"
	refuse := func(r Reason, standing bool) func(*desk) {
		return func(d *desk) { d.m.Refused(1, d.view(in).Permission, r, standing) }
	}
	refuseAtOnce := func(r Reason) func(*desk) {
		return func(d *desk) {
			d.m.FlowSeen(1, d.translated(second, "203.0.113.5:9"))
			d.m.Ops()
			d.m.Refused(1, d.view(second).Permission, r, false)
		}
	}
	// The peer alone keeps it, and a flow of another host has it granted again.
	refuseAgain := func(r Reason) func(*desk) {
		return func(d *desk) {
			f := d.translated(in, "203.0.113.5:9")
			f.ID = d.id - 1
			d.m.FlowSeen(1, &Flow{
				ID: 9, Status: StatusDstNAT | StatusSeenReply, Labelled: true,
				Src: ep("203.0.113.5:10"), Dst: f.ReplyDst, ReplySrc: f.Src, ReplyDst: ep("203.0.113.5:10"),
			})
			d.gone(1, f)
			refuse(r, false)(d)
		}
	}
	another := func(d *desk) { d.open(1, second, "203.0.113.5:9") }
	for name, tc := range map[string]struct {
		limits Limits
		act    func(d *desk)
		want   []OpKind // without Deny where the kernel does not learn, but of what was revoked
	}{
		"local socket":                {Limits{}, refuse(ReasonLocalSocket, true), []OpKind{Revoke, Deny}},
		"local socket at once":        {Limits{}, refuseAtOnce(ReasonLocalSocket), []OpKind{Deny}},
		"local socket, granted again": {Limits{}, refuseAgain(ReasonLocalSocket), []OpKind{Revoke}},
		"limit of the host":           {Limits{PerHost: 1}, another, []OpKind{Deny}},
		"limit of the subnet":         {Limits{PerSubnet: 1}, another, []OpKind{Deny}},
		"limit of all":                {Limits{Total: 1}, another, []OpKind{Deny}},
		"revoked":                     {Limits{}, func(d *desk) { d.m.Revoke(1, func(Permission) bool { return true }) }, []OpKind{Revoke, Deny}},
		"kernel refused":              {Limits{}, refuseAtOnce(ReasonKernel), nil},
		"kernel refused, stood":       {Limits{}, refuse(ReasonKernel, true), []OpKind{Revoke}},
		"table full":                  {Limits{}, refuseAtOnce(ReasonTableFull), nil},
		"taken":                       {Limits{}, refuseAtOnce(ReasonTaken), nil},
		"peers on the port":           {Limits{}, refuseAtOnce(ReasonPeersOnPort), nil},
		"stopped":                     {Limits{}, func(d *desk) { d.m.RevokeAll() }, []OpKind{Revoke}},
		"not allowed any more": {Limits{}, func(d *desk) {
			p := d.m.policy.Policy
			p.Subnets = nil
			d.m.SetPolicy(1, p)
		}, []OpKind{Revoke}},
		"wanted by nobody": {Limits{}, func(d *desk) {
			d.gone(1, &Flow{ID: 1, Status: StatusSrcNAT, Src: ep(in), ReplySrc: ep("203.0.113.5:9"), ReplyDst: ep("198.51.100.1:1")})
			refuse(ReasonLocalSocket, true)(d)
		}, []OpKind{Revoke}},
		"adopted": {Limits{}, func(d *desk) {
			d.m.SetForwards(1, forwardsPort(7, Endpoint{}), true)
			d.m.Adopt(1, Permission{Key: Key{Ext: ep("198.51.100.1:7"), Peer: ep("203.0.113.5:9").Addr}, Int: ep(second)}, ByExpectation, lifetime)
		}, []OpKind{Grant, Revoke}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, learns := range []bool{true, false} {
				p := testPolicy
				p.Mapped, p.Learned, p.Limits = true, learns, tc.limits
				d := &desk{t: t, m: New(p), up: map[Key]Endpoint{}, by: map[Key]Carriers{}}
				d.m.SetTopology(0, testTopology)
				d.snapshot(0)
				d.open(0, in, "203.0.113.5:9")
				d.ops = nil
				tc.act(d)
				d.carry()
				want := slices.Clone(tc.want)
				if !learns && name != "revoked" {
					want = slices.DeleteFunc(want, func(k OpKind) bool { return k == Deny })
				}
				var kinds []OpKind
				for _, o := range d.ops {
					kinds = append(kinds, o.Kind)
					if o.Kind == Deny && (o.By == ByMap) != learns {
						t.Errorf("learns %v: denied by %v", learns, o.By)
					}
					if o.Kind == Deny && (o.Reason == ReasonNone || o.Reason != d.view(o.Int.String()).Reason) {
						t.Errorf("denied because of %q", o.Reason)
					}
				}
				if !slices.Equal(kinds, want) {
					t.Errorf("learns %v: ops %v, want %v", learns, kinds, want)
				}
			}
		})
	}
}

// The daemon finds the socket after the kernel learned the permission and let a
// child in.
func TestChildrenOfALearnedPermissionThatIsRefusedAreDropped(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	d := newDesk(t, func(p *Policy) { p.Mapped, p.Learned = true, true })
	d.open(0, in, "203.0.113.5:9")
	d.admit(1, "203.0.113.5:77", ext, in, 0)
	d.admit(1, "203.0.113.5:78", ext, in, StatusSeenReply)
	d.m.Refused(1, d.view(in).Permission, ReasonLocalSocket, false)
	d.wantOps("refused", d.carry(), Deny, DropUnanswered)
	_, kinds := d.admit(1, "203.0.113.5:79", ext, in, 0)
	d.wantOps("the event of a child comes late", kinds, DropUnanswered)
}

// Only the peer's packets keep an idle flow alive, and the learning rule does not see them.
func TestIdlePermissionIsNotDenied(t *testing.T) {
	d := newDesk(t, learned)
	f := d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	f.HasCounters, f.OrigPackets = true, 1
	d.m.Tick(lifetime, 10)
	d.seen(lifetime, f)
	d.ops = nil
	d.m.Tick(2*lifetime, 10)
	d.carry()
	if v := d.view("10.47.11.109:1"); v.Reason != ReasonIdle {
		t.Fatalf("it is %v (%v)", v.State, v.Reason)
	}
	for _, o := range d.ops {
		if o.Kind == Deny {
			t.Errorf("it is denied")
		}
	}
}

func TestDenialIsRenewedForAsLongAsItHolds(t *testing.T) {
	for name, refuse := range map[string]func(d *desk){
		"limit":   func(d *desk) {},
		"revoked": func(d *desk) { d.m.Revoke(0, func(p Permission) bool { return p.Int == ep("10.47.11.109:2") }) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, func(p *Policy) { p.Learned, p.Limits.PerHost = true, 1 })
			first := d.open(0, "10.47.11.109:1", "203.0.113.5:9")
			d.open(0, "10.47.11.109:2", "203.0.113.5:9")
			refuse(d)
			d.carry()
			var now time.Duration
			for range 3 {
				now += testPolicy.Retry
				d.m.Tick(now, 10)
				d.wantOps(now.String(), d.carry(), Deny)
			}
			d.gone(now, first)
			d.ops = nil
			d.open(now, "10.47.11.109:2", "203.0.113.5:10") // brings back what was revoked
			d.m.Tick(now+2*testPolicy.Retry, 10)
			d.carry()
			d.want("10.47.11.109:2")
			for _, o := range d.ops {
				if o.Kind == Deny {
					t.Errorf("denied though there is room and a new flow")
				}
			}
		})
	}
}

// A denial is for a Key, whichever host asks for it.
func TestKeyIsNotDeniedWhileAnotherClaimOfItStands(t *testing.T) {
	is := func(in string) func(Permission) bool {
		return func(p Permission) bool { return p.Int == ep(in) }
	}
	d := newDesk(t, learned)
	f := d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	d.open(0, "10.47.11.110:1", "203.0.113.5:10") // the same outside endpoint and peer
	d.m.Revoke(1, is("10.47.11.110:1"))
	d.m.Tick(1+testPolicy.Retry, 10)
	d.wantOps("the one that waits", d.carry())
	d.want("10.47.11.109:1")

	// The owner's permission ends a lifetime later: now it would be learned.
	d.gone(2+testPolicy.Retry, f)
	d.want("10.47.11.109:1")
	d.m.Tick(lifetime, 10)
	d.carry()
	d.ops = nil
	d.m.Tick(2*lifetime, 10)
	d.carry()
	d.want()
	if len(d.ops) != 2 || d.ops[0].Kind != Revoke || d.ops[1].Kind != Deny || d.ops[1].Int != ep("10.47.11.110:1") {
		t.Errorf("ops %+v, want the owner revoked and the other denied", d.ops)
	}
}

func TestOwnersDenialCoversThoseThatWait(t *testing.T) {
	d := newDesk(t, learned)
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	d.open(0, "10.47.11.110:1", "203.0.113.5:10")
	d.m.Revoke(1, func(Permission) bool { return true })
	d.wantOps("both revoked", d.carry(), Revoke, Deny)
	d.m.Tick(1+testPolicy.Retry+d.m.wheel.grain, 10)
	d.wantOps("renewed", d.carry(), Deny)
}

func TestClaimantIsDeniedWhereTheKernelRefusedTheOwner(t *testing.T) {
	d := newDesk(t, learned)
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	d.open(0, "10.47.11.110:1", "203.0.113.5:10")
	d.m.Refused(1, d.view("10.47.11.109:1").Permission, ReasonTableFull, false)
	d.wantOps("the owner, which stood", d.carry(), Revoke)
	d.m.Revoke(1, func(p Permission) bool { return p.Int == ep("10.47.11.110:1") })
	d.wantOps("the one that waits", d.carry(), Deny)
}

func TestKernelThatStartsToLearnHearsWhatIsDenied(t *testing.T) {
	d := newDesk(t, nil)
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	d.m.Revoke(1, func(Permission) bool { return true })
	d.open(2, "10.47.11.109:2", "203.0.113.5:9")
	d.m.Refused(2, d.view("10.47.11.109:2").Permission, ReasonLocalSocket, true)
	d.carry()
	p := testPolicy
	p.Learned = true
	d.m.SetPolicy(3, p)
	d.m.Tick(3+d.m.wheel.grain, 10)
	// One is asked for anew; the daemon refuses it again.
	kinds := d.carry()
	slices.Sort(kinds)
	d.wantOps("at the next tick", kinds, Grant, Deny)
}

// A map knows a permission by its Key alone: to revoke what another host's
// packet taught it would end the owner's.
func TestUnexpected(t *testing.T) {
	const in = "10.47.11.109:1"
	key := Key{Ext: ep("198.51.100.1:1"), Peer: ep("203.0.113.5:9").Addr}
	for name, tc := range map[string]struct {
		prepare func(d *desk)
		found   string
		want    []Op
	}{
		"it stands": {nil, in, nil},
		"another stands": {
			nil, "10.47.11.110:1",
			[]Op{{Kind: Grant, Permission: Permission{Key: key, Int: ep(in), MapTranslates: true}, By: ByMap}},
		},
		"another stands, it waits": {
			func(d *desk) { d.open(0, "10.47.11.110:1", "203.0.113.5:10") },
			"10.47.11.110:1",
			[]Op{{Kind: Grant, Permission: Permission{Key: key, Int: ep(in), MapTranslates: true}, By: ByMap}},
		},
		"it is refused": {
			func(d *desk) { d.m.Refused(0, d.view(in).Permission, ReasonLocalSocket, true) }, in,
			[]Op{{Kind: Revoke, Permission: Permission{Key: key, Int: ep(in)}, By: ByMap, Reason: ReasonExpired}},
		},
		"another is refused": {
			func(d *desk) { d.m.Refused(0, d.view(in).Permission, ReasonLocalSocket, true) }, "10.47.11.110:1",
			[]Op{{Kind: Revoke, Permission: Permission{Key: key, Int: ep("10.47.11.110:1")}, By: ByMap, Reason: ReasonExpired}},
		},
		"nobody wants it": {
			func(d *desk) { d.m.RevokeAll() }, in,
			[]Op{{Kind: Revoke, Permission: Permission{Key: key, Int: ep(in)}, By: ByMap, Reason: ReasonExpired}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, learned)
			d.open(0, in, "203.0.113.5:9")
			if tc.prepare != nil {
				tc.prepare(d)
			}
			d.carry()
			d.ops = nil
			d.m.Unexpected(0, Permission{Key: key, Int: ep(tc.found)}, ByMap)
			d.carry()
			if !slices.Equal(d.ops, tc.want) {
				t.Errorf("ops %+v, want %+v", d.ops, tc.want)
			}
		})
	}
}

func TestAdoptionOfAKeyThatIsClaimedIsIgnored(t *testing.T) {
	d := newDesk(t, learned)
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	p := d.view("10.47.11.109:1").Permission
	p.Int = ep("10.47.11.110:1")
	d.m.Adopt(1, p, ByMap, lifetime)
	d.wantOps("adopted", d.carry())
	d.want("10.47.11.109:1")
}

// The outside port of an idle permission passes to another host. The map may have
// learned that already: its element is not revoked before the grant, and a child of the
// former host does not stay.
func TestPortThatPassesToAnotherHost(t *testing.T) {
	const former, next, ext = "10.47.11.109:1", "10.47.11.110:1", "198.51.100.1:1"
	for name, choice := range map[string]Choice{"map": ChooseMap, "both": ChooseBoth} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, func(p *Policy) {
				choose(choice)(p)
				p.Learned, p.Labels = true, true
			})
			d.gone(1, d.open(0, former, "203.0.113.5:9"))
			d.admit(1, "203.0.113.5:77", ext, former, 0)
			d.ops = nil
			d.open(2, next, "203.0.113.5:9")
			d.want(next)
			for _, o := range d.ops {
				if o.Kind == Revoke && o.By&ByMap != 0 {
					t.Errorf("%+v", o)
				}
			}
			if !slices.ContainsFunc(d.ops, func(o Op) bool { return o.Kind == DropUnanswered }) {
				t.Errorf("the child of the former host stays: %+v", d.ops)
			}
			_, kinds := d.admit(3, "203.0.113.5:78", ext, former, 0)
			d.wantOps("the event of a child of the former host comes late", kinds, DropUnanswered)
		})
	}
}

// When one flow with the same reply tuple has ended, the kernel lets another host have the
// port, although other flows of the owner go on.
func TestOwnerThatGoesOnIsPutBack(t *testing.T) {
	const owner, another = "10.47.11.109:1", "10.47.11.110:1"
	d := newDesk(t, learned)
	d.open(0, owner, "203.0.113.5:9")
	d.gone(1, d.open(0, owner, "203.0.113.5:10"))
	d.ops = nil
	for _, peer := range []string{"203.0.113.5:10", "203.0.113.5:11"} {
		d.open(2, another, peer)
		if len(d.ops) != 1 || d.ops[0].Kind != Grant || d.ops[0].By != ByMap || d.ops[0].Int != ep(owner) {
			t.Errorf("another flow to %s: %+v", peer, d.ops)
		}
		d.ops = nil
	}
	d.want(owner)
}

// The topology refused a flow, so that it has no claim yet, but the kernel learned its
// permission. While the next snapshot runs, the permission admits a child.
//
// Fails when that child does not count until the snapshot after it.
func TestChildOfAFlowThatARunningSnapshotShows(t *testing.T) {
	const in = "10.47.11.109:1"
	for name, tc := range map[string]struct {
		shown, ends bool
		want        []OpKind
		children    int
	}{
		"shown":                  {shown: true, want: []OpKind{Grant}, children: 1},
		"shown, the child ended": {shown: true, ends: true, want: []OpKind{Grant}},
		"not shown":              {want: []OpKind{DropUnanswered}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, func(p *Policy) { p.Mapped, p.Learned, p.Labels = true, true, true })
			f := d.translated(in, "203.0.113.5:9")
			d.m.BeginSnapshot(1)
			child, _ := d.admit(1, "203.0.113.5:10", "198.51.100.1:1", in, 0)
			if tc.ends {
				d.gone(1, child)
			}
			if tc.shown {
				d.m.SnapshotFlow(1, f)
			}
			d.m.EndSnapshot(1)
			d.wantOps("at the end", d.carry(), tc.want...)
			if tc.shown {
				if n := d.view(in).Children; n != tc.children {
					t.Errorf("%d children, want %d", n, tc.children)
				}
			}
		})
	}
}

// Fails when a permission that a snapshot shows, and that the kernel may have learned long
// before, runs out in a kernel that does not renew what exists when it is granted.
func TestLearnedIsRefreshedInTime(t *testing.T) {
	d := newDesk(t, func(p *Policy) { p.Mapped, p.Learned = true, true })
	const late = lifetime * 3 / 4
	f := d.counted(sharing1, "203.0.113.5:9", 0)
	d.wantOps("snapshot", d.snapshot(late, f), Grant)
	for d.m.Tick(late+d.m.wheel.grain, 1) {
	}
	d.wantOps("at once", d.carry(), Renew)
}
