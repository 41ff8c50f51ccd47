package engine

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/cone"
)

// A machine is where a body of a test runs: simulated, or the real kernel.
type machine interface {
	// carriers returns the backends of a new daemon, what they adopted, and what the user
	// revoked under an earlier daemon. The map has room for mapSize permissions.
	carriers(p cone.Policy) (Kernel, []Placed, []cone.Key)
	// stands returns what stands, as somebody else lists it: "nft peer ext in".
	stands() []string
	// steal takes a permission from a carrier.
	steal(p cone.Permission, by cone.Carriers)
	// add adds p to the map, for longer than a daemon would.
	add(p cone.Permission)
}

const mapSize = 3

// A stage is a daemon's engine on a machine. Its time passes with comparisons alone.
type stage struct {
	*testing.T
	machine
	now     time.Duration
	policy  cone.Policy
	e       *Engine
	compare *Comparer
	flows   []*cone.Flow
}

// onBoth runs body with each policy, simulated and on the real kernel.
func onBoth(t *testing.T, policies map[string]cone.Policy, body func(s *stage)) {
	for name, p := range policies {
		t.Run("simulated "+name, func(t *testing.T) { runStage(t, newSimulated(), p, body) })
		t.Run("real "+name, func(t *testing.T) { runStage(t, newReal(t), p, body) })
	}
}

func runStage(t *testing.T, m machine, p cone.Policy, body func(s *stage)) {
	s := &stage{T: t, machine: m, policy: p, now: time.Hour}
	s.start()
	body(s)
}

// start starts a daemon.
func (s *stage) start() {
	k, adopted, revoked := s.carriers(s.policy)
	s.e = New(cone.New(s.policy), k, Config{
		Now: func() time.Duration { return s.now },
		Failed: func(r Request, _ int, err error, _ ...any) {
			if err != nil {
				s.Errorf("%s: %v", r, err)
			}
		},
		Took: func(time.Duration) {}, Between: func() {},
	})
	s.compare = &Comparer{InLoop: func(f func(*Engine)) bool { f(s.e); s.e.Apply(0); return true }, Between: func() {}}
	s.e.SetServed(fakePorts{}, fakePorts{})
	s.e.Model.SetTopology(s.now, topology)
	s.e.Model.SetForwards(s.now, nil, true)
	s.e.Model.Revoked(s.now, revokedKeys(revoked))
	for _, p := range adopted {
		s.e.Model.Adopt(s.now, p.Permission, p.By, s.now+p.Left)
	}
	s.e.Apply(0)
	s.snapshot()
}

// snapshot shows the daemon all flows.
func (s *stage) snapshot() {
	s.e.Model.BeginSnapshot(s.now)
	for _, f := range s.flows {
		s.e.SnapshotFlow(s.now, f)
	}
	s.e.Model.EndSnapshot(s.now)
	s.e.Apply(0)
}

// open lets an inside host send to a peer.
func (s *stage) open(in, peer string) cone.Permission {
	s.Helper()
	f := &cone.Flow{
		ID: uint32(len(s.flows)), Status: cone.StatusSrcNAT | cone.StatusConfirmed, Began: true,
		Src: endpoint(in), Dst: endpoint(peer), ReplySrc: endpoint(peer),
	}
	f.ReplyDst = cone.Endpoint{Addr: extAddr, Port: f.Src.Port}
	s.flows = append(s.flows, f)
	s.e.Model.FlowSeen(s.now, f)
	s.e.Apply(0)
	return cone.Permission{Key: cone.Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr}, Int: f.Src}
}

func endpoint(s string) cone.Endpoint { return cone.EndpointFrom(netip.MustParseAddrPort(s)) }

// by is how stands shows p.
func by(c cone.Carriers, p cone.Permission) string {
	return fmt.Sprintf("%v %v %v %v", c, p.Peer, p.Ext, p.Int.Addr)
}

// only returns the carrier of a policy that has just one.
func (s *stage) only() cone.Carriers { return s.e.Kernel.Carriers() }

func (s *stage) want(what string, want ...string) {
	s.Helper()
	slices.Sort(want)
	if diff := cmp.Diff(want, slices.Sorted(slices.Values(s.stands()))); diff != "" {
		s.Errorf("%s: -want +stands\n%s", what, diff)
	}
}

// differences checks what Verify finds.
func (s *stage) differences(what string, missing, unexpected int) {
	s.Helper()
	s.now += time.Millisecond // what was granted before must be listed
	d, err := s.compare.Verify(func(*cone.View) {})
	if err != nil || len(d.Missing) != missing || len(d.Unexpected) != unexpected {
		s.Errorf("%s: %+v, %v; want %d missing, %d unexpected", what, d, err, missing, unexpected)
	}
}

func (s *stage) repair() {
	s.Helper()
	s.now += time.Millisecond
	if err := s.compare.Repair(true, false); err != nil {
		s.Fatal(err)
	}
}

// onlyOne are policies with one carrier.
func onlyOne() map[string]cone.Policy {
	return map[string]cone.Policy{"expect": policies("expectations")[0], "nft": policies("map")[0]}
}

// Fails when the next daemon does not know what the user revoked, or still takes it for
// revoked after a new flow asked for it.
func TestGrantStandsUntilItIsRevoked(t *testing.T) {
	onBoth(t, onlyOne(), func(s *stage) {
		one, two := s.open("10.47.11.109:5060", "203.0.113.5:5060"), s.open("10.47.11.110:5061", "203.0.113.5:5060")
		s.want("granted", by(s.only(), one), by(s.only(), two))
		s.differences("granted", 0, 0)
		s.e.Model.Revoke(s.now, func(p cone.Permission) bool { return p.Int == one.Int })
		s.e.Apply(0)
		s.want("revoked", by(s.only(), two))
		s.snapshot() // the old flow does not bring it back
		s.want("revoked, after a snapshot", by(s.only(), two))
		s.start()
		s.want("revoked, after a restart", by(s.only(), two))
		s.open("10.47.11.109:5060", "203.0.113.5:5070")
		s.want("asked for again", by(s.only(), one), by(s.only(), two))
		s.start()
		s.want("asked for again, after a restart", by(s.only(), one), by(s.only(), two))
	})
}

// Fails when what somebody stole is not put back, or counts as stolen again.
func TestTheftIsRepaired(t *testing.T) {
	onBoth(t, onlyOne(), func(s *stage) {
		one, two := s.open("10.47.11.109:5060", "203.0.113.5:5060"), s.open("10.47.11.110:5061", "203.0.113.5:5060")
		s.steal(one, s.only())
		s.want("stolen", by(s.only(), two))
		s.differences("stolen", 1, 0)
		for range 2 {
			s.repair()
			s.want("repaired", by(s.only(), one), by(s.only(), two))
		}
		if n := s.e.Repaired[PartExpectation] + s.e.Repaired[PartElement]; n != 1 {
			s.Errorf("%d parts are repaired, want 1", n)
		}
	})
}

// Fails when what a list misses is taken for stolen.
func TestIncompleteListIsNoTheft(t *testing.T) {
	m := newSimulated().(simulated)
	runStage(t, m, policies("map")[0], func(s *stage) {
		p := s.open("10.47.11.109:5060", "203.0.113.5:5060")
		m.fickle = 100
		s.differences("nothing is listed", 0, 0)
		s.repair()
		s.want("nothing is listed", by(cone.ByMap, p))
		if n := s.e.Repaired[PartElement]; n != 0 {
			s.Errorf("%d elements are repaired, and none was stolen", n)
		}
	})
}

// A large map is not listed unless somebody meddled with it. If only the daemon can change it,
// each repair looks at a part of it.
//
// Fails when a stolen element is never found, or an unexpected one stays.
func TestLargeMapIsRepaired(t *testing.T) {
	m := newSimulated().(simulated)
	m.mapSize = 2 * ListedAtMost
	runStage(t, m, policies("map")[0], func(s *stage) {
		var last cone.Permission
		for i := range ListedAtMost + 1 {
			last = s.open(fmt.Sprintf("10.47.11.109:%d", 1+i%60000), fmt.Sprintf("203.0.113.%d:5060", 5+i/60000))
		}
		alien := last
		alien.Peer = cone.AddrFrom4([4]byte{203, 0, 113, 99})
		for _, owned := range []bool{false, true} {
			m.steal(last, cone.ByMap)
			m.add(alien)
			repairs := 0
			for ; m.elements[last.Key] == nil && repairs < int(partsOf(ListedAtMost+1)); repairs++ {
				s.now += time.Millisecond
				if err := s.compare.Repair(false, owned); err != nil {
					s.Fatal(err)
				}
			}
			if m.elements[last.Key] == nil || !owned && repairs > 1 {
				s.Errorf("owned %v: not back after %d repairs", owned, repairs)
			}
			if m.elements[alien.Key] == nil {
				s.Errorf("owned %v: the map was listed", owned)
			}
			s.repair()
			if m.elements[alien.Key] != nil {
				s.Errorf("owned %v: an element that nobody asked for stays", owned)
			}
		}
	})
}

// Fails when an event of the end of an anchor is not enough to put its permission back.
func TestStolenAnchorIsRepairedAtOnce(t *testing.T) {
	onBoth(t, map[string]cone.Policy{"expect": policies("expectations")[0]}, func(s *stage) {
		p := s.open("10.47.11.109:5060", "203.0.113.5:5060")
		s.steal(p, cone.ByExpectation)
		s.e.FlowGone(s.now, &cone.Flow{Src: cone.Endpoint{Addr: p.Int.Addr}, Dst: cone.Endpoint{Addr: p.Peer, Port: p.Ext.Port}})
		s.e.Apply(0)
		s.want("repaired", by(cone.ByExpectation, p))
		if s.e.Repaired[PartAnchor] != 1 {
			s.Errorf("%d anchors are repaired, want 1", s.e.Repaired[PartAnchor])
		}
	})
}

// Fails when an element that nobody asked for stays, or one that leads to another host.
func TestUnexpectedEndsAndReplacedIsPutBack(t *testing.T) {
	onBoth(t, map[string]cone.Policy{"nft": policies("map")[0]}, func(s *stage) {
		p := s.open("10.47.11.109:5060", "203.0.113.5:5060")
		alien, other := p, p
		alien.Peer = cone.AddrFrom4([4]byte{203, 0, 113, 99})
		other.Int = endpoint("10.47.11.110:5060")
		s.add(alien)
		s.add(other)
		s.want("meddled with", by(cone.ByMap, alien), by(cone.ByMap, other))
		s.differences("meddled with", 1, 1)
		s.repair()
		s.want("repaired", by(cone.ByMap, p))
		s.differences("repaired", 0, 0)
	})
}

// Fails when a new daemon takes over nothing, or what its policy does not allow.
func TestRestartAdoptsWhatIsAllowed(t *testing.T) {
	onBoth(t, onlyOne(), func(s *stage) {
		one := s.open("10.47.11.109:5060", "203.0.113.5:5060")
		s.open("10.47.11.110:5061", "203.0.113.7:5060")
		s.policy.ExcludePeers = []netip.Prefix{netip.MustParsePrefix("203.0.113.7/32")}
		s.start()
		s.want("after a restart", by(s.only(), one))
		s.differences("after a restart", 0, 0)
		if g := s.e.Model.Stats().Granted; g != 0 {
			s.Errorf("%d grants, want none: it stood", g)
		}
	})
}

// Fails when a full map is not told as full, or when an expectation stands for what it has no room
// for, which leads nowhere.
func TestFullMap(t *testing.T) {
	onBoth(t, map[string]cone.Policy{"nft": policies("map")[0], "both": policies("both")[0]}, func(s *stage) {
		want := map[string]bool{}
		for i := range mapSize + 1 {
			last := s.open(fmt.Sprintf("10.47.11.%d:5060", 109+i), fmt.Sprintf("203.0.113.%d:5060", 5+i))
			want[by(cone.ByMap, last)] = i < mapSize
		}
		maps.DeleteFunc(want, func(_ string, in bool) bool { return !in })
		full := slices.Collect(maps.Keys(want))
		if n := s.e.Model.Stats().Refusals[cone.ReasonTableFull]; n != 1 || s.e.TakeRefusal(cone.ReasonTableFull) == nil {
			s.Errorf("%d refusals because the map is full, want 1 and the kernel's error", n)
		}
		s.want("full", full...)
		s.differences("full", 0, 0)
	})
}

// revokedKeys are keys of the kernel's set, which says nothing of flows.
func revokedKeys(keys []cone.Key) (all []cone.Revoked) {
	for _, k := range keys {
		all = append(all, cone.Revoked{Key: k})
	}
	return all
}

// simulated is a machine with a fake kernel.
type simulated struct{ *fakeKernel }

func newSimulated() machine {
	k := newFakeKernel(func() time.Duration { return time.Hour }, rand.New(rand.NewPCG(1, 1)))
	k.mapSize = mapSize
	return simulated{k}
}

func (m simulated) carriers(p cone.Policy) (k Kernel, adopted []Placed, revoked []cone.Key) {
	if p.Expected {
		k.Expectations, adopted = m.adoptExpectations(p.Lifetime)
	}
	if p.Mapped {
		x, found := m.adoptMap(p.Lifetime, nil)
		k.Map, adopted = x, slices.Concat(adopted, found)
	}
	k.Flows, k.Sockets, k.Revoked = m, m, m
	return k, adopted, sortedKeys(m.revoked)
}

func (m simulated) stands() (all []string) {
	for key, x := range m.expectations {
		all = append(all, by(cone.ByExpectation, cone.Permission{Key: key, Int: x.in}))
	}
	for key, x := range m.elements {
		all = append(all, by(cone.ByMap, cone.Permission{Key: key, Int: x.in}))
	}
	return all
}

func (m simulated) steal(p cone.Permission, by cone.Carriers) {
	if by == cone.ByExpectation {
		m.deleteAnchor(anchorOf(&p))
		return
	}
	delete(m.elements, p.Key)
}

func (m simulated) add(p cone.Permission) {
	m.elements[p.Key] = &element{in: p.Int, until: m.now() + 10*lifetime}
}
