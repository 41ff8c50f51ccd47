package daemon

import (
	"net/netip"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
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

// sources are the addresses of links.
type sources struct {
	had    map[cone.Addr]struct{} // that outside links have, or had
	byLink map[int][]ownAddr
	own    map[cone.Addr]place
	only   map[gateway.Families]int // the only outside link for a family; 0 if there are several
	owned  func(cone.Addr) bool
}

// An ownAddr is an address that a link has.
type ownAddr struct {
	addr   netip.Addr
	narrow bool
}

// A place is where an address is: on a link.
type place struct {
	link int
	runs bool // at least one link with the address runs
}

func newSources(n gateway.Network, had map[cone.Addr]struct{}) *sources {
	s := &sources{had: had, byLink: make(map[int][]ownAddr), own: make(map[cone.Addr]place), owned: n.Owned()}
	runs := make(map[int]bool)
	s.only = make(map[gateway.Families]int)
	for _, l := range n.Links {
		runs[l.Index] = l.Runs()
		for _, f := range []gateway.Families{gateway.IPv4, gateway.IPv6} {
			if l.Outside&f == 0 {
				continue
			}
			if _, another := s.only[f]; another {
				s.only[f] = 0
			} else {
				s.only[f] = l.Index
			}
		}
	}
	for _, a := range n.Addrs {
		addr := cone.AddrFrom(a.Prefix.Addr())
		s.byLink[a.Link] = append(s.byLink[a.Link], ownAddr{a.Prefix.Addr(), a.Narrow})
		s.own[addr] = place{a.Link, runs[a.Link] || s.own[addr].runs}
	}
	return s
}

// mayBeWrong reports whether f, which is translated, may have the wrong address: one that an
// outside link had, or one of a link that is not the only outside link. An address that no
// link ever had is routed to the gateway.
func (s *sources) mayBeWrong(f *cone.Flow) bool {
	if _, had := s.had[f.ReplyDst.Addr]; !had {
		return false
	}
	if p, own := s.own[f.ReplyDst.Addr]; own {
		only := s.only[gateway.FamilyOf(f.ReplyDst.Addr.Netip())]
		return only == 0 || p.link != only
	}
	return s.isGone(f)
}

// isGone reports whether the address of f is gone, or no link that has it runs.
func (s *sources) isGone(f *cone.Flow) bool {
	if p, own := s.own[f.ReplyDst.Addr]; own {
		return !p.runs
	}
	return !s.owned(f.ReplyDst.Addr)
}

// broken reports whether f is broken: no link by which it may leave has its source, and the
// rules would surely give it another source on each of them. It notes the first link in f.
func (s *sources) broken(rs *userrules.Ruleset, routes *router, f *brokenFlow) bool {
	if _, own := s.own[f.Src.Addr]; own {
		return false
	}
	ways, all := routes.links(&f.Flow)
	if !all || len(ways) == 0 {
		return false
	}
	for _, l := range ways {
		if l.Outside&gateway.FamilyOf(f.Src.Addr.Netip()) == 0 || s.has(l, f.source()) || !s.gives(rs, l, f) {
			return false
		}
	}
	f.link = ways[0].Name
	return true
}

func (s *sources) has(l gateway.Link, a netip.Addr) bool {
	return slices.ContainsFunc(s.byLink[l.Index], func(o ownAddr) bool { return o.addr == a })
}

// gives reports whether rules would surely give f another source on link l, whichever of those
// they may give. That is not sure if they masquerade and l has no address of global scope:
// masquerade takes one of another link then.
func (s *sources) gives(rs *userrules.Ruleset, l gateway.Link, f *brokenFlow) bool {
	n, known := rs.SourcesOf(userrules.Leaving{
		Src: f.Src.Netip(), Dst: f.ReplySrc.Netip(), Out: linkOf(l),
	})
	if !known || n.Kept && f.source() == f.Src.Addr.Netip() {
		return false
	}
	if !n.Masquerade && len(n.Addrs) == 0 { // hosts keep their own there, unless no rules translate at all
		return f.Src.Addr.Is4() && len(rs.SourceNAT()) > 0
	}
	if n.Masquerade && !slices.ContainsFunc(s.byLink[l.Index], func(o ownAddr) bool { return o.addr.Is4() == f.Src.Addr.Is4() && !o.narrow }) {
		return false
	}
	return !slices.ContainsFunc(n.Addrs, func(r userrules.AddrRange) bool { return r.Has(f.source()) })
}
