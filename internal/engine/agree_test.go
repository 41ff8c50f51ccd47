package engine

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/cone/conetest"
)

// views returns what should stand.
func (w *world) views() (all []cone.View) {
	w.e.Model.Walk(0, 1<<20, func(v cone.View) { all = append(all, v) })
	return all
}

// adoptedBlur is how much earlier than the model knows a permission of an earlier daemon may end:
// the kernel rounds to seconds.
const adoptedBlur = 2 * time.Second

// check compares the kernel with the model, unless somebody disturbed it.
func (w *world) check() {
	w.t.Helper()
	if w.disturbed {
		return
	}
	expected, mapped := map[cone.Key]bool{}, map[cone.Key]bool{}
	views := w.views()
	for _, v := range views {
		if v.State != cone.StateStanding {
			continue
		}
		over := w.now >= v.Expires // the kernel may have ended it
		if v.Since == w.started {  // adopted: it ended by itself if it is missing so late
			over = over || w.now+adoptedBlur >= v.Expires
		}
		if v.By&cone.ByExpectation != 0 {
			expected[v.Key] = true
			if w.forwarded(v.Permission) != cone.NotForwarded {
				w.failf("expectation %v -> %v takes packets that the user forwards", v.Peers(), v.Ext)
			}
			if x := w.k.expectations[v.Key]; (x == nil || !x.ours() || x.mapped != v.MapTranslates || !x.mapped && x.in != v.Int) && !over {
				w.failf("expectation %v -> %v should lead to %v", v.Peers(), v.Ext, v.Int)
			}
		}
		if v.By&cone.ByMap != 0 {
			mapped[elementKey(&v.Key)] = true
			if x := w.k.elements[elementKey(&v.Key)]; (x == nil || x.in != v.Int) && !over {
				w.failf("element %v -> %v should lead to %v: %+v", v.Peers(), v.Ext, v.Int, x)
			}
		}
		if v.By == 0 {
			w.failf("nothing carries %v -> %v", v.Peers(), v.Ext)
		}
	}
	for _, key := range sortedKeys(w.k.expectations) {
		if w.k.expectations[key].ours() && !expected[key] {
			w.failf("expectation %v should not stand", key)
		}
	}
	for _, key := range sortedKeys(w.k.elements) {
		if e := w.k.elements[key]; !mapped[key] && !(e.learned && mayLearn(views, key, e.in)) {
			w.failf("element %v should not stand", key)
		}
	}
}

// mayLearn reports whether the kernel may hold an element that the model does not count: what
// waits for another one that it refused, and what the map had no room for. No event tells
// whether there was room when the packet passed that teaches it.
func mayLearn(views []cone.View, key cone.Key, in cone.Endpoint) bool {
	return slices.ContainsFunc(views, func(v cone.View) bool {
		return elementKey(&v.Key) == key && v.Int == in &&
			(v.State == cone.StateWaiting || v.By == cone.ByExpectation || v.Reason == cone.ReasonTableFull)
	})
}

// checkAll checks what stands against what the hosts did, not against the model.
func (w *world) checkAll() {
	w.t.Helper()
	views := w.views()
	for _, v := range views {
		if v.State != cone.StateStanding || w.now >= v.Expires {
			continue
		}
		if peer := v.Peer; v.HostBits > 0 { // any contact of the host by that endpoint counts
			w.wantAsked(v.Int, v.Ext)
		} else {
			w.wantJustified(v.Int, peer, v.Ext)
		}
	}
	for _, f := range w.k.flows {
		switch {
		case f.Status.Has(cone.StatusSrcNAT):
			w.wantClaim(f, views)
		case f.Labelled || cone.IsAnchor(f.MasterSrc, f.MasterDst):
			full := slices.ContainsFunc(views, func(v cone.View) bool { // the next reconcile finds what it has left
				return v.Int == f.ReplySrc && v.Ext == f.Dst && v.Reason == cone.ReasonTableFull
			})
			if !f.Status.Has(cone.StatusSeenReply) && !full && !w.standsFor(f.ReplySrc, f.Src.Addr, f.Dst, views) {
				w.failf("child %v->%v of %v lives on, unanswered and without a permission", f.Src, f.Dst, f.ReplySrc)
			}
		case !f.Status.Has(cone.StatusDstNAT) && !w.k.sockets[f.Dst]:
			if w.standsFor(cone.Endpoint{}, f.Src.Addr, f.Dst, views) {
				w.failf("the early flow %v->%v hides a permission", f.Src, f.Dst)
			}
		}
	}
}

// standsAtMost is how long after the last packet of its host a permission may stand: it is
// renewed within a lifetime, then the kernel holds it for another one if the daemon dies, and
// queries and rounding take a while.
const standsAtMost = 3 * lifetime

func (w *world) wantAsked(in, ext cone.Endpoint) {
	for c, at := range w.sent {
		if c.in == in && c.ext == ext && w.now-at <= standsAtMost {
			return
		}
	}
	w.failf("%v has a permission at %v and did not send", in, ext)
}

// standsFor reports whether a permission lets a peer reach in, or anybody if that is zero.
func (w *world) standsFor(in cone.Endpoint, peer cone.Addr, ext cone.Endpoint, views []cone.View) bool {
	return slices.ContainsFunc(views, func(v cone.View) bool {
		return v.State == cone.StateStanding && v.Ext == ext && (v.Int == in || in == cone.Endpoint{}) && v.Peers().Contains(peer.Netip())
	})
}

// wantClaim checks that an outbound flow has its permission, or a good reason for none.
func (w *world) wantClaim(f *fakeFlow, views []cone.View) {
	w.t.Helper()
	if slices.Contains(w.policy.ExcludePeerPorts, f.ReplySrc.Port) || f.revoked || w.now-f.sent >= w.policy.Lifetime ||
		w.wasShort-f.sent >= lifetime/2 { // it ended under a shorter lifetime
		return
	}
	i := slices.IndexFunc(views, func(v cone.View) bool {
		return v.Int == f.Src && v.Ext == f.ReplyDst && v.Peers().Contains(f.ReplySrc.Addr.Netip())
	})
	if i < 0 && w.policy.Limits != (cone.Limits{}) {
		return // it made way for another host when it was refused for a limit
	}
	if i < 0 {
		w.failf("flow %v->%v from %v has no claim", f.Src, f.Dst, f.ReplyDst)
	}
	v, good := views[i], true
	switch {
	case v.State == cone.StateStanding:
	case v.State == cone.StateWaiting:
		good = slices.ContainsFunc(views, func(o cone.View) bool { return o.Key == v.Key && o.Int != v.Int })
	case v.Reason == cone.ReasonForwarded:
		good = w.forwarded(v.Permission) == cone.ForwardedElsewhere
	case v.Reason == cone.ReasonForwardedHere:
		good = w.forwarded(v.Permission) == cone.ForwardedHere
	case v.Reason == cone.ReasonLocalSocket:
		good = w.k.sockets[v.Ext]
	case v.Reason == cone.ReasonHostLimit, v.Reason == cone.ReasonSubnetLimit, v.Reason == cone.ReasonLimit:
		good = w.policy.Limits != (cone.Limits{})
	case v.Reason == cone.ReasonTableFull:
		good = w.k.mapSize < 1000 || w.k.expectMax < 1000 || w.k.anchorMax < 1000
	case v.Reason == cone.ReasonRevoked: // whose it was is not handed on
		good = w.handed[v.Ext] || w.revoked[v.Int]
	case v.Reason == cone.ReasonPeersOnPort, v.Reason == cone.ReasonHelper:
		good = w.policy.Expected
	default:
		good = false
	}
	if !good {
		w.failf("flow %v->%v from %v has no permission: %v, %v", f.Src, f.Dst, f.ReplyDst, v.State, v.Reason)
	}
}

// end lets the daemon stop: nothing of ours stays.
func (w *world) end() {
	w.rest()
	w.e.Model.RevokeAll()
	w.apply()
	for _, key := range sortedKeys(w.k.expectations) {
		if w.k.expectations[key].ours() {
			w.failf("expectation %v stays", key)
		}
	}
	if len(w.k.elements) > 0 || len(w.k.anchors) > 0 && !w.failed { // an anchor alone runs out
		w.failf("%d elements and %d anchors stay", len(w.k.elements), len(w.k.anchors))
	}
}

// play plays n steps, or as many as the source of the world's numbers has.
func (w *world) play(goesOn func(step int) bool) {
	for i := 0; goesOn(i); i++ {
		w.step()
	}
	w.end()
}

// The kernel holds exactly what it should, by the right carriers and for the right hosts, and
// nobody else is let in, though the kernel loses, refuses and delays, others meddle with it,
// and the daemon is killed, stopped and reloaded.
//
// Fails, for example, when Comparer.Repair does not grant again what is missing, or leaves
// what is unexpected.
func TestEngineAndKernelAgree(t *testing.T) {
	for _, kind := range worlds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(300) {
				w := newWorld(t, rand.New(rand.NewPCG(seed, 1)), kind)
				w.notef("seed %d", seed)
				w.play(func(step int) bool { return step < 200 })
			}
		})
	}
}

// The same with the inputs that a fuzzer finds.
func FuzzEngineAndKernelAgree(f *testing.F) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for kind := range worlds {
		all := []byte{byte(kind)}
		for range 600 {
			all = append(all, byte(rnd.Uint32()))
		}
		f.Add(all)
	}
	f.Fuzz(func(t *testing.T, all []byte) {
		if len(all) == 0 || len(all) > 4096 {
			return
		}
		c := &conetest.Choices{Left: all[1:]}
		w := newWorld(t, rand.New(c), worlds[int(all[0])%len(worlds)])
		w.play(func(int) bool { return len(c.Left) > 0 })
	})
}
