package engine

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

const (
	lifetime = time.Minute
	retry    = 10 * time.Second
	udpTime  = 4 * lifetime // how long conntrack keeps a flow
)

var (
	extAddr = cone.AddrFrom4([4]byte{198, 51, 100, 1})
	inside  = netip.MustParsePrefix("10.47.11.0/24")
	stander = cone.EndpointFrom(netip.MustParseAddrPort("192.0.2.77:9")) // nobody inside ever sends to it

	topology = cone.Topology{
		Local:  []netip.Addr{extAddr.Netip()},
		Routes: []cone.Route{{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Outside: true}},
	}
)

// policies are those between which the daemon of a world may be reloaded, without a change
// of backends.
func policies(name string) []cone.Policy {
	base := cone.Policy{Subnets: []cone.Subnet{{Prefix: inside}}, Labels: true, Lifetime: lifetime, Retry: retry, ExcludePeerPorts: []uint16{53}}
	switch name {
	case "expectations":
		base.Expected = true
	case "map":
		base.Mapped = true
	case "learned":
		base.Mapped, base.Learned = true, true
	case "both":
		base.Mapped, base.Expected = true, true
	case "auto":
		base.Mapped, base.Expected, base.Learned = true, true, true
	}
	limited, grouped, open, short := base, base, base, base
	limited.Limits = cone.Limits{Total: 5, PerSubnet: 4, PerHost: 2, Children: 2}
	grouped.PeerGroups = []netip.Prefix{groupOf.Peers()}
	open.Subnets = []cone.Subnet{{Prefix: netip.MustParsePrefix("10.47.11.110/32"), Filtering: cone.EndpointIndependent}, {Prefix: inside}}
	short.Lifetime, short.ExcludePeerPorts = lifetime/2, []uint16{53, 5070}
	all := []cone.Policy{base, limited, grouped, open, short}
	if base.Expected && base.Mapped {
		related, groupRelated := base, grouped
		related.Subnets = []cone.Subnet{{Prefix: inside, Choice: cone.ChooseBoth}}
		groupRelated.Subnets = related.Subnets
		all = append(all, related, groupRelated)
	}
	return all
}

var worlds = []string{"expectations", "map", "learned", "both", "auto"}

// contact says that an inside host sent to a peer from one outside endpoint.
type contact struct {
	in, ext cone.Endpoint
	peer    cone.Addr
}

// A world drives an Engine and a fake kernel through the life of a gateway.
type world struct {
	t        *testing.T
	rnd      *rand.Rand
	now      time.Duration
	k        *fakeKernel
	e        *Engine
	compare  *Comparer
	policies []cone.Policy
	policy   cone.Policy
	// The last packet from inside, or of a flow from inside: if a daemon sees that flow for the
	// first time, it does not know which side sent the packet.
	sent    map[contact]time.Duration
	revoked map[cone.Endpoint]bool // inside endpoints whose permissions the user revoked once
	handed  map[cone.Endpoint]bool // outside endpoints with revocations that a daemon left to the next
	log     []string

	started  time.Duration // when the daemon started
	wasShort time.Duration // when a shorter lifetime was in force last

	overrun   bool // events are being lost
	failed    bool // requests failed at some time
	foisted   bool // somebody made an element that a grant may find, which renews nothing before Linux 6.12
	disturbed bool // since the last reconcile the kernel may differ from the model
}

func newWorld(t *testing.T, rnd *rand.Rand, kind string) *world {
	w := &world{t: t, rnd: rnd, policies: policies(kind), sent: map[contact]time.Duration{}, revoked: map[cone.Endpoint]bool{}, handed: map[cone.Endpoint]bool{}}
	w.k = newFakeKernel(func() time.Duration { return w.now }, rnd)
	w.k.renews = rnd.IntN(2) == 0
	w.policy = w.policies[0]
	w.start()
	return w
}

func (w *world) notef(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%v ", w.now)+fmt.Sprintf(format, args...))
}

func (w *world) failf(format string, args ...any) {
	w.t.Helper()
	for _, v := range w.views() {
		w.notef("  claim %v %v->%v: %v %v by %v (%v), expires %v", v.Peers(), v.Ext, v.Int, v.State, v.Reason, v.By, v.Why, v.Expires)
	}
	w.t.Fatalf("%s\n%s", strings.Join(w.log[max(0, len(w.log)-1200):], "\n"), fmt.Sprintf(format, args...))
}

// start starts a daemon, which adopts what an earlier one left, as package daemon does.
func (w *world) start() {
	var k Kernel
	var adopted []Placed
	if w.policy.Expected {
		x, found := w.k.adoptExpectations(w.policy.Lifetime)
		k.Expectations, adopted = x, found
	}
	if w.policy.Mapped {
		m, found := w.k.adoptMap(w.policy.Lifetime, groups(w.policy))
		k.Map, adopted = m, slices.Concat(adopted, found)
	}
	k.Flows, k.Sockets, k.Revoked = w.k, w.k, w.k
	m := cone.New(w.policy)
	w.e = New(m, k, Config{
		Now: func() time.Duration { return w.now },
		Failed: func(r Request, n int, err error, _ ...any) {
			if err != nil && w.k.failing == 0 {
				w.failf("%s: %v", r, err)
			}
		},
		Took: func(time.Duration) {}, Between: func() {},
	})
	w.compare = &Comparer{InLoop: func(f func(*Engine)) bool { f(w.e); w.apply(); return true }, Between: func() {}}
	w.e.SetServed(fakePorts(w.k.sockets), fakePorts(w.k.sockets))
	m.SetTopology(w.now, topology)
	m.SetForwards(w.now, w.forwarded, true)
	m.SetTimeouts(cone.Timeouts{UDP: udpTime, Stream: udpTime})
	m.Revoked(w.now, revokedKeys(sortedKeys(w.k.revoked)))
	for key := range w.k.revoked {
		w.handed[key.Ext] = true
	}
	for _, f := range w.k.flows {
		// A revocation is not handed on while another host has that permission.
		// Nor under another policy.
		if p := w.permission(f); f.revoked && (!w.k.revoked[p.Key] || slices.Contains(w.policy.ExcludePeerPorts, f.ReplySrc.Port)) {
			f.revoked = false
			w.noteSent(f, f.last)
		}
	}
	for _, p := range adopted {
		w.notef("  adopt %v %v->%v by %v, %v left", p.Peers(), p.Ext, p.Int, p.By, p.Left)
		if w.disturbed {
			w.sent[contact{p.Int, p.Ext, p.Peer}] = w.now // nobody can tell whose it is
		}
		m.Adopt(w.now, p.Permission, p.By, w.now+p.Left)
	}
	w.apply()
	w.overrun, w.disturbed, w.started = false, true, w.now
	w.reconcile()
}

func groups(p cone.Policy) map[cone.Addr]uint8 {
	if len(p.PeerGroups) == 0 {
		return nil
	}
	return map[cone.Addr]uint8{groupOf.Peer: groupOf.HostBits}
}

func (w *world) forwarded(p cone.Permission) cone.Forwarding {
	switch to, is := w.k.forwards[p.Ext]; {
	case !is:
		return cone.NotForwarded
	case to == p.Int:
		return cone.ForwardedHere
	}
	return cone.ForwardedElsewhere
}

func (w *world) apply() { w.e.Apply(0) }

// event reports a flow to the daemon, unless events are lost.
func (w *world) event(f *fakeFlow, gone bool) {
	if w.overrun {
		return
	}
	x := w.k.shown(f)
	if gone {
		x.MasterSrc, x.MasterDst, x.Labelled, x.Left = cone.Endpoint{}, cone.Endpoint{}, false, 0
		w.e.FlowGone(w.now, &x)
	} else {
		x.Began, x.HasCounters, x.OrigPackets = true, false, 0
		w.e.Model.FlowSeen(w.now, &x)
	}
	w.apply()
}

// reconcile does what the reconcile of package daemon does.
func (w *world) reconcile() {
	w.overrun = false
	w.lookAtSockets()
	w.e.Model.BeginSnapshot(w.now)
	anchors := slices.SortedFunc(maps.Keys(w.k.anchors), func(a, b anchor) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	for _, a := range anchors { // by order, so that a run depends on its seed alone
		w.e.SnapshotFlow(w.now, &cone.Flow{
			Status: cone.StatusConfirmed | cone.StatusAssured, Helped: true, Src: cone.Endpoint{Addr: a.in}, Dst: cone.Endpoint{Addr: a.peer, Port: a.port},
			ReplySrc: cone.Endpoint{Addr: a.peer, Port: a.port}, ReplyDst: cone.Endpoint{Addr: a.in},
		})
	}
	for _, f := range slices.Clone(w.k.flows) {
		x := w.k.shown(f)
		w.e.SnapshotFlow(w.now, &x)
	}
	w.e.Model.EndSnapshot(w.now)
	w.apply()
	meddled := false
	if m, ok := w.e.Kernel.Map.(*fakeMap); ok {
		meddled = m.broken || !w.k.table
		m.broken, w.k.table = false, true
	}
	if err := w.compare.Repair(meddled, false); err != nil && w.k.failing == 0 {
		w.failf("repair: %v", err)
	}
}

func (w *world) lookAtSockets() {
	ports := fakePorts(maps.Clone(w.k.sockets))
	w.e.SetServed(ports, ports)
	w.e.ReviewSockets()
	w.apply()
}

// rest lets the kernel work again and the daemon reconcile, until nothing is to be done.
func (w *world) rest() {
	w.notef("rest")
	if w.k.failing > 0 || w.foisted {
		w.k.failing, w.k.fickle, w.foisted = 0, 0, false
		w.reconcile()
		w.pass(lifetime/2 + time.Second) // what stood already and was granted is renewed
	}
	w.reconcile()
	w.pass(retry + time.Second) // refused ones are tried again
	w.reconcile()
	w.disturbed = false
	w.check()
	w.checkAll()
}

// pass lets time pass for kernel and daemon.
func (w *world) pass(d time.Duration) {
	for ; d > 0; d -= time.Second {
		w.age(min(d, time.Second))
		w.tick()
	}
}

func (w *world) tick() {
	for w.e.Model.Tick(w.now, 8) {
		w.apply()
	}
	w.apply()
}

// age lets time pass for the kernel.
func (w *world) age(d time.Duration) {
	w.now += d
	for _, f := range slices.Clone(w.k.flows) { // the daemon ends others when one is gone
		if i := slices.Index(w.k.flows, f); i >= 0 && w.now-f.last >= udpTime {
			w.gone(i)
		}
	}
	w.k.expire()
}

// gone ends flow i.
func (w *world) gone(i int) {
	f := w.k.flows[i]
	w.notef("gone %v->%v", f.Src, f.Dst)
	w.k.flows = slices.Delete(w.k.flows, i, i+1)
	w.event(f, true)
}
