package cone

import (
	"slices"
	"testing"
	"time"
)

const (
	sharing1, sharing2, sharing3 = "10.47.11.109:1", "10.47.11.110:1", "10.47.11.111:1"
)

// Two hosts share an outside port towards one peer. The owner's permission was revoked, and
// the owner's old flow goes on: the other host gets its permission, and keeps it until its
// own end.
//
// Fails when a revoked claim stays the first of its Key, or counts as one that waits.
func TestRevokedPermissionKeepsNobodyWaiting(t *testing.T) {
	for name, change := range map[string]func(*Policy){"expected": nil, "learned": learned} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, change)
			old := d.open(0, sharing1, "203.0.113.5:9")
			other := d.open(0, sharing2, "203.0.113.5:10")
			d.want(sharing1)
			if n := d.m.Revoke(1, func(p Permission) bool { return p.Int == ep(sharing1) }); n != 1 {
				t.Errorf("%d revoked, want 1", n)
			}
			d.carry()
			d.want(sharing2)
			d.gone(2, other) // its permission is idle
			d.snapshot(3, old)
			d.want(sharing2)
			for now := testPolicy.Retry; now <= lifetime+testPolicy.Retry; now += testPolicy.Retry {
				d.m.Tick(now, 10)
				d.carry()
			}
			d.want() // the old flow brings nothing back
			d.open(2*lifetime, sharing3, "203.0.113.5:11")
			d.want(sharing3)
			d.open(2*lifetime, sharing1, "203.0.113.5:12") // asks again, and waits
			d.want(sharing3)
			d.m.Revoke(2*lifetime, func(p Permission) bool { return p.Int == ep(sharing3) })
			d.carry()
			d.want(sharing1)
		})
	}
}

// A revoked claim that is asked for again comes before those that are still revoked, and
// after those that wait.
//
// Fails when claimOut does not move a revoked claim.
func TestWhoAsksAgainWaitsForTheOthers(t *testing.T) {
	d := newDesk(t, nil)
	d.open(0, sharing1, "203.0.113.5:9")
	second := d.open(0, sharing2, "203.0.113.5:10")
	third := d.open(0, sharing3, "203.0.113.5:11")
	d.m.Revoke(1, func(p Permission) bool { return p.Int != ep(sharing2) })
	d.carry()
	d.want(sharing2)
	d.open(2, sharing3, "203.0.113.5:12")
	d.want(sharing2)
	d.gone(3, third)
	d.gone(4, second)
	d.want(sharing3)
}

// A host that waits does not get the permission when its turn comes if it has been silent for a
// lifetime. Its flow is queried, and its next packet brings the permission.
//
// Fails when grant does not check whether the lifetime is over.
func TestSilentHostInheritsNothing(t *testing.T) {
	d := newDesk(t, nil)
	d.m.SetTimeouts(Timeouts{UDP: 4 * lifetime, Stream: 4 * lifetime})
	owner := d.counted(sharing1, "203.0.113.5:9", 4*lifetime)
	silent := d.counted(sharing2, "203.0.113.5:10", 4*lifetime)
	d.snapshot(0, owner, silent)
	owner.OrigPackets++
	silent.ReplyPackets++ // its peer alone keeps it alive
	d.snapshot(lifetime-1, owner, silent)
	d.wantOps("its turn", d.gone(lifetime, owner), Revoke, Query)
	d.wantOps("it was silent", d.seen(lifetime, silent))
	d.want()
	silent.OrigPackets++
	d.wantOps("it sends", d.seen(lifetime+1, silent), Grant)
	d.want(sharing2)
}

// A host that sends goes before one that came earlier and has been silent for a lifetime, which
// comes next once it sends again.
//
// Fails when skipOverdue looks at the first claim alone.
func TestHostThatSendsInheritsBeforeASilentOne(t *testing.T) {
	d := newDesk(t, nil)
	owner := d.open(0, sharing1, "203.0.113.5:9")
	silent := d.open(0, sharing2, "203.0.113.5:10")
	sends := d.open(lifetime-2, sharing3, "203.0.113.5:11")
	d.seen(lifetime-1, owner)
	d.wantOps("one sends", d.gone(lifetime, owner), Revoke, Grant)
	d.want(sharing3)
	d.seen(lifetime+1, silent)
	d.wantOps("it sends again, and comes next", d.gone(lifetime+2, sends), Revoke, Grant)
	d.want(sharing2)
}

// If all are revoked at once, none stands even for a moment.
//
// Fails when Revoke lets the next one stand before it has asked about all.
func TestRevokeOfSharedPermissionGrantsNothing(t *testing.T) {
	d := newDesk(t, nil)
	d.open(0, sharing1, "203.0.113.5:9")
	d.open(0, sharing2, "203.0.113.5:10")
	d.m.Revoke(1, func(Permission) bool { return true })
	d.wantOps("all revoked", d.carry(), Revoke, Deny)
}

// A claim that waits is not renewed: another one has its Key.
//
// Fails when a claim keeps its timer, or the end that its flows were queried for, while it waits.
func TestClaimThatWaitsHasNoTimer(t *testing.T) {
	for name, passOver := range map[string]func(d *desk){
		"refused after its flows were queried": func(d *desk) {
			d.tick(lifetime)
			d.m.Refused(lifetime+1, d.view(sharing1).Permission, ReasonTableFull, true)
			d.tick(lifetime + testPolicy.Retry + 2*time.Second)
		},
		"refused for a forward that goes": func(d *desk) {
			d.m.SetForwards(lifetime-5*time.Second, forwardsPort(1, Endpoint{}), true)
			d.m.SetForwards(lifetime+1, nil, true)
			d.carry()
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, nil)
			owner := d.open(0, sharing1, "203.0.113.5:9")
			sends := d.open(0, sharing2, "203.0.113.5:10")
			d.seen(lifetime-1, sends)
			passOver(d)
			d.want(sharing2)
			for now := lifetime + 2*testPolicy.Retry; now < 4*lifetime; now += lifetime / 8 {
				d.seen(now, sends)
				d.seen(now, owner)
				d.ops = nil
				d.tick(now)
				for _, o := range d.ops {
					if o.Int != ep(sharing2) {
						t.Errorf("%v: %v for %v, which waits", now, o.Kind, o.Int)
					}
				}
			}
		})
	}
}

// The map may still have the former owner's element, and no denial ends it: the refused host has no
// flow left.
func TestNothingIsLeftOfTheOwnerBeforeOneThatIsRefused(t *testing.T) {
	d := newDesk(t, learned)
	owner := d.open(0, sharing1, "203.0.113.5:9")
	second := d.open(0, sharing2, "203.0.113.5:10")
	d.m.FlowGone(1, owner)
	d.m.Ops() // not carried out: a socket has the port now
	next := d.view(sharing2)
	if next.State != StateStanding {
		t.Fatalf("the next one is %v", next.State)
	}
	d.m.FlowGone(1, second)
	d.m.Refused(1, next.Permission, ReasonLocalSocket, false)
	d.carry()
	d.want()
}

func (r *refModel) isOver(now time.Duration, c *refClaim) bool {
	return now >= c.refreshed+r.policy.Lifetime
}

// passOver is Model.skipOverdue.
func (r *refModel) passOver(now time.Duration, c *refClaim) {
	for _, x := range r.ofKey(c.Key) {
		if x.revoked() || r.isOver(now, x) {
			continue
		}
		c.state, c.reason = StateWaiting, ReasonNone
		r.claims = slices.DeleteFunc(r.claims, func(y *refClaim) bool { return y == x })
		r.claims = slices.Insert(r.claims, slices.Index(r.claims, c), x)
		r.grant(now, x)
		return
	}
	c.state, c.reason = StateRefused, ReasonIdle
	r.asked = append(r.asked, c)
}

// leaveOut forgets f, a new child that is dropped at once, if a forward covers its port.
func (r *refModel) leaveOut(now time.Duration, f *Flow) {
	_, p := r.classify(f)
	if c := r.find(p.Key, p.Int); c != nil && r.barred(now, c) {
		c.flows = slices.DeleteFunc(c.flows, func(fl *refFlow) bool { return fl.child && fl.id == f.ID })
	}
}
