package expect_test

import (
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

// related is p where a map translates.
func related(p cone.Permission) cone.Permission {
	p.MapTranslates = true
	return p
}

// A map says where children go. So an expectation stands for its Key alone, and another inside
// host takes over the one that is there, without a moment in which there is none. A later backend
// finds it in the same way.
//
// Fails when it is made anew, and when it has a function.
func TestRelatedExpectationPassesToAnotherHost(t *testing.T) {
	for name, later := range map[string]bool{"the same backend": false, "a later one": true} {
		t.Run(name, func(t *testing.T) {
			g := newGate(t, lab.Options{})
			b := g.open(time.Minute)
			p := related(seed)
			g.mustGrant(b, p)
			x := g.expectation()
			if x.Function != "" || x.NAT.Direction {
				t.Errorf("it translates: %+v", x)
			}
			if later {
				b = g.open(time.Minute)
			}
			next := p
			next.Int = perm("198.51.100.1:5060", "10.47.11.110:5060", "203.0.113.5").Int
			g.mustGrant(b, next)
			if got := g.expectation(); got.ID != x.ID || b.Standing() != 1 {
				t.Errorf("it was made anew: %d, had %d; %d stand", got.ID, x.ID, b.Standing())
			}
			b.Renew([]cone.Permission{next}, func(int) { t.Error("it is lost") })
			g.mustRevoke(b, next)
			g.wantCounts(0, 0)
			if b.Standing() != 0 {
				t.Errorf("%d stand", b.Standing())
			}
		})
	}
}

// The anchor is of the host that had the Key first. Somebody flushes the table after the Key has
// passed on, and the expectation is made again.
//
// Fails when it does not count as ours then: cleanup and a later daemon leave it, and the pair of the
// first host and the peer counts as served by a helper of the user's.
func TestRelatedExpectationIsMadeAgainAfterItPassed(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	p := related(seed)
	g.mustGrant(b, p)
	next := p
	next.Int = perm("198.51.100.1:5060", "10.47.11.110:5060", "203.0.113.5").Int
	g.mustGrant(b, next)
	if err := g.Flush(); err != nil {
		t.Fatal(err)
	}
	g.mustGrant(b, next)
	own := 0
	if err := b.List(func(p cone.Permission, _ time.Duration) {
		if p.Key == next.Key {
			own++
		}
	}); err != nil || own != 1 {
		t.Errorf("%d are ours, %v", own, err)
	}
	g.mustRevoke(b, next)
	g.wantCounts(0, 0)
}

// An expectation has to translate when the map goes, and no longer when it comes.
//
// Fails when a grant renews the one that is there.
func TestExpectationTurnsWithTheMap(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	for _, p := range []cone.Permission{seed, related(seed), seed, related(seed)} {
		g.mustGrant(b, p)
		if x := g.expectation(); (x.Function == "") != p.MapTranslates {
			t.Errorf("function %q, and the map translates: %v", x.Function, p.MapTranslates)
		}
		g.wantPermissions(b, p)
		g.wantCounts(1, 1)
		if b.Standing() != 1 {
			t.Errorf("%d stand", b.Standing())
		}
	}
}

// A group of peers has one expectation, if that translates nothing.
func TestRelatedExpectationIsForAGroup(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	p := related(perm("198.51.100.1:5060", "10.47.11.109:5060", "203.0.113.0"))
	p.HostBits = 3
	if !b.Carries(&p) {
		t.Error("it is not for a small group")
	}
	g.mustGrant(b, p)
	g.wantPermissions(b, p)
	g.mustRevoke(b, p)
	g.wantCounts(0, 0)
	p.HostBits = cone.ExpandBits + 1
	if b.Carries(&p) {
		t.Error("it is for a large group")
	}
}
