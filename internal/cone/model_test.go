package cone

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone/conetest"
)

const lifetime = 64 * time.Second // a grain is one second

var (
	testPolicy = Policy{
		Subnets:          []Subnet{{Prefix: netip.MustParsePrefix("10.47.11.0/24")}},
		Expected:         true,
		Labels:           true,
		Lifetime:         lifetime,
		Retry:            10 * time.Second,
		ExcludePeerPorts: []uint16{53},
	}
	testTopology = Topology{
		Local:  []netip.Addr{netip.MustParseAddr("198.51.100.1")},
		Routes: []Route{{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Outside: true}},
	}
)

// stranger is a host that nobody inside ever sends to.
var stranger = ep("192.0.2.77:9")

// traffic is one random thing that happens in a network.
func (w *world) traffic() {
	switch n := w.rnd.IntN(100); {
	case n < 30: // an inside host opens a flow
		in, peer, ext := w.inside(), w.peer(), w.ext()
		w.open(Flow{Status: StatusSrcNAT, Src: in, Dst: peer, ReplySrc: peer, ReplyDst: ext})
	case n < 50: // a peer uses a permission
		keys := slices.SortedFunc(maps.Keys(w.kernel), func(a, b Key) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		if len(keys) > 0 {
			k := keys[w.rnd.IntN(len(keys))]
			in := w.kernel[k]
			from := Endpoint{k.Peer, uint16(6000 + w.rnd.IntN(3))}
			if other := w.peer().Addr; k.Peers().Contains(other.Netip()) {
				from.Addr = other
			}
			f := Flow{Status: StatusDstNAT, Src: from, Dst: k.Ext, ReplySrc: in, ReplyDst: from}
			if w.by[k]&ByExpectation != 0 {
				f.Status |= StatusExpected
				f.MasterSrc, f.MasterDst = Endpoint{Addr: in.Addr}, Endpoint{k.Peer, k.Ext.Port}
			} else {
				f.Labelled = w.policy.Labels
			}
			w.open(f)
		}
	case n < 52: // a stranger uses a forward of the user's
		from, in := stranger, ep("10.47.11.200:80")
		if w.policy.Mapped { // or a peer, or it leads where a mapping does
			from = []Endpoint{stranger, w.peer()}[w.rnd.IntN(2)]
			in = []Endpoint{in, w.inside(), w.inside()}[w.rnd.IntN(3)]
		}
		if len(w.policy.PeerGroups) > 0 { // a full cone makes no difference between strangers
			from, in = stranger, ep("10.47.11.200:80")
		}
		w.open(Flow{Status: StatusDstNAT, Src: from, Dst: w.ext(), ReplySrc: in, ReplyDst: from})
	case n < 55: // an early packet
		from, ext := w.peer(), w.ext()
		w.open(Flow{Src: from, Dst: ext, ReplySrc: ext, ReplyDst: from})
	case len(w.flows) == 0:
	case n < 70: // packets from inside
		f := w.flows[w.rnd.IntN(len(w.flows))]
		w.last[f.ID] = w.now
		if w.policy.Mapped && w.rnd.IntN(5) == 0 {
			f.Status ^= StatusOffload
		}
		switch {
		case f.Status.Has(StatusOffload):
			f.Status |= StatusSeenReply
		case f.Status.Has(StatusSrcNAT):
			f.OrigPackets++
			w.send(f, false)
		default:
			f.ReplyPackets++
			f.Status |= StatusSeenReply
		}
	case n < 95:
		w.gone(w.rnd.IntN(len(w.flows)))
	default: // an event is lost
		i := w.rnd.IntN(len(w.flows))
		w.notef("lost %v", w.flows[i].ID)
		w.flows = append(w.flows[:i], w.flows[i+1:]...)
	}
}

// change is one random thing that a user does.
func (w *world) change() {
	switch in := w.inside(); {
	case !w.policy.Mapped:
	case len(w.policy.PeerGroups) > 0 || w.rnd.IntN(2) == 0:
		w.notef("revoke %v", in)
		w.m.Revoke(w.now, func(p Permission) bool { return p.Int == in })
		w.ref.revoke(w.now, in)
	default:
		w.live = 0
		w.m.SetRoom(w.now, Room{New: 1000, Live: 1000, Lack: ReasonNoRoom})
		p := w.ref.policy
		p.Mapped = !p.Mapped
		p.Learned = p.Mapped && w.policy.Learned
		w.notef("mapped %v", p.Mapped)
		w.m.SetPolicy(w.now, p)
		w.ref.setPolicy(w.now, p)
		w.apply()
		for _, k := range slices.Collect(maps.Keys(w.by)) { // the map goes
			if !p.Mapped && w.taught[k] {
				w.fall(k, ByMap)
			}
		}
	}
}

// bound changes the room for expectations, which does not matter to permissions that the
// map can carry.
func (w *world) bound() {
	w.live = 1 + w.rnd.IntN(4)
	r := Room{New: w.rnd.IntN(w.live + 1), Live: w.live, Lack: ReasonNoRoom}
	w.notef("room %+v", r)
	w.m.SetRoom(w.now, r)
}

// bounded reports whether a lack of room does not change what stands.
func (w *world) bounded() bool {
	return w.ref.policy.Mapped && w.full == 0 && w.policy.Subnets[0].Choice != ChooseMap && w.m.snap.complete
}

// The model and the naive reference must agree after every step, and no grant
// may meet a standing permission of somebody else's. Fails, for instance, when
// withdraw is left out of end, or when settle forgets to yield.
func TestModelAgreesWithNaiveReference(t *testing.T) {
	for name, p := range policies() {
		t.Run(name, func(t *testing.T) { agree(t, p) })
	}
}

func agree(t *testing.T, p Policy) {
	runs, steps := 400, 400
	if testing.Short() {
		runs = 40
	}
	for seed := range runs {
		w := newWorld(t, uint64(seed), p)
		w.acct = seed%2 == 1
		w.setTimed(seed%4 >= 2)
		w.full = seed % 3 * 10
		for range steps {
			w.step()
		}
		w.end()
	}
}

// step is one thing that happens.
func (w *world) step() {
	w.t.Helper()
	switch n := w.rnd.IntN(100); {
	case n < 70:
		w.traffic()
	case n < 73 && w.bounded():
		w.bound()
	case n < 94:
		w.tick(time.Duration(1+w.rnd.IntN(20)) * time.Second)
	case n < 95:
		w.change()
	case n < 96 && w.policy.Mapped:
		w.tick(forwardMemory)
	case n < 96:
		w.tick(10 * lifetime)
	default:
		w.snapshot()
	}
	w.check()
}

func (w *world) end() {
	w.t.Helper()
	w.m.RevokeAll()
	w.apply()
	if len(w.kernel) != 0 {
		w.failf("after RevokeAll %d permissions stand", len(w.kernel))
	}
}

// policies are those of the worlds.
func policies() map[string]Policy {
	mapped := testPolicy
	mapped.Mapped = true
	mapped.Limits.Children = 2
	unlabelled := mapped
	unlabelled.Labels = false
	learned := mapped
	learned.Learned = true
	hostBits := learned
	hostBits.PeerGroups = []netip.Prefix{netip.MustParsePrefix("203.0.113.6/31")}
	hostBits.Subnets = []Subnet{
		{Prefix: netip.MustParsePrefix("10.47.11.110/32"), Filtering: EndpointIndependent}, // the first that fits
		{Prefix: netip.MustParsePrefix("10.47.11.0/24")},
	}
	expand := testPolicy
	expand.PeerGroups = hostBits.PeerGroups
	both, bothLearned := mapped, learned
	both.Subnets = []Subnet{{Prefix: testPolicy.Subnets[0].Prefix, Choice: ChooseBoth}}
	bothLearned.Subnets = both.Subnets
	return map[string]Policy{
		"expected": testPolicy, "expand": expand, "mapped": mapped, "unlabelled": unlabelled, "learned": learned, "hostBits": hostBits,
		"both": both, "both, learned": bothLearned,
	}
}

// The same with the inputs that a fuzzer finds.
func FuzzModelAgreesWithNaiveReference(f *testing.F) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 8 {
		all := make([]byte, 600)
		for i := range all {
			all[i] = byte(rnd.Uint32())
		}
		f.Add(all)
	}
	names := slices.Sorted(maps.Keys(policies()))
	f.Fuzz(func(t *testing.T, all []byte) {
		if len(all) == 0 || len(all) > 4096 {
			return
		}
		w := newWorld(t, 0, policies()[names[int(all[0])%len(names)]])
		w.acct, w.full = all[0]&4 != 0, int(all[0]>>3&1)*20
		w.setTimed(all[0]&16 != 0)
		c := &conetest.Choices{Left: all[1:]}
		w.rnd = rand.New(c)
		for len(c.Left) > 0 {
			w.step()
		}
		w.end()
	})
}
