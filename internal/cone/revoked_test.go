package cone

import (
	"net/netip"
	"testing"
	"time"
)

// What the user revoked stays so when its claim ends though its flow goes on.
//
// Fails when the next snapshot brings it back, or when a new flow does not.
func TestRevokedOutlivesItsClaim(t *testing.T) {
	group := func(p *Policy) { p.PeerGroups = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/28")} }
	grouped := func(c Choice) func(*Policy) {
		return func(p *Policy) {
			choose(c)(p)
			p.Expected = true
			group(p)
		}
	}
	open := func(p *Policy) {
		choose(ChooseMap)(p)
		for i := range p.Subnets {
			p.Subnets[i].Filtering = EndpointIndependent
		}
	}
	for name, tt := range map[string]struct{ before, meanwhile, after func(*Policy) }{
		"the subnet goes and comes": {
			func(*Policy) {}, func(p *Policy) { p.Subnets = nil }, func(*Policy) {},
		},
		"the peer's port is excluded and is not": {
			func(*Policy) {}, func(p *Policy) { p.ExcludePeerPorts = []uint16{9} }, func(*Policy) {},
		},
		"the group is carried as one":    {grouped(ChooseBoth), grouped(ChooseMap), grouped(ChooseMap)},
		"each of the group is":           {grouped(ChooseMap), grouped(ChooseBoth), grouped(ChooseBoth)},
		"the group is no group any more": {grouped(ChooseMap), choose(ChooseMap), choose(ChooseMap)},
		"everybody was let in":           {open, choose(ChooseMap), choose(ChooseMap)},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, tt.before)
			old := d.open(0, sharing1, "203.0.113.5:9")
			if len(d.up) == 0 {
				t.Fatal("nothing stands")
			}
			d.m.Revoke(1, func(Permission) bool { return true })
			d.carry()
			d.want()
			for _, change := range []func(*Policy){tt.meanwhile, tt.after} {
				p := testPolicy
				change(&p)
				d.m.SetPolicy(2, p)
				d.carry()
				d.snapshot(2, old)
				d.want()
			}
			d.open(3, sharing1, "203.0.113.5:10")
			if len(d.up) == 0 {
				t.Error("a new flow does not bring it back")
			}
		})
	}
}

// The address of the outside link goes and comes again.
func TestRevokedOutlivesItsAddress(t *testing.T) {
	d := newDesk(t, nil)
	old := d.open(0, sharing1, "203.0.113.5:9")
	d.m.Revoke(1, func(Permission) bool { return true })
	d.carry()
	for _, topology := range []Topology{{}, testTopology} {
		d.m.SetTopology(2, topology)
		d.carry()
		d.snapshot(2, old)
		d.want()
	}
	d.open(3, sharing1, "203.0.113.5:10")
	d.want(sharing1)
}

// A daemon died before it could end what the user revoked.
//
// Fails when the next daemon takes it over.
func TestRevokedIsNotAdopted(t *testing.T) {
	old := newDesk(t, nil)
	old.open(0, sharing1, "203.0.113.5:9")
	p := old.view(sharing1).Permission
	d := newDesk(t, nil)
	d.m.Revoked(0, []Revoked{{Key: p.Key}})
	d.m.Adopt(0, p, ByExpectation, lifetime)
	d.wantOps("adopt", d.carry(), Revoke)
	d.want()
}

// Two hosts share an outside port and a peer, and the user revokes both permissions.
//
// Fails when only one of them is remembered.
func TestRevokedOfTwoHostsOutliveTheirClaims(t *testing.T) {
	d := newDesk(t, nil)
	one := d.translated(sharing1, "203.0.113.5:9")
	two := d.translated("10.47.11.110:1", "203.0.113.5:10")
	d.seen(0, one)
	d.seen(0, two)
	d.m.Revoke(1, func(Permission) bool { return true })
	for _, subnets := range [][]Subnet{nil, testPolicy.Subnets} {
		p := testPolicy
		p.Subnets = subnets
		d.m.SetPolicy(2, p)
		d.snapshot(2, one, two)
		d.want()
	}
}

// Somebody else made an element for one peer under a permission for everybody that the user had
// revoked. A start takes it away, and does not widen it to what was revoked.
//
// Fails when Adopt does not ask whether the wider permission was revoked.
func TestAdoptedPermissionIsNotWidenedToARevokedOne(t *testing.T) {
	d := newDesk(t, wildPolicy)
	const in = "10.47.11.110:1"
	ext := ep("198.51.100.1:1")
	d.m.Revoked(0, []Revoked{{Key: Key{Ext: ext, Peer: ep("0.0.0.0:1").Addr, HostBits: 32}}})
	d.m.Adopt(0, Permission{Key: Key{Ext: ext, Peer: ep("203.0.113.9:1").Addr}, Int: ep(in)}, ByMap, lifetime)
	d.wantOps("adopted", d.carry(), Revoke)
	d.wantOps("its flow", d.snapshot(1, d.translated(in, "203.0.113.9:9")), Deny)
	d.want()
}

// A daemon stops, and leaves only its answer to AllRevoked to the next one. Meanwhile the
// host may open another flow to the peer.
//
// Fails when the old flow brings the permission back, when the new one does not, whichever
// of them the snapshot shows first, and when later snapshots undo that.
func TestRevokedOutlivesACleanStop(t *testing.T) {
	for name, tt := range map[string]struct {
		shows string // o: the old flow, n: the new one
		back  bool
	}{
		"the old flow": {"o", false}, "the new flow": {"n", true},
		"old and new": {"on", true}, "new and old": {"no", true},
	} {
		t.Run(name, func(t *testing.T) {
			before := newDesk(t, nil)
			old := before.open(0, sharing1, "203.0.113.5:9")
			before.m.Revoke(1, func(Permission) bool { return true })
			before.carry()
			all := before.m.AllRevoked(2)
			if len(all) != 1 || len(all[0].Flows) != 1 || all[0].Flows[0] != old.ID {
				t.Fatalf("revoked %v, want flow %d", all, old.ID)
			}
			d := newDesk(t, nil)
			d.m.Revoked(0, all)
			another := d.translated(sharing1, "203.0.113.5:10")
			another.ID = old.ID + 1
			flows := map[rune]*Flow{'o': old, 'n': another}
			var shown []*Flow
			for _, r := range tt.shows {
				shown = append(shown, flows[r])
			}
			var want []string
			if tt.back {
				want = []string{sharing1}
			}
			for now := range time.Duration(2) {
				d.snapshot(now, shown...)
				d.want(want...)
			}
			if again := d.m.AllRevoked(3); tt.back == (len(again) > 0) {
				t.Errorf("then revoked %v", again)
			}
		})
	}
}

// Fails when a second stop forgets what no claim holds.
func TestRevocationWithoutAClaimIsHandedOn(t *testing.T) {
	d := newDesk(t, nil)
	d.open(0, sharing1, "203.0.113.5:9")
	d.m.Revoke(1, func(Permission) bool { return true })
	p := testPolicy
	p.Subnets = nil
	d.m.SetPolicy(2, p)
	if all := d.m.AllRevoked(3); len(all) != 1 || all[0].Flows != nil {
		t.Errorf("revoked %v", all)
	}
	if all := d.m.AllRevoked(3 + revokedMemory); len(all) > 0 {
		t.Errorf("after two hours %v", all)
	}
}
