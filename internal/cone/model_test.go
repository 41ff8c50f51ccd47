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

	"github.com/google/go-cmp/cmp"
)

const lifetime = 64 * time.Second // a grain is one second

var (
	testPolicy = Policy{
		Subnets:          []Subnet{{Prefix: netip.MustParsePrefix("10.47.11.0/24")}},
		Lifetime:         lifetime,
		Retry:            10 * time.Second,
		ExcludePeerPorts: []uint16{53},
	}
	testTopology = Topology{
		Local:  []netip.Addr{netip.MustParseAddr("198.51.100.1")},
		Routes: []Route{{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Outside: true}},
	}
)

// world drives a Model and a refModel with the same inputs and plays the
// kernel: it carries out the ops of the Model and holds what stands.
type world struct {
	t      *testing.T
	rnd    *rand.Rand
	now    time.Duration
	m      *Model
	ref    *refModel
	kernel map[Key]Endpoint
	flows  []*Flow // alive
	acct   bool
	nextID uint32
	full   int // grants to be refused, in percent
	log    []string
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{
		t: t, rnd: rand.New(rand.NewPCG(seed, 1)),
		m: New(testPolicy), ref: newRef(testPolicy, testTopology),
		kernel: map[Key]Endpoint{},
	}
	w.m.SetTopology(0, testTopology)
	return w
}

func (w *world) notef(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%v ", w.now)+fmt.Sprintf(format, args...))
}

func (w *world) failf(format string, args ...any) {
	w.t.Helper()
	for _, l := range w.log[max(0, len(w.log)-40):] {
		w.t.Log(l)
	}
	w.t.Fatalf(format, args...)
}

// apply carries out what the model decided, as the kernel would.
func (w *world) apply() {
	for ops := w.m.Ops(); len(ops) > 0; ops = w.m.Ops() {
		for _, o := range ops {
			w.notef("  %v %v %v->%v", o.Kind, o.Peer, o.Ext, o.Int)
			owner, stands := w.kernel[o.Key]
			switch o.Kind {
			case Grant:
				if stands && owner != o.Int {
					w.failf("grant of %v to %v while %v owns it", o.Key, o.Int, owner)
				}
				if w.rnd.IntN(100) < w.full {
					w.m.Refused(w.now, o.Permission, ReasonTableFull, false)
					w.ref.refused(w.now, o.Permission, ReasonTableFull)
					continue
				}
				w.kernel[o.Key] = o.Int
				w.m.Granted(o.Permission)
			case Revoke:
				if stands && owner != o.Int {
					w.failf("revoke of %v for %v hits %v", o.Key, o.Int, owner)
				}
				delete(w.kernel, o.Key)
			case Refresh:
				if !stands || owner != o.Int {
					w.failf("refresh of %v for %v, which does not stand", o.Key, o.Int)
				}
			case DropUnanswered:
				for i, f := range w.flows {
					if f.ID == o.ID && !f.Status.Has(StatusSeenReply) {
						w.gone(i)
						break
					}
				}
			case DropEarly:
				if !stands {
					w.failf("early flow of %v dropped without a permission", o.Key)
				}
			case Query: // answered by ask, for model and reference at once
			}
		}
	}
}

func (w *world) check() {
	w.apply()
	want := w.ref.standing()
	if !maps.Equal(w.kernel, want) {
		w.failf("standing permissions differ (-want +got)\n%s", cmp.Diff(fmt.Sprint(want), fmt.Sprint(w.kernel)))
	}
	if n := w.m.Stats().Standing; n != len(want) {
		w.failf("Stats.Standing is %d, want %d", n, len(want))
	}
}

func (w *world) seen(f *Flow) {
	w.m.FlowSeen(w.now, f)
	w.ref.seen(w.now, f)
}

// gone ends flow i with an event.
func (w *world) gone(i int) {
	f := w.flows[i]
	w.flows = append(w.flows[:i], w.flows[i+1:]...)
	w.notef("gone %v->%v id %d", f.Src, f.Dst, f.ID)
	f.HasCounters = w.acct
	w.m.FlowGone(w.now, asDestroyed(f))
	w.ref.gone(w.now, f)
}

// asDestroyed is the flow as the event of its end shows it: without a master.
func asDestroyed(f *Flow) *Flow {
	g := *f
	g.MasterSrc, g.MasterDst = Endpoint{}, Endpoint{}
	return &g
}

func (w *world) open(f Flow) {
	for _, x := range w.flows { // the kernel has each tuple once
		if x.Src == f.Src && x.Dst == f.Dst || x.ReplySrc == f.ReplySrc && x.ReplyDst == f.ReplyDst ||
			x.Src == f.ReplySrc && x.Dst == f.ReplyDst || f.Src == x.ReplySrc && f.Dst == x.ReplyDst {
			return
		}
	}
	w.nextID++
	f.ID = w.nextID
	w.notef("new %v->%v reply %v->%v id %d", f.Src, f.Dst, f.ReplySrc, f.ReplyDst, f.ID)
	w.flows = append(w.flows, &f)
	w.seen(&f)
	f.OrigPackets = 1
}

func (w *world) peer() Endpoint {
	return ep(fmt.Sprintf("203.0.113.%d:%d", 5+w.rnd.IntN(2), []int{53, 5060, 5070}[w.rnd.IntN(3)]))
}

func (w *world) ext() Endpoint {
	return ep(fmt.Sprintf("198.51.100.1:%d", 3074+w.rnd.IntN(2)))
}

func (w *world) inside() Endpoint {
	return ep(fmt.Sprintf("10.47.11.%d:3074", 109+w.rnd.IntN(3)))
}

func (w *world) snapshot() {
	w.notef("snapshot")
	w.m.BeginSnapshot()
	w.ref.begin()
	dump := append([]*Flow(nil), w.flows...)
	for n, f := range dump {
		if n == len(dump)/2 { // events go on meanwhile
			w.traffic()
			w.apply()
		}
		f.HasCounters = w.acct
		w.m.SnapshotFlow(w.now, f)
		w.ref.dump(w.now, f)
	}
	w.m.EndSnapshot(w.now)
	w.ref.finish(w.now)
}

func (w *world) tick(d time.Duration) {
	w.now += d
	asked := w.ref.tick(w.now, lifetime/16)
	for w.m.Tick(w.now, 1) {
		w.apply()
	}
	w.apply()
	for _, c := range asked {
		for _, fl := range append([]*refFlow(nil), c.flows...) {
			w.answer(c.Permission, fl)
		}
	}
}

// answer is the kernel's answer to the Query about fl.
func (w *world) answer(p Permission, fl *refFlow) {
	for _, f := range w.flows {
		if f.ID == fl.id {
			f.HasCounters = w.acct
			w.seen(f)
			return
		}
	}
	o := Op{Kind: Query, Permission: p, Port: fl.port, ID: fl.id}
	w.m.FlowMissing(w.now, &o)
	w.ref.missing(w.now, &o)
}

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
			w.open(Flow{
				Status: StatusDstNAT | StatusExpected, Src: from, Dst: k.Ext, ReplySrc: in, ReplyDst: from,
				MasterSrc: Endpoint{Addr: in.Addr}, MasterDst: Endpoint{k.Peer, k.Ext.Port},
			})
		}
	case n < 52: // a stranger uses a forward of the user's
		from, in := ep("192.0.2.77:9"), ep("10.47.11.200:80")
		w.open(Flow{Status: StatusDstNAT, Src: from, Dst: w.ext(), ReplySrc: in, ReplyDst: from})
	case n < 55: // an early packet
		from, ext := w.peer(), w.ext()
		w.open(Flow{Src: from, Dst: ext, ReplySrc: ext, ReplyDst: from})
	case len(w.flows) == 0:
	case n < 70: // packets from inside
		f := w.flows[w.rnd.IntN(len(w.flows))]
		if f.Status.Has(StatusSrcNAT) {
			f.OrigPackets++
		} else {
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

// The model and the naive reference must agree after every step, and no grant
// may meet a standing permission of somebody else's. Fails, for instance, when
// withdraw is left out of end, or when settle forgets to yield.
func TestModelAgreesWithNaiveReference(t *testing.T) {
	runs, steps := 400, 400
	if testing.Short() {
		runs = 40
	}
	for seed := range runs {
		w := newWorld(t, uint64(seed))
		w.acct = seed%2 == 1
		w.full = seed % 3 * 10
		for range steps {
			switch n := w.rnd.IntN(100); {
			case n < 70:
				w.traffic()
			case n < 95:
				w.tick(time.Duration(1+w.rnd.IntN(20)) * time.Second)
			case n < 96:
				w.tick(10 * lifetime)
			default:
				w.snapshot()
			}
			w.check()
		}
		w.m.RevokeAll()
		w.apply()
		if len(w.kernel) != 0 {
			w.failf("after RevokeAll %d permissions stand", len(w.kernel))
		}
	}
}
