package expect_test

import (
	"maps"
	"testing"
	"time"

	"github.com/ti-mo/conntrack"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

func TestWhatSomebodyElseExpectsIsLeftAlone(t *testing.T) {
	for _, from := range []string{"203.0.113.5", "0.0.0.0"} {
		// The helper's own timeout suits the second lifetime alone.
		for _, lifetime := range []time.Duration{time.Minute, 5 * time.Minute, time.Hour} {
			t.Run(from+" "+lifetime.String(), func(t *testing.T) {
				g := newGate(t, lab.Options{})
				b := g.open(lifetime)
				x := g.stranger(from, "198.51.100.1:5060")
				if got, want := g.grant(b, seed), (refusals{0: cone.ReasonHelper}); !maps.Equal(got, want) {
					t.Errorf("refused %v, want %v", got, want)
				}
				g.wantUntouched(x)
				g.wantCounts(1, 0)

				// We may not revoke or list it either.
				g.mustRevoke(b, seed)
				g.wantUntouched(x)
				g.wantPermissions(b)
			})
		}
	}
}

// If the anchor cannot be made, the messages sent after it must not change another
// program's entries.
func TestFailingAnchorLeavesStrangersAlone(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	x := g.stranger("203.0.113.5", "198.51.100.1:5060")
	b.UseHelper("conenat-lost")
	free := perm("198.51.100.1:5061", "10.47.11.109:5060", "203.0.113.5")
	want := refusals{0: cone.ReasonKernel, 1: cone.ReasonKernel}
	if got := g.grant(b, seed, free); !maps.Equal(got, want) {
		t.Errorf("refused %v, want %v", got, want)
	}
	g.wantUntouched(x)
	g.wantCounts(1, 0)
	if b.Standing() != 0 {
		t.Errorf("%d stand", b.Standing())
	}
}

// wantWhole checks that one permission with a lifetime of an hour stands.
func wantWhole(t *testing.T, g *gate) {
	t.Helper()
	x, a := g.expectation(), g.anchor()
	if a.Helper.Name == "" || a.Status&conntrack.StatusAssured == 0 || a.Timeout < 3600 {
		t.Errorf("the anchor has helper %q, status %v, %d s left", a.Helper.Name, a.Status, a.Timeout)
	}
	if x.Timeout < 3000 {
		t.Errorf("the expectation has %d s left", x.Timeout)
	}
}

func TestGrantReplacesAnAnchorWithoutExpectation(t *testing.T) {
	t.Run("of a daemon that died", func(t *testing.T) {
		g := newGate(t, lab.Options{})
		dead := g.open(time.Minute)
		g.mustGrant(dead, seed)
		if err := dead.DeleteExpectation(&seed); err != nil {
			t.Fatal(err)
		}
		g.wantCounts(0, 1)
		b := g.open(time.Hour)
		g.mustGrant(b, seed)
		g.wantPermissions(b, seed)
		wantWhole(t, g)
	})
	t.Run("without a helper", func(t *testing.T) { // as conntrackd commits them
		g := newGate(t, lab.Options{})
		g.entry("10.47.11.109:0", "203.0.113.5:5060", "")
		g.mustGrant(g.open(time.Hour), seed)
		wantWhole(t, g)
	})
	t.Run("that an inside host made by sending from port 0", func(t *testing.T) {
		g := newGate(t, lab.Options{})
		g.sendFromPortZero("203.0.113.5", 5060)
		g.mustGrant(g.open(time.Hour), seed)
		wantWhole(t, g)
	})
}

func TestGrantTakesOverFromAnotherInsideEndpoint(t *testing.T) {
	for _, old := range []cone.Permission{
		perm("198.51.100.1:5060", "10.47.11.109:1234", "203.0.113.5"), // has the same anchor
		perm("198.51.100.1:5060", "10.47.11.110:5060", "203.0.113.5"),
	} {
		for _, adopted := range []bool{true, false} {
			name := old.Int.String()
			if adopted {
				name += ", adopted"
			}
			t.Run(name, func(t *testing.T) {
				g := newGate(t, lab.Options{})
				late := g.open(time.Minute)
				g.mustGrant(g.open(time.Minute), old)
				b := late
				if adopted {
					b = g.open(time.Minute)
				}
				g.mustGrant(b, seed)
				g.wantPermissions(b, seed)
				g.wantCounts(1, 1)
				if b.Standing() != 1 {
					t.Errorf("%d stand", b.Standing())
				}
				g.mustRevoke(b, seed)
				g.wantCounts(0, 0)
			})
		}
	}
}

// Fails when another permission with the same Key ends with one that could not be removed before.
func TestRemovalLaterLeavesTheNextOwnerAlone(t *testing.T) {
	g := newGate(t, lab.Options{})
	b, other := g.open(time.Minute), g.open(time.Minute)
	old := perm("198.51.100.1:5060", "10.47.11.110:5060", "203.0.113.5")
	g.mustGrant(b, old)
	b.Unwanted(&old)
	g.mustGrant(other, seed)
	b.Renew(nil, nil)
	g.wantPermissions(other, seed)
	g.wantCounts(1, 1)
	if b.Standing() != 0 {
		t.Errorf("%d still count", b.Standing())
	}
}

func TestGrantRenewsWhatStandsWithoutAGap(t *testing.T) {
	for name, inherit := range map[string]bool{"its own": false, "an earlier daemon's": true} {
		t.Run(name, func(t *testing.T) {
			g := newGate(t, lab.Options{})
			short := g.open(30 * time.Second)
			b := short
			if !inherit {
				b = g.open(time.Hour) // knows of nothing
			}
			g.mustGrant(short, seed)
			if inherit {
				b = g.open(time.Hour)
			}
			x, a := g.expectation(), g.anchor()
			g.mustGrant(b, seed)
			x2, a2 := g.expectation(), g.anchor()
			if x2.ID != x.ID || a2.ID != a.ID {
				t.Error("it was made anew")
			}
			if x2.Timeout < 1000 || a2.Timeout < 1000 {
				t.Errorf("timeouts are %d and %d", x2.Timeout, a2.Timeout)
			}
			if b.Standing() != 1 {
				t.Errorf("%d stand", b.Standing())
			}
		})
	}
}

// The same permission twice in one batch is renewed; of two with the same Key the later one
// counts.
func TestOneBatchMayContradictItself(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	other := perm("198.51.100.1:5060", "10.47.11.110:5060", "203.0.113.5")
	g.mustGrant(b, seed, seed, other)
	g.wantPermissions(b, other)
	g.wantCounts(1, 1)
	g.mustRevoke(b, other, other)
	g.wantCounts(0, 0)
	if b.Standing() != 0 {
		t.Errorf("%d stand", b.Standing())
	}
}
