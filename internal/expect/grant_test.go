package expect_test

import (
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/ti-mo/conntrack"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/lab"
)

// many returns n permissions with different outside ports.
func many(n int) []cone.Permission {
	ps := make([]cone.Permission, n)
	for i := range ps {
		ps[i] = seed
		ps[i].Ext.Port = uint16(10000 + i)
		ps[i].Int.Port = uint16(20000 + i)
	}
	return ps
}

// peers returns n permissions with different peers on one outside port.
func peers(n int) []cone.Permission {
	ps := make([]cone.Permission, n)
	for i := range ps {
		ps[i] = perm("198.51.100.1:5060", "10.47.11.109:5060", fmt.Sprintf("203.0.113.%d", 100+i))
	}
	return ps
}

func TestOpenLeavesNothingAndPermissionStandsUntilRevoked(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	g.wantCounts(0, 0)
	if v4, v6 := b.Helpers(); v4 == "" || v6 == "" {
		t.Errorf("helpers %q and %q", v4, v6)
	}

	p := seed
	p.Mark = 0x2a
	g.mustGrant(b, p)
	g.wantPermissions(b, seed)
	a := g.anchor()
	if want := conntrack.StatusConfirmed | conntrack.StatusAssured; a.Status&want != want {
		t.Errorf("status of the anchor: %v", a.Status)
	}
	if a.Mark != p.Mark || a.Helper.Name == "" {
		t.Errorf("anchor has mark %#x and helper %q", a.Mark, a.Helper.Name)
	}
	if o := a.TupleOrig; o.IP.SourceAddress.String() != "10.47.11.109" || o.IP.DestinationAddress != lab.PeerA ||
		o.Proto.SourcePort != 0 || o.Proto.DestinationPort != 5060 {
		t.Errorf("anchor is %v", o)
	}
	x := g.expectation()
	if x.Flags != 1 || x.Function != "nat-follow-master" || !x.NAT.Direction {
		t.Errorf("expectation %+v", x)
	}

	g.mustRevoke(b, p)
	g.wantCounts(0, 0)
	if b.Standing() != 0 {
		t.Errorf("%d stand", b.Standing())
	}
}

// The helper's own timeout is used as it is only where it is a little less than
// the lifetime.
func TestExpectationLivesForLifetimeAndAnchorLonger(t *testing.T) {
	const slack = 10 // seconds that the test may take
	for _, tt := range []struct {
		lifetime time.Duration
		least    uint32
	}{
		{time.Minute, 60},
		{5 * time.Minute, 225},
		{time.Hour, 3600},
	} {
		t.Run(tt.lifetime.String(), func(t *testing.T) {
			g := newGate(t, lab.Options{})
			b := g.open(tt.lifetime)
			most := uint32(tt.lifetime / time.Second)
			check := func(when string, least uint32) {
				t.Helper()
				if got := g.expectation().Timeout; got > most || got+slack < least {
					t.Errorf("%s the expectation has %d s left, want %d to %d", when, got, least, most)
				}
				if got := g.anchor().Timeout; got > most+60 || got+slack < most+60 {
					t.Errorf("%s the anchor has %d s left, want %d", when, got, most+60)
				}
			}
			g.mustGrant(b, seed)
			check("granted,", tt.least)
			b.Renew([]cone.Permission{seed}, func(int) { t.Error("lost") })
			check("renewed,", most)
		})
	}
}

func TestGrantRefusesOnlyTheBadOnesOfManyBatches(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.openWith(expect.Config{Lifetime: time.Minute})
	ps := many(200)
	want := refusals{
		0: cone.ReasonHelper, 63: cone.ReasonHelper, 64: cone.ReasonHelper, 150: cone.ReasonHelper, 199: cone.ReasonHelper,
		13: cone.ReasonKernel, 127: cone.ReasonKernel,
	}
	var strangers []conntrack.Expect
	for i, r := range want {
		if r == cone.ReasonHelper {
			strangers = append(strangers, g.stranger("203.0.113.5", ps[i].Ext.String()))
		} else {
			// There is no helper for IPv6, so this one is not even sent.
			ps[i] = perm("[2001:db8::1]:9", "[2001:db8::1]:9", "2001:db8::2")
		}
	}
	got := g.grant(b, ps...)
	if !maps.Equal(got, want) {
		t.Errorf("refused %v, want %v", got, want)
	}
	var stand []cone.Permission
	for i, p := range ps {
		if _, bad := want[i]; !bad {
			stand = append(stand, p)
		}
	}
	g.wantPermissions(b, stand...)
	g.wantCounts(len(stand)+len(strangers), len(stand))
	if b.Standing() != len(stand) {
		t.Errorf("%d stand, want %d", b.Standing(), len(stand))
	}
	for _, x := range strangers {
		g.wantUntouched(x)
	}
	g.mustRevoke(b, ps...)
	g.wantCounts(len(strangers), 0)
}

func TestPeersOnOnePortAreCapped(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	ps := peers(66)
	if got, want := g.grant(b, ps...), (refusals{64: cone.ReasonPeersOnPort, 65: cone.ReasonPeersOnPort}); !maps.Equal(got, want) {
		t.Fatalf("refused %v, want %v", got, want)
	}
	g.mustGrant(b, ps[3]) // stands, so it takes no room
	other := ps[65]
	other.Ext.Port++
	g.mustGrant(b, other)
	other.Ext, other.Zone = ps[65].Ext, 7
	g.mustGrant(b, other)

	g.mustRevoke(b, ps[3])
	g.mustGrant(b, ps[65])
	if got, want := g.grant(b, ps[64]), (refusals{0: cone.ReasonPeersOnPort}); !maps.Equal(got, want) {
		t.Errorf("refused %v, want %v", got, want)
	}
	g.wantCounts(66, 66)
}

func TestNoMoreStandThanMax(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	b.SetMax(3)
	if b.Max() != 3 {
		t.Fatalf("Max = %d", b.Max())
	}
	ps := many(5)
	if got, want := g.grant(b, ps...), (refusals{3: cone.ReasonTableFull, 4: cone.ReasonTableFull}); !maps.Equal(got, want) {
		t.Fatalf("refused %v, want %v", got, want)
	}
	g.mustGrant(b, ps[2]) // stands
	g.mustRevoke(b, ps[1])
	if got, want := g.grant(b, ps[3], ps[4]), (refusals{1: cone.ReasonTableFull}); !maps.Equal(got, want) {
		t.Errorf("refused %v, want %v", got, want)
	}
	g.wantPermissions(b, ps[0], ps[2], ps[3])
}

// A refusal must not use up room.
func TestRefusedPermissionsDoNotCount(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	b.SetMax(1)
	ps := many(2)
	g.stranger("203.0.113.5", ps[0].Ext.String())
	for range 3 {
		if got, want := g.grant(b, ps[0]), (refusals{0: cone.ReasonHelper}); !maps.Equal(got, want) {
			t.Fatalf("refused %v, want %v", got, want)
		}
		if b.Standing() != 0 {
			t.Fatalf("%d stand", b.Standing())
		}
	}
	g.mustGrant(b, ps[1])
}

// With two uplinks an inside endpoint may have the same outside port on both
// outside addresses.
func TestTwoOutsideAddressesShareAnInsideAddressAndPeer(t *testing.T) {
	one := seed
	two := perm("198.51.100.2:5060", "10.47.11.109:5061", "203.0.113.5")
	three := perm("198.51.100.3:5060", "10.47.11.109:5062", "203.0.113.5")
	for _, first := range []cone.Permission{one, two} {
		t.Run(first.Ext.String()+" goes first", func(t *testing.T) {
			g := newGate(t, lab.Options{})
			b := g.open(time.Minute)
			if got, want := g.grant(b, one, two, three), (refusals{2: cone.ReasonTaken}); !maps.Equal(got, want) {
				t.Fatalf("refused %v, want %v", got, want)
			}
			g.wantPermissions(b, one, two)
			g.wantCounts(2, 2)
			g.mustGrant(b, one, two) // each finds its own anchor again
			in, peer, port := one.Int.Addr, one.Peer, one.Ext.Port
			k1, ok1 := b.Anchored(cone.Endpoint{Addr: in}, cone.Endpoint{Addr: peer, Port: port}, 0)
			k2, ok2 := b.Anchored(cone.Endpoint{Addr: in, Port: port}, cone.Endpoint{Addr: peer}, 0)
			if !ok1 || k1 != one.Key || !ok2 || k2 != two.Key {
				t.Errorf("the anchors are those of %+v, %v and %+v, %v", k1, ok1, k2, ok2)
			}

			last := one
			if first == one {
				last = two
			}
			g.mustRevoke(b, first)
			g.wantPermissions(b, last)
			g.wantCounts(1, 1)
			b.Renew([]cone.Permission{last}, func(int) { t.Error("the other one is lost") })
			g.mustGrant(b, three)
			g.mustRevoke(b, last, three)
			g.wantCounts(0, 0)
		})
	}
}

func TestAdoptedPermissionKeepsItsMarkUntilGrantedWithAnother(t *testing.T) {
	g := newGate(t, lab.Options{})
	p := seed
	for _, mark := range []uint32{5, 9, 0} {
		p.Mark = mark
		g.mustGrant(g.open(time.Minute), p)
		if got := g.anchor().Mark; got != mark {
			t.Errorf("mark %d, want %d", got, mark)
		}
		next := g.open(time.Minute)
		for _, a := range next.Adopted() {
			next.Renew([]cone.Permission{a.Permission}, func(int) { t.Error("lost") })
		}
		if got := g.anchor().Mark; got != mark {
			t.Errorf("mark %d of the adopted anchor, want %d", got, mark)
		}
	}
}

func TestZonesAreKeptApart(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	zoned, other := seed, perm("198.51.100.1:9999", "10.47.11.109:9999", "203.0.113.5")
	zoned.Zone, other.Zone = 7, 8
	g.mustGrant(b, zoned)
	if got := g.anchor().Zone; got != 7 {
		t.Errorf("the anchor is in zone %d", got)
	}
	g.wantPermissions(b, zoned)
	g.mustGrant(b, zoned) // renewed
	g.wantCounts(1, 1)

	g.mustGrant(b, seed, other)
	g.wantCounts(3, 3)
	g.wantPermissions(b, seed, zoned, other)

	// The kernel does not report the zone of an expectation.
	next := g.open(time.Minute)
	if next.Standing() != 3 {
		t.Errorf("%d of 3 adopted", next.Standing())
	}
	g.wantPermissions(next, seed, zoned, other)
	if err := next.DeleteExpectation(&zoned); err != nil {
		t.Fatal(err)
	}
	g.wantPermissions(next, seed, other) // not that of zone 7, though its anchor is there
	g.mustGrant(next, zoned)
	g.wantPermissions(next, seed, zoned, other)
	next.Renew([]cone.Permission{zoned, seed}, func(i int) { t.Errorf("permission %d lost", i) })
	g.mustRevoke(next, zoned)
	g.wantPermissions(next, seed, other)
	g.wantCounts(2, 2)
	g.mustRevoke(next, seed, other)
	g.wantCounts(0, 0)
}
