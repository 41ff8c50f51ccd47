package flows

import (
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// mostAskedFlows bounds the flows that one look checks against rules and routes, besides
// those that the last look found. The next look goes on with the others.
const mostAskedFlows = 1 << 14

// A walk checks all flows in the order of the table, some of them at each look.
type walk struct {
	number int
	from   int // position up to which earlier looks checked, 0 at the start
	seen   int // by this look
	taken  int
	last   int // position of the last flow checked
	cut    bool
}

// begin begins a look, and another walk if the last one ended.
func (w *walk) begin() {
	w.seen, w.taken, w.last, w.cut = 0, 0, w.from, false
	if w.from == 0 {
		w.number++
	}
}

// take returns the position of the next flow, and whether this look checks it: if the last
// look found it (again), or if it is the flow's turn.
func (w *walk) take(again bool) (at int, ok bool) {
	w.seen++
	if again || w.seen <= w.from {
		return w.seen, again
	}
	if w.taken == mostAskedFlows {
		w.cut = true
		return w.seen, false
	}
	w.taken++
	return w.seen, true
}

// stop says that this look checks no more flows.
func (w *walk) stop() { w.cut = true }

// end ends the look, and the walk unless there are flows left to check.
func (w *walk) end() {
	w.from = 0
	if w.cut {
		w.from = w.last
	}
}

// healedFlows are flows that heal_flows ended.
type healedFlows struct {
	flows   map[healedFlow]healing
	changes int // of rules, routes and addresses so far
}

// A healedFlow identifies a flow that was ended, with its wrong source.
type healedFlow struct {
	src, peer cone.Endpoint
	source    cone.Addr
}

type healing struct {
	at      time.Duration
	changes int
}

// note notes that a flow ends now.
func (h *healedFlows) note(now time.Duration, f *brokenFlow) {
	const most = 1 << 14
	if h.flows == nil || len(h.flows) == most {
		h.flows = make(map[healedFlow]healing)
	}
	h.flows[healedFlow{f.Src, f.ReplySrc, f.ReplyDst.Addr}] = healing{now, h.changes}
}

// cameBack reports whether a flow like f was ended less than a minute ago, or since the last
// change. Then f came back as it was: something other than the rules translates it.
func (h *healedFlows) cameBack(now time.Duration, f *brokenFlow) bool {
	const memory = time.Minute
	was, ended := h.flows[healedFlow{f.Src, f.ReplySrc, f.ReplyDst.Addr}]
	return ended && (was.changes == h.changes || now-was.at < memory)
}

// answers tell whether flows are answered, if the kernel counts their packets.
type answers struct {
	now, last map[uint32]packets // of this walk and the one before
	awaited   bool               // a later look may find that a flow is not answered
}

// packets are a flow's counters at a time since which it had no answer.
type packets struct {
	sent, answered uint64
	at             time.Duration
}

// next begins another walk.
func (a *answers) next() { a.last, a.now = a.now, nil }

// unanswered reports whether f is surely no longer answered. gone says that its address, or
// the link that has it, is gone: then f is unanswered unless it still gets answers. Otherwise
// answers must be missing for a while, since the other side of a call may be silent.
func (a *answers) unanswered(at time.Duration, f *cone.Flow, gone bool) bool {
	const most, enough, silence = 1 << 16, 3, 10 * time.Second
	if !f.Status.Has(cone.StatusSeenReply) {
		return true
	}
	if !f.HasCounters || f.Status.Has(cone.StatusOffload) {
		return gone
	}
	now := packets{f.OrigPackets, f.ReplyPackets, at}
	was, known := a.now[f.ID]
	if !known {
		was, known = a.last[f.ID]
	}
	answered := known && now.answered != was.answered
	if !known || answered || now.sent < was.sent {
		was = now
	}
	if a.now == nil {
		a.now = make(map[uint32]packets)
	}
	if len(a.now) < most {
		a.now[f.ID] = was
	}
	if gone {
		return !answered
	}
	if now.sent-was.sent >= enough && at-was.at >= silence {
		return true
	}
	a.awaited = true
	return false
}
