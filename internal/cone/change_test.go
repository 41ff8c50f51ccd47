package cone

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

func TestLimitPerHostLetsTheOldestIdleGoFirst(t *testing.T) {
	d := newDesk(t, func(p *Policy) { p.Limits.PerHost = 3 })
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	older := d.open(1, "10.47.11.109:2", "203.0.113.5:9")
	old := d.open(2, "10.47.11.109:3", "203.0.113.5:9")
	d.open(2, "10.47.11.110:9", "203.0.113.5:9") // another host's limit is his own
	d.open(3, "10.47.11.109:4", "203.0.113.5:9")
	d.want("10.47.11.109:1", "10.47.11.109:2", "10.47.11.109:3", "10.47.11.110:9")
	if n := d.m.Stats().Refusals[ReasonHostLimit]; n != 1 {
		t.Errorf("%d refusals, want 1", n)
	}

	d.gone(4, older)
	d.gone(5, old)
	d.open(6, "10.47.11.109:5", "203.0.113.5:9")
	d.want("10.47.11.109:1", "10.47.11.109:3", "10.47.11.109:5", "10.47.11.110:9")
	// The refused one is tried again, and takes the other's place.
	for now := 7 * time.Nanosecond; d.m.Tick(now, 100) || now < testPolicy.Retry*2; now += time.Second {
		d.carry()
	}
	d.want("10.47.11.109:1", "10.47.11.109:4", "10.47.11.109:5", "10.47.11.110:9")
}

func TestLimitsPerSubnetAndInAll(t *testing.T) {
	two := func(l Limits) func(*Policy) {
		return func(p *Policy) {
			p.Subnets = append(slices.Clone(p.Subnets), Subnet{Prefix: netip.MustParsePrefix("10.47.12.0/24")})
			p.Limits = l
		}
	}
	d := newDesk(t, two(Limits{PerSubnet: 1}))
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	d.open(0, "10.47.11.110:2", "203.0.113.5:9")
	d.open(0, "10.47.12.20:3", "203.0.113.5:9")
	d.want("10.47.11.109:1", "10.47.12.20:3")

	d = newDesk(t, two(Limits{Total: 2}))
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	f := d.open(0, "10.47.12.20:3", "203.0.113.5:9")
	d.open(0, "10.47.11.110:2", "203.0.113.5:9")
	d.want("10.47.11.109:1", "10.47.12.20:3")
	d.gone(1, f)
	d.open(2, "10.47.11.111:4", "203.0.113.5:9")
	d.want("10.47.11.109:1", "10.47.11.111:4")
}

func TestChildrenBeyondTheLimitAreDropped(t *testing.T) {
	d := newDesk(t, func(p *Policy) { p.Limits.Children = 2 })
	f := d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	for port, want := range map[uint16]int{1: 0, 2: 0} {
		if kinds := d.child(0, f, port); len(kinds) != want {
			t.Errorf("child %d: %v", port, kinds)
		}
	}
	if kinds := d.child(0, f, 3); !slices.Equal(kinds, []OpKind{DropUnanswered}) {
		t.Errorf("the child too many: %v", kinds)
	}
	if n := d.m.Stats().Crowded; n != 1 {
		t.Errorf("%d crowded, want 1", n)
	}
}

func TestPolicyChangeTouchesOnlyWhatItForbids(t *testing.T) {
	d := newDesk(t, nil)
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	d.open(0, "10.47.11.110:2", "203.0.113.6:9")
	d.open(0, "10.47.11.200:3", "203.0.113.5:77")
	d.open(0, "10.47.11.201:5060", "203.0.113.5:9")

	p := testPolicy
	p.Subnets = []Subnet{{Prefix: netip.MustParsePrefix("10.47.11.0/25")}, {Prefix: netip.MustParsePrefix("10.47.11.128/25")}}
	p.ExcludePeers = []netip.Prefix{netip.MustParsePrefix("203.0.113.6/32")}
	p.ExcludePeerPorts = []uint16{77}
	p.ExcludePorts = []uint16{5060}
	d.m.SetPolicy(1, p)
	kinds := d.carry()
	d.want("10.47.11.109:1")
	if want := []OpKind{Revoke, Revoke, Revoke}; !slices.Equal(kinds, want) {
		t.Errorf("ops %v, want %v", kinds, want)
	}
	if n := d.m.Stats().Revoked[ReasonPolicy]; n != 3 {
		t.Errorf("%d revoked by policy, want 3", n)
	}
}

func TestDoubtRefreshesWhatStands(t *testing.T) {
	d := newDesk(t, nil)
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	k := d.view("10.47.11.109:1").Key
	d.m.Recheck(k)
	d.wantOps("it stands", d.carry(), Renew)
	d.m.Recheck(Key{Ext: k.Ext, Peer: ep("203.0.113.6:1").Addr})
	d.wantOps("there is none", d.carry())
	d.m.Revoke(0, func(Permission) bool { return true })
	d.carry()
	d.m.Recheck(k)
	d.wantOps("it was revoked", d.carry())
}

// An anchor does not say that it is a group's.
func TestDoubtAboutAGroup(t *testing.T) {
	d := newDesk(t, wildPolicy)
	d.open(0, "10.47.11.109:1", "203.0.113.6:9")
	k := d.view("10.47.11.109:1").Key
	if k.HostBits == 0 {
		t.Fatal(k)
	}
	k.HostBits = 0
	d.m.Recheck(k)
	d.wantOps("it stands", d.carry(), Renew)
}

// A shorter lifetime must reach the kernel at once, and is kept by the wheel.
func TestLifetimeChange(t *testing.T) {
	d := newDesk(t, nil)
	f := d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	p := testPolicy
	p.Lifetime = lifetime / 8
	d.m.SetPolicy(0, p)
	d.m.Tick(lifetime/64, 10)
	if kinds := d.carry(); !slices.Equal(kinds, []OpKind{Renew}) {
		t.Errorf("ops %v, want a renewal", kinds)
	}
	d.gone(lifetime/32, f)
	d.m.Tick(lifetime/4, 10)
	d.carry()
	d.want()
}

func TestAddressThatGoesAwayEndsItsPermissions(t *testing.T) {
	d := newDesk(t, nil)
	d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	other := testTopology
	other.Local = []netip.Addr{netip.MustParseAddr("198.51.100.2")}
	d.m.SetTopology(1, testTopology)
	d.carry()
	d.want("10.47.11.109:1")
	d.m.SetTopology(2, other)
	d.carry()
	d.want()
	if n := d.m.Stats().Revoked[ReasonAddressGone]; n != 1 {
		t.Errorf("%d revoked, want 1", n)
	}
}

// The kernel looks at some packets of an unanswered flow again, and learns what was revoked.
//
// Fails when that stays until the next comparison.
func TestFlowThatEndsOnAnAddressThatIsGoneLeavesNothing(t *testing.T) {
	d := newDesk(t, learned)
	f := d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	d.m.SetTopology(1, testTopology)
	d.carry()
	other := testTopology
	other.Local = []netip.Addr{netip.MustParseAddr("198.51.100.2")}
	d.m.SetTopology(2, other)
	d.carry()
	d.m.FlowGone(3, f)
	if kinds := d.carry(); !slices.Equal(kinds, []OpKind{Revoke}) {
		t.Errorf("ops %v, want what was learned revoked", kinds)
	}
}

// Events may still report flows on an address that is gone; what the kernel learned from
// them ends. Once the address is back, or a lifetime is over, flows on it count again.
func TestFlowOnAnAddressThatIsGoneGivesNothing(t *testing.T) {
	const in, next = "10.47.11.109:1", "10.47.11.109:2"
	other := testTopology
	other.Local = []netip.Addr{netip.MustParseAddr("198.51.100.2")}
	for name, count := range map[string]func(d *desk) time.Duration{
		"back": func(d *desk) time.Duration { d.m.SetTopology(5, testTopology); return 6 },
		"long ago": func(d *desk) time.Duration {
			d.m.SetTopology(lifetime, other) // as at each reconcile
			return lifetime + 2
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, learned)
			d.m.SetTopology(2, other)
			d.open(3, in, "203.0.113.5:9")
			d.want()
			if len(d.ops) != 1 || d.ops[0].Kind != Revoke {
				t.Errorf("ops %v, want what was learned revoked", d.ops)
			}
			if n := d.m.Stats().Skipped[ReasonAddressGone]; n != 1 {
				t.Errorf("%d skipped, want 1", n)
			}
			d.open(count(d), next, "203.0.113.5:9")
			d.want(next)
		})
	}
}

// Fails when the flow, which the kernel ends only with its next packet, gives the permission
// again.
func TestReroutedFlowGivesNothingUntilRoutesChangeAgain(t *testing.T) {
	const in = "10.47.11.109:1"
	d := newDesk(t, nil)
	f := d.open(0, in, "203.0.113.5:9")
	d.m.SetRerouted(1, func(p Permission) bool { return p.Int == f.Src })
	d.m.FlowSeen(2, f)
	d.carry()
	d.want()
	if n := d.m.Stats().Revoked[ReasonRerouted]; n != 1 {
		t.Errorf("%d revoked, want 1", n)
	}
	d.m.SetRerouted(3, nil)
	d.m.FlowSeen(4, f)
	d.carry()
	d.want(in)
}

func TestRevokedPermissionComesBackWithANewFlowOnly(t *testing.T) {
	d := newDesk(t, nil)
	f := d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	if n := d.m.Revoke(1, func(p Permission) bool { return p.Int.Addr == f.Src.Addr }); n != 1 {
		t.Errorf("%d revoked, want 1", n)
	}
	d.carry()
	d.want()
	d.m.BeginSnapshot(2)
	d.m.SnapshotFlow(2, f)
	d.m.EndSnapshot(2)
	for now := 2 * time.Nanosecond; now < lifetime*3; now += time.Second {
		d.m.Tick(now, 10)
	}
	d.carry()
	d.want()
	d.open(lifetime*3, "10.47.11.109:1", "203.0.113.5:10")
	d.want("10.47.11.109:1")
}

func TestForwardsOfRulesWithdrawAndBar(t *testing.T) {
	d := newDesk(t, nil)
	d.open(0, "10.47.11.109:5060", "203.0.113.5:9")
	d.open(0, "10.47.11.109:5061", "203.0.113.5:9")
	d.m.SetForwards(1, forwardsPort(5060, Endpoint{}), true)
	d.carry()
	d.want("10.47.11.109:5061")
	d.open(2, "10.47.11.110:5060", "203.0.113.6:9")
	d.want("10.47.11.109:5061")
	d.m.SetForwards(3, nil, true)
	for now := 3 * time.Nanosecond; now < testPolicy.Retry*2; now += time.Second {
		d.m.Tick(now, 10)
		d.carry()
	}
	d.want("10.47.11.109:5060", "10.47.11.109:5061", "10.47.11.110:5060")
}

// Fails when a start renews a permission for which no traffic from inside was seen: a daemon that
// dies again and again would keep it up for ever. Fails, too, when one whose host still sends is
// not renewed before it ends.
func TestAdoptedPermissionEndsAsItWouldHaveUnlessAFlowHoldsIt(t *testing.T) {
	d := newDesk(t, nil)
	held := Permission{Key: Key{Ext: ep("198.51.100.1:1"), Peer: ep("203.0.113.5:9").Addr}, Int: ep("10.47.11.109:1")}
	lone := Permission{Key: Key{Ext: ep("198.51.100.1:2"), Peer: ep("203.0.113.5:9").Addr}, Int: ep("10.47.11.109:2")}
	alien := Permission{Key: Key{Ext: ep("198.51.100.1:3"), Peer: ep("203.0.113.5:9").Addr}, Int: ep("10.47.12.20:3")}
	for _, p := range []Permission{held, lone, alien} {
		d.up[p.Key] = p.Int
		d.m.Adopt(0, p, ByExpectation, lifetime/2)
	}
	d.carry()
	d.want("10.47.11.109:1", "10.47.11.109:2") // the subnet of the third is not enabled
	d.m.Tick(lifetime/64, 10)
	d.wantOps("adopted", d.carry())
	d.open(lifetime/64, "10.47.11.109:1", "203.0.113.5:9")
	if !slices.ContainsFunc(d.ops, func(o Op) bool { return o.Kind == Renew && o.Int == held.Int }) {
		t.Error("it was not renewed at once")
	}
	for now := lifetime / 32; now <= lifetime/2; now += lifetime / 64 {
		d.m.Tick(now, 10)
		d.carry()
	}
	d.want("10.47.11.109:1")
	if slices.ContainsFunc(d.ops, func(o Op) bool { return o.Kind == Renew && o.Int == lone.Int }) {
		t.Error("it was renewed without traffic from inside")
	}
}

// Fails when traffic of the time of the last write counts as traffic after it: the kernel rounds
// what is left of an expectation.
func TestWhatIsAsOldAsTheLastWriteRenewsNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		seen time.Duration // after the last write
		want []OpKind
	}{
		"at that time": {0, nil}, "a second later": {time.Second, nil}, "later": {3 * time.Second, []OpKind{Renew}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, nil)
			p := Permission{Key: Key{Ext: ep("198.51.100.1:1"), Peer: ep("203.0.113.5:9").Addr}, Int: ep("10.47.11.109:1")}
			d.up[p.Key] = p.Int
			d.m.Adopt(lifetime, p, ByExpectation, lifetime*3/2)
			d.carry()
			d.m.refresh(lifetime, d.m.find(p.Key, p.Int), lifetime/2+tc.seen)
			d.m.Tick(lifetime+lifetime/64, 10)
			d.wantOps("ops", d.carry(), tc.want...)
		})
	}
}

// Of a permission that stands twice, one carrier may have been written later without a reason.
func TestPermissionThatStandsTwiceEndsWithTheFirst(t *testing.T) {
	for _, first := range []Carriers{ByExpectation, ByMap} {
		d := newDesk(t, learned)
		p := Permission{Key: Key{Ext: ep("198.51.100.1:1"), Peer: ep("203.0.113.5:9").Addr}, Int: ep("10.47.11.109:1")}
		d.up[p.Key] = p.Int
		d.m.Adopt(0, p, first, lifetime)
		d.m.Adopt(0, p, (ByExpectation|ByMap)&^first, lifetime/4)
		if got := d.view("10.47.11.109:1").Expires; got != lifetime/4 {
			t.Errorf("%v first: ends at %v, want %v", first, got, lifetime/4)
		}
	}
}

// Whatever happens, the scopes count what stands and list what is idle.
func TestScopesAgreeWithTheClaims(t *testing.T) {
	for seed := range uint64(180) {
		p := testPolicy
		p.Mapped, p.Learned = seed%3 > 0, seed%3 > 1
		p.Limits = Limits{Total: 5, PerSubnet: 4, PerHost: 3, Children: 2}
		w := newWorld(t, seed, p)
		for range 300 {
			if n := w.rnd.IntN(100); n < 60 {
				w.traffic()
			} else if n < 95 {
				w.pass(time.Duration(1+w.rnd.IntN(20)) * time.Second)
				w.m.Tick(w.now, 1000)
			} else if n < 97 {
				p.Limits.PerHost = 1 + w.rnd.IntN(4)
				w.m.SetPolicy(w.now, p)
			} else {
				w.m.BeginSnapshot(w.now)
				for _, f := range w.flows {
					w.m.SnapshotFlow(w.now, f)
				}
				w.m.EndSnapshot(w.now)
			}
			w.apply()
			w.checkScopes()
		}
	}
}

func (w *world) checkScopes() {
	w.t.Helper()
	hosts, listed := map[Addr]int{}, map[Addr]int{}
	total := 0
	var alone [Reasons]int
	for i := range w.m.claims {
		if c := &w.m.claims[i]; c.state == StateStanding {
			if c.placed.By == ByMap && !c.placed.Hidden {
				alone[c.placed.Why]++
			}
			hosts[c.Int.Addr]++
			total++
			if c.isIdle() {
				listed[c.Int.Addr]++
			}
		}
	}
	if len(hosts) != len(w.m.hosts) || total != w.m.stats.Standing || int(w.m.subnets[0].standing) != total || total != len(w.kernel) {
		w.failf("%d stand for %d hosts; the model says %d for %d, %v; the kernel %d",
			total, len(hosts), w.m.stats.Standing, len(w.m.hosts), w.m.subnets, len(w.kernel))
	}
	if got := w.m.MapAlone(w.policy.Subnets[0].Prefix); got != alone {
		w.failf("only the map carries %v; the model says %v", alone, got)
	}
	for a, n := range hosts {
		s := w.m.hosts[a]
		in := 0
		for i := s.first; i != none; i = w.m.claims[i].inHost.next {
			in++
		}
		if int(s.standing) != n || in != listed[a] || in != int(s.listed) {
			w.failf("host %v: %s", a, fmt.Sprint(s, n, in, listed[a]))
		}
	}
}

// Both claims of one key were revoked: the end of the owner's flow must not let
// the other's old flow bring its permission back.
func TestRevokedClaimDoesNotInherit(t *testing.T) {
	d := newDesk(t, nil)
	f := d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	d.open(0, "10.47.11.110:1", "203.0.113.5:10") // the same outside endpoint and peer
	d.m.Revoke(1, func(Permission) bool { return true })
	d.carry()
	d.gone(2, f)
	d.want()
	d.open(3, "10.47.11.110:1", "203.0.113.5:11")
	d.want("10.47.11.110:1")
}

// The first packet of a child arrived just as the permission ended. Its event comes later,
// while the inside host's flow still holds the claim.
func TestChildOfAWithdrawnPermissionIsDropped(t *testing.T) {
	d := newDesk(t, nil)
	f := d.open(0, "10.47.11.109:1", "203.0.113.5:9")
	d.m.Revoke(1, func(Permission) bool { return true })
	d.carry()
	if kinds := d.child(1, f, 77); !slices.Equal(kinds, []OpKind{DropUnanswered}) {
		t.Errorf("ops %v, want the child dropped", kinds)
	}
}

func TestAdoptionHeedsNoLimit(t *testing.T) {
	d := newDesk(t, func(p *Policy) { p.Limits = Limits{Total: 2, PerHost: 1} })
	for _, port := range []uint16{1, 2, 3} {
		in := Endpoint{ep("10.47.11.109:1").Addr, port}
		p := Permission{Key: Key{Ext: Endpoint{ep("198.51.100.1:1").Addr, port}, Peer: ep("203.0.113.5:9").Addr}, Int: in}
		d.up[p.Key] = p.Int
		d.m.Adopt(0, p, ByExpectation, lifetime)
	}
	d.carry()
	d.want("10.47.11.109:1", "10.47.11.109:2", "10.47.11.109:3")
}

// A host at its limit must not keep another one from the outside endpoint.
func TestClaimRefusedForALimitOfItsOwnMakesWay(t *testing.T) {
	d := newDesk(t, func(p *Policy) { p.Limits.PerHost = 1 })
	d.open(0, "10.47.11.109:2", "203.0.113.5:9")
	d.open(0, "10.47.11.109:1", "203.0.113.5:9") // refused
	d.open(0, "10.47.11.110:1", "203.0.113.5:10")
	d.want("10.47.11.109:2", "10.47.11.110:1")
}

// A daemon that was killed had revoked it; the flow is still there.
func TestWhatAnEarlierModelRevokedNeedsANewFlow(t *testing.T) {
	for _, learned := range []bool{false, true} {
		p := testPolicy
		p.Mapped, p.Learned = learned, learned
		m := New(p)
		m.SetTopology(0, testTopology)
		flow := func(id uint32, peer string) *Flow {
			return &Flow{
				ID: id, Status: StatusSrcNAT,
				Src: ep("10.47.11.109:5060"), Dst: ep(peer), ReplySrc: ep(peer), ReplyDst: ep("198.51.100.1:5060"),
			}
		}
		revoked := Key{Ext: ep("198.51.100.1:5060"), Peer: ep("203.0.113.5:1").Addr}
		m.Revoked(0, []Revoked{{Key: revoked}, {Key: Key{Ext: revoked.Ext, Peer: ep("203.0.113.7:1").Addr}}})
		snapshot := func(fs ...*Flow) {
			m.BeginSnapshot(0)
			for _, f := range fs {
				m.SnapshotFlow(0, f)
			}
			m.EndSnapshot(0)
		}
		grants := func(want ...string) {
			t.Helper()
			var got []string
			for _, o := range m.Ops() {
				if o.Kind == Grant {
					got = append(got, o.Peer.String())
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("learned %v: granted %q, want %q", learned, got, want)
			}
		}
		old, other := flow(1, "203.0.113.5:5060"), flow(2, "203.0.113.6:5060")
		snapshot(old, other)
		grants("203.0.113.6")
		m.Walk(0, 9, func(v View) {
			if v.Key == revoked && (v.State != StateRefused || v.Reason != ReasonRevoked) {
				t.Errorf("it is %v, %v", v.State, v.Reason)
			}
		})
		snapshot(old, other)
		grants()
		m.FlowSeen(0, flow(3, "203.0.113.5:5061"))
		grants("203.0.113.5")
		// Nothing held this one, so nothing has to be held back any more.
		snapshot(old, other, flow(3, "203.0.113.5:5061"), flow(4, "203.0.113.7:5060"))
		grants("203.0.113.7")
	}
}
