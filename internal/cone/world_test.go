package cone

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// world drives a Model and a refModel with the same inputs and plays the
// kernel: it carries out the ops of the Model and holds what stands.
type world struct {
	t       *testing.T
	rnd     *rand.Rand
	now     time.Duration
	m       *Model
	ref     *refModel
	policy  Policy
	kernel  map[Key]Endpoint
	by      map[Key]Carriers         // what carries it
	fell    map[Key]time.Duration    // when it ended
	taught  map[Key]bool             // learned, not granted
	learned map[[2]Endpoint]bool     // the answers of flows that were learned
	denied  map[Key]time.Duration    // not to be learned until then
	flows   []*Flow                  // alive
	sent    map[uint32]time.Duration // by flow: its last packet from inside
	last    map[uint32]time.Duration // by flow: its last packet
	acct    bool
	timed   bool // timeouts are known
	nextID  uint32
	peers   int // addresses outside
	full    int // grants to be refused, in percent
	live    int // expectations that there is room for, 0 for no bound
	log     []string
}

func newWorld(t *testing.T, seed uint64, p Policy) *world {
	w := &world{
		t: t, rnd: rand.New(rand.NewPCG(seed, 1)),
		m: New(p), ref: newRef(p, testTopology), policy: p, peers: 2,
		kernel: map[Key]Endpoint{}, by: map[Key]Carriers{}, fell: map[Key]time.Duration{},
		taught: map[Key]bool{}, learned: map[[2]Endpoint]bool{}, denied: map[Key]time.Duration{},
		sent: map[uint32]time.Duration{}, last: map[uint32]time.Duration{},
	}
	if len(p.PeerGroups) > 0 {
		w.peers = 3
	}
	w.m.SetTopology(0, testTopology)
	w.m.SetForwards(0, nil, false)
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
				var handed Carriers // on to another host, without an end
				if w.ref.policy.Learned {
					handed |= ByMap
				}
				if o.MapTranslates {
					handed |= ByExpectation
				}
				replaces := w.by[o.Key]&^(handed&o.By) == 0
				if stands && owner != o.Int && !w.taught[o.Key] && !replaces {
					w.failf("grant of %v to %v while %v owns it", o.Key, o.Int, owner)
				}
				w.mayCarry(&o)
				if w.rnd.IntN(100) < w.full {
					w.refuse(&o)
					continue
				}
				w.stand(o.Key, o.Int, o.By)
				delete(w.denied, o.Key)
				delete(w.taught, o.Key)
				w.m.Granted(o.Permission)
			case Deny:
				if (o.By == ByMap) != w.ref.policy.Learned {
					w.failf("a kernel that does not learn is told what not to learn, or one that learns is not")
				}
				if o.By == 0 {
					if o.Reason != ReasonRevoked {
						w.failf("the next daemon is told of %v", o.Reason)
					}
					continue
				}
				w.fall(o.Key, ByMap)
				w.denied[o.Key] = w.now + 2*testPolicy.Retry
			case Revoke:
				ofAnybody := o.By == ByExpectation && o.MapTranslates
				i := w.m.find(o.Key, owner)
				former := w.ref.policy.Learned && o.By == ByMap && (i == none || w.m.claims[i].state != StateStanding)
				if stands && owner != o.Int && !w.taught[o.Key] && !ofAnybody && !former {
					w.failf("revoke of %v for %v hits %v", o.Key, o.Int, owner)
				}
				w.fall(o.Key, o.By)
			case Renew:
				if !stands || owner != o.Int || w.by[o.Key]&o.By != o.By || o.By == 0 {
					w.failf("renewal of %v for %v by %v, which stands by %v", o.Key, o.Int, o.By, w.by[o.Key])
				}
			case DropUnanswered:
				for i, f := range w.flows {
					if f.ID == o.ID && !f.Status.Has(StatusSeenReply) {
						if f.ReplySrc != o.Int || f.Src.Addr == stranger.Addr || w.policy.Labels && !f.Labelled && !f.Status.Has(StatusExpected) {
							w.failf("a flow of the user's forward is dropped")
						}
						if !w.holds(&o) { // it may be older than its forward
							w.ref.leaveOut(w.now, f)
						}
						w.gone(i)
						break
					}
				}
			case DropEarly:
				if at, fell := w.fell[o.Key]; !w.permits(o.From.Addr, o.Ext) && !(fell && at == w.now) {
					w.failf("early flow of %v dropped without a permission", o.Key)
				}
			case Query: // answered by ask, for model and reference at once
			}
		}
	}
}

func (w *world) check() {
	w.apply()
	for len(w.ref.asked) > 0 {
		asked := w.ref.asked
		w.ref.asked = nil
		w.answerAll(asked)
	}
	want := w.ref.standing()
	if !maps.Equal(w.kernel, want) {
		w.failf("standing permissions differ (-want +got)\n%s", cmp.Diff(fmt.Sprint(want), fmt.Sprint(w.kernel)))
	}
	s := w.m.Stats()
	if s.Standing != len(want) {
		w.failf("Stats.Standing is %d, want %d", s.Standing, len(want))
	}
	expected, mapped := 0, 0
	for _, c := range w.ref.claims {
		if i := w.m.find(c.Key, c.Int); i == none || w.m.claims[i].refreshed != c.refreshed {
			w.failf("%v was refreshed at another time than %v", c.Permission, c.refreshed)
		}
		if c.state != StateStanding {
			continue
		}
		by := w.by[c.Key]
		if by&ByExpectation != 0 && w.ref.barred(w.now, c) {
			w.failf("%v is expected, and a forward covers its port", c.Key)
		}
		expected += int(by & ByExpectation)
		mapped += int(by&ByMap) / int(ByMap)
	}
	if w.live > 0 && expected > w.live {
		w.failf("%d are expected, and there is room for %d", expected, w.live)
	}
	if s.Expected != expected || s.Mapped != mapped {
		w.failf("%d are expected, %d in the map; Stats say %d, %d", expected, mapped, s.Expected, s.Mapped)
	}
}

// holds reports whether the model holds the child that o drops.
func (w *world) holds(o *Op) bool {
	i := w.m.find(o.Key, o.Int)
	return i != none && w.m.flowOf(i, o.From, true, o.ID) != none
}

// permits reports whether the kernel lets a peer in.
func (w *world) permits(peer Addr, ext Endpoint) bool {
	for k := range w.kernel {
		if k.Ext == ext && k.Peers().Contains(peer.Netip()) {
			return true
		}
	}
	return false
}

// setTimed lets the model know how long the kernel keeps flows, or not.
func (w *world) setTimed(timed bool) {
	w.timed, w.ref.kept = timed, 0
	if timed {
		w.ref.kept = kept
	}
	w.m.SetTimeouts(Timeouts{w.ref.kept, w.ref.kept})
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
	w.report(f)
	w.m.FlowGone(w.now, asDestroyed(f))
	w.ref.gone(w.now, f)
}

// asDestroyed returns f as the event of its end shows it: without its master and labels.
func asDestroyed(f *Flow) *Flow {
	g := *f
	g.MasterSrc, g.MasterDst, g.Labelled = Endpoint{}, Endpoint{}, false
	return &g
}

// stand makes a permission stand in the kernel by some carriers.
func (w *world) stand(k Key, in Endpoint, by Carriers) {
	w.kernel[k] = in
	w.by[k] |= by
}

// fall takes it from them.
func (w *world) fall(k Key, by Carriers) {
	if w.by[k] &^= by; w.by[k] == 0 {
		delete(w.by, k)
		delete(w.kernel, k)
		w.fell[k] = w.now
	}
}

// mayCarry fails for a carrier that cannot carry what o grants.
func (w *world) mayCarry(o *Op) {
	if o.By == 0 || o.By&ByMap != 0 && !w.ref.policy.Mapped || o.By&ByExpectation != 0 && !o.Expectable() {
		w.failf("grant of %v by %v", o.Key, o.By)
	}
}

// refuse makes the kernel refuse what o grants. It may still stand by another carrier.
func (w *world) refuse(o *Op) {
	why := ReasonTableFull
	if w.policy.Learned { // what stands is no question of room
		why = ReasonLocalSocket
		w.m.Refused(w.now, o.Permission, why, false)
	} else {
		w.fall(o.Key, o.By)
		w.m.Failed(w.now, o.Permission, o.By, why)
		if i := w.m.find(o.Key, o.Int); i != none && w.m.claims[i].placed.By != 0 {
			return
		}
	}
	w.ref.refused(w.now, o.Permission, why)
}

// send passes a packet from inside through the rule that learns. The rule sees packets of
// flows that have no answer yet, and adds what neither stands nor is denied. The first
// packet of a flow takes over the map's element if a flow with the same reply tuple has
// ended.
func (w *world) send(f *Flow, first bool) {
	w.sent[f.ID] = w.now
	k := w.ref.widen(Permission{Key: Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr, Zone: f.ReplyZone}, Int: f.Src}).Key
	if !w.ref.policy.Learned || f.Status.Has(StatusSeenReply) || f.ReplySrc.Port == 53 || w.denied[k] > w.now {
		return
	}
	answers := [2]Endpoint{f.ReplySrc, f.ReplyDst}
	if w.by[k]&ByMap == 0 || first && w.learned[answers] {
		w.notef("  learn %v %v->%v", k.Peer, k.Ext, f.Src)
		w.stand(k, f.Src, ByMap)
		w.taught[k] = true
	}
	w.learned[answers] = true
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
	w.last[f.ID] = w.now
	w.report(&f)
	w.notef("new %v->%v reply %v->%v id %d", f.Src, f.Dst, f.ReplySrc, f.ReplyDst, f.ID)
	w.flows = append(w.flows, &f)
	if f.Status.Has(StatusSrcNAT) {
		w.send(&f, true)
	}
	f.Began = true
	w.seen(&f)
	f.OrigPackets, f.Began = 1, false
}

func (w *world) peer() Endpoint {
	return ep(fmt.Sprintf("203.0.113.%d:%d", 5+w.rnd.IntN(w.peers), []int{53, 5060, 5070}[w.rnd.IntN(3)]))
}

func (w *world) ext() Endpoint {
	return ep(fmt.Sprintf("198.51.100.1:%d", 3074+w.rnd.IntN(2)))
}

func (w *world) inside() Endpoint {
	return ep(fmt.Sprintf("10.47.11.%d:3074", 109+w.rnd.IntN(3)))
}

func (w *world) snapshot() {
	w.notef("snapshot")
	w.m.BeginSnapshot(w.now)
	w.ref.begin(w.now)
	dump := append([]*Flow(nil), w.flows...)
	for n, f := range dump {
		if n == len(dump)/2 { // events go on meanwhile
			w.traffic()
			w.apply()
		}
		w.report(f)
		w.m.SnapshotFlow(w.now, f)
		w.ref.dump(w.now, f)
	}
	w.m.EndSnapshot(w.now)
	w.ref.finish(w.now)
}

// pass lets time pass. Answers keep a flow alive that the inside host no longer refreshes.
func (w *world) pass(d time.Duration) {
	w.now += d
	for _, f := range w.flows {
		if f.Status.Has(StatusSrcNAT) && w.now-w.sent[f.ID] > 30*time.Second {
			f.Status |= StatusSeenReply
			w.last[f.ID] = w.now
		}
	}
}

// kept is how long the kernel of a world keeps flows.
const kept = 2 * lifetime

// report lets the kernel report f as it is now.
func (w *world) report(f *Flow) {
	f.HasCounters = w.acct
	if w.timed {
		f.Left = max(0, kept-(w.now-w.last[f.ID])).Truncate(time.Second)
	}
}

func (w *world) tick(d time.Duration) {
	w.pass(d)
	asked := w.ref.tick(w.now, lifetime/16)
	for w.m.Tick(w.now, 1) {
		w.apply()
	}
	w.apply()
	w.answerAll(asked)
}

// answerAll answers the queries about the flows of some claims.
func (w *world) answerAll(asked []*refClaim) {
	for _, c := range asked {
		for _, fl := range slices.Clone(c.flows) {
			w.answer(c.Permission, fl)
		}
	}
	w.apply()
}

// answer is the kernel's answer to the Query about fl.
func (w *world) answer(p Permission, fl *refFlow) {
	for _, f := range w.flows {
		if f.ID == fl.id {
			w.report(f)
			w.seen(f)
			return
		}
	}
	o := Op{Kind: Query, Permission: p, From: Endpoint{fl.peer, fl.port}, ID: fl.id}
	w.m.FlowMissing(w.now, &o)
	w.ref.missing(w.now, &o)
}
