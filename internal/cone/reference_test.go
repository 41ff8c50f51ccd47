package cone

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// refModel is the model written the slow and obvious way: maps, linear scans,
// no wheel. The model test runs both on the same inputs.
type refModel struct {
	policy    Policy
	topo      Topology
	claims    []*refClaim              // oldest first
	forwarded map[extKey]time.Duration // last seen
	dumped    map[*refFlow]bool        // not nil: a snapshot is running
	showing   bool                     // one of its flows right now
	over      map[uint32]bool
	inbound   []Flow
	kept      time.Duration // how long the kernel keeps a flow, 0 if not known
	began     time.Duration // the last snapshot
	before    time.Duration // when the last whole one began
	asked     []*refClaim   // overdue when they came first: their flows are queried
}

type refClaim struct {
	Permission
	state     State
	reason    Reason
	made      time.Duration
	refreshed time.Duration
	dieAt     time.Duration // 0: not asked
	retry     time.Duration
	flows     []*refFlow
}

type refFlow struct {
	id       uint32
	peer     Addr
	port     uint16
	child    bool
	answered bool
	packets  uint64
}

func newRef(p Policy, t Topology) *refModel {
	return &refModel{policy: p, topo: t, forwarded: map[extKey]time.Duration{}}
}

// ofKey returns the claims of k: the revoked ones are last.
func (r *refModel) ofKey(k Key) (cs []*refClaim) {
	for _, revoked := range []bool{false, true} {
		for _, c := range r.claims {
			if c.Key == k && c.revoked() == revoked {
				cs = append(cs, c)
			}
		}
	}
	return cs
}

func (c *refClaim) revoked() bool { return c.state == StateRefused && c.reason == ReasonRevoked }

// wanted reports whether another claim waits for the end of c.
func (r *refModel) wanted(c *refClaim) bool {
	return slices.ContainsFunc(r.ofKey(c.Key), func(x *refClaim) bool { return x != c && !x.revoked() })
}

func (r *refModel) find(k Key, in Endpoint) *refClaim {
	for _, c := range r.ofKey(k) {
		if c.Int == in {
			return c
		}
	}
	return nil
}

func (c *refClaim) count(child, answered bool) (n int) {
	for _, f := range c.flows {
		if f.child == child && (!answered || f.answered) {
			n++
		}
	}
	return n
}

func (c *refClaim) isIdle() bool {
	return c.state == StateStanding && c.count(false, false) == 0 && c.count(true, true) == 0 ||
		c.state == StateRefused && c.reason == ReasonIdle
}

// widen makes p the permission for all peers that a contact with its peer permits.
func (r *refModel) widen(p Permission) Permission {
	if !r.policy.Mapped {
		return p
	}
	prefix := netip.PrefixFrom(p.Peer.Netip(), 32)
	for _, g := range r.policy.PeerGroups {
		if g.Contains(p.Peer.Netip()) {
			prefix = g
		}
	}
	for _, s := range r.policy.Subnets {
		if s.Prefix.Contains(p.Int.Addr.Netip()) && s.Filtering == EndpointIndependent {
			prefix = netip.PrefixFrom(p.Peer.Netip(), 0)
		}
	}
	p.Peer, p.HostBits = AddrFrom(prefix.Masked().Addr()), uint8(32-prefix.Bits())
	return p
}

// expand returns the permissions that a contact gives: those for the other peers of a group
// too, if one permission cannot be for the group.
func (r *refModel) expand(p Permission) (all []Permission) {
	for _, g := range r.policy.PeerGroups {
		if !r.policy.Mapped && g.Contains(p.Peer.Netip()) {
			for a := g.Addr(); g.Contains(a); a = a.Next() {
				p.Peer = AddrFrom(a)
				all = append(all, p)
			}
			return all
		}
	}
	return []Permission{p}
}

// classify says what f is: "out", "child", "dnat" or "".
func (r *refModel) classify(f *Flow) (string, Permission) {
	in := r.widen(Permission{Key: Key{Ext: f.Dst, Peer: f.Src.Addr, Zone: f.ReplyZone}, Int: f.ReplySrc})
	inside := false
	for _, s := range r.policy.Subnets {
		inside = inside || s.Prefix.Contains(f.Src.Addr.Netip())
	}
	switch {
	case f.Status.Has(StatusExpected):
		return "child", in
	case inside && f.Status.Has(StatusSrcNAT):
		return "out", r.widen(Permission{Key: Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr, Zone: f.ReplyZone}, Int: f.Src})
	case !inside && f.Status.Has(StatusDstNAT):
		if f.Labelled || !r.policy.Labels && r.find(in.Key, in.Int) != nil {
			return "child", in
		}
		return "dnat", in
	}
	return "", in
}

// bars reports whether a forward keeps c from standing: it rules out an expectation, so c
// stands only if the map can carry it.
func (r *refModel) bars(now time.Duration, c *refClaim) bool {
	return !r.policy.Mapped && r.barred(now, c)
}

// barred reports whether a DNATed flow was seen that conflicts with an expectation of c.
func (r *refModel) barred(now time.Duration, c *refClaim) bool {
	seen, ok := r.forwarded[c.extKey()]
	return ok && now-seen < forwardMemory
}

func (r *refModel) seen(now time.Duration, f *Flow) {
	what, p := r.classify(f)
	if what == "out" {
		for _, q := range r.expand(p) {
			r.seenOf(now, f, what, q)
		}
		return
	}
	r.seenOf(now, f, what, p)
}

func (r *refModel) seenOf(now time.Duration, f *Flow, what string, p Permission) {
	c := r.find(p.Key, p.Int)
	switch what {
	case "out":
		for _, x := range r.policy.ExcludePeerPorts {
			if f.ReplySrc.Port == x {
				return
			}
		}
		if c != nil {
			known := r.add(now, c, f, false)
			asks := !known && !r.showing && c.revoked()
			if asks { // and is the last to do so
				c.state, c.reason = StateWaiting, ReasonNone
				r.claims = append(slices.DeleteFunc(r.claims, func(x *refClaim) bool { return x == c }), c)
			}
			if o := r.ofKey(c.Key)[0]; o != c && o.isIdle() && !c.revoked() && now < c.refreshed+r.policy.Lifetime {
				r.end(now, o)
			} else if o == c && asks {
				r.grant(now, c)
			}
			return
		}
		c = &refClaim{Permission: p, state: StateWaiting, refreshed: r.heard(now, f)}
		r.claims = append(r.claims, c)
		r.add(now, c, f, false)
		first := r.ofKey(p.Key)[0]
		if over := now >= c.refreshed+r.policy.Lifetime; first == c && over {
			c.state, c.reason = StateRefused, ReasonIdle
		} else if first == c {
			r.grant(now, c)
		} else if !over && first.isIdle() {
			r.end(now, first)
		}
	case "child":
		if c == nil || c.state != StateStanding && !f.Status.Has(StatusSeenReply) {
			return
		}
		known := slices.ContainsFunc(c.flows, func(x *refFlow) bool { return x.child && x.peer == f.Src.Addr && x.port == f.Src.Port })
		most := r.policy.Limits.Children
		if c.HostBits > 0 {
			most *= GroupChildren
		}
		if known || most == 0 || c.count(true, false) < most {
			r.add(now, c, f, true)
		}
	case "dnat":
		e := p.extKey()
		r.forwarded[e] = now
		for _, c := range append([]*refClaim(nil), r.claims...) {
			if c.extKey() == e && c.state == StateStanding && r.bars(now, c) {
				r.refuse(now, c, ReasonForwarded)
				if c.count(false, false) == 0 {
					r.end(now, c)
				}
			}
		}
	}
}

func (r *refModel) add(now time.Duration, c *refClaim, f *Flow, child bool) (known bool) {
	peer, packets := f.ReplySrc, f.OrigPackets
	if child {
		peer, packets = f.Src, f.ReplyPackets
	}
	var fl *refFlow
	for _, x := range c.flows {
		if x.peer == peer.Addr && x.port == peer.Port && x.child == child {
			fl = x
		}
	}
	known = fl != nil && fl.id == f.ID
	if fl == nil {
		fl = &refFlow{peer: peer.Addr, port: peer.Port, child: child}
		c.flows = append(c.flows, fl)
	}
	refreshes, last := !child || f.Status.Has(StatusSeenReply), r.heard(now, f)
	if !f.HasCounters && !known && !child {
		packets = 1
	}
	if refreshes && known && f.HasCounters && !f.Status.Has(StatusOffload) {
		refreshes, last = packets != 0 && fl.packets != packets, max(last, r.before)
	}
	fl.id, fl.packets, fl.answered = f.ID, packets, child && f.Status.Has(StatusSeenReply)
	if r.dumped != nil {
		r.dumped[fl] = true
	}
	if refreshes {
		c.refreshed = max(c.refreshed, last)
	}
	if refreshes && now < c.refreshed+r.policy.Lifetime {
		c.dieAt = 0
		if c.state == StateRefused && c.reason == ReasonIdle {
			r.grant(now, c)
		}
	}
	return known
}

// heard returns when the last packet of f passed.
func (r *refModel) heard(now time.Duration, f *Flow) time.Duration {
	left := f.Left
	if left > 0 {
		left += time.Second
	}
	if r.kept < left || f.Began || f.Status.Has(StatusOffload) {
		return now
	}
	return now - (r.kept - left)
}

func (r *refModel) grant(now time.Duration, c *refClaim) {
	if r.isOver(now, c) {
		r.passOver(now, c)
		return
	}
	if r.bars(now, c) {
		r.refuse(now, c, ReasonForwarded)
		return
	}
	c.state, c.reason, c.made, c.dieAt = StateStanding, ReasonNone, now, 0
}

func (r *refModel) refuse(now time.Duration, c *refClaim, why Reason) {
	c.state, c.reason, c.retry = StateRefused, why, now+r.policy.Retry
}

func (r *refModel) refused(now time.Duration, p Permission, why Reason) {
	if c := r.find(p.Key, p.Int); c != nil && c.state == StateStanding {
		r.refuse(now, c, why)
		r.settle(now, c)
	}
}

func (r *refModel) end(now time.Duration, c *refClaim) {
	owner := r.ofKey(c.Key)[0] == c
	for i, x := range r.claims {
		if x == c {
			r.claims = append(append([]*refClaim(nil), r.claims[:i]...), r.claims[i+1:]...)
		}
	}
	if next := r.ofKey(c.Key); owner && len(next) > 0 && next[0].reason != ReasonRevoked {
		r.grant(now, next[0])
	}
}

func (r *refModel) revoke(now time.Duration, in Endpoint) {
	var revoked []*refClaim
	for _, c := range r.claims {
		if c.Int == in {
			c.state, c.reason = StateRefused, ReasonRevoked
			revoked = append(revoked, c)
		}
	}
	for _, c := range revoked {
		if o := r.ofKey(c.Key)[0]; o.state == StateWaiting {
			r.grant(now, o)
		}
		r.settle(now, c)
	}
}

func (r *refModel) setPolicy(now time.Duration, p Policy) {
	learns := !r.policy.Learned && p.Learned
	r.policy = p
	for _, c := range append([]*refClaim(nil), r.claims...) {
		if c.state == StateStanding && r.bars(now, c) {
			r.refuse(now, c, ReasonForwarded)
			r.settle(now, c)
		}
	}
	for _, c := range r.claims {
		if learns && c.state == StateRefused && c.reason != ReasonIdle && c.reason != ReasonRevoked {
			r.grant(now, c)
		}
	}
}

func (r *refModel) settle(now time.Duration, c *refClaim) {
	if c.state != StateStanding && c.count(false, false) == 0 ||
		c.isIdle() && r.wanted(c) {
		r.end(now, c)
	}
}

func (r *refModel) gone(now time.Duration, f *Flow) {
	if r.dumped != nil {
		r.over[f.ID] = true
	}
	what, p := r.classify(f)
	if what == "out" {
		for _, q := range r.expand(p) {
			r.goneOf(now, f, what, q)
		}
		return
	}
	if what == "dnat" { // events of the end have no labels
		what = "child"
	}
	r.goneOf(now, f, what, p)
}

func (r *refModel) goneOf(now time.Duration, f *Flow, what string, p Permission) {
	c := r.find(p.Key, p.Int)
	if c == nil || what != "out" && what != "child" {
		return
	}
	for _, fl := range c.flows {
		peer := f.ReplySrc
		if what == "child" {
			peer = f.Src
		}
		if fl.id == f.ID && fl.peer == peer.Addr && fl.port == peer.Port && fl.child == (what == "child") {
			if now < c.refreshed+r.policy.Lifetime {
				r.add(now, c, f, fl.child)
			}
			r.drop(now, c, fl)
			return
		}
	}
}

func (r *refModel) drop(now time.Duration, c *refClaim, fl *refFlow) {
	for i, x := range c.flows {
		if x == fl {
			c.flows = append(append([]*refFlow(nil), c.flows[:i]...), c.flows[i+1:]...)
			r.settle(now, c)
			return
		}
	}
}

func (r *refModel) missing(now time.Duration, o *Op) {
	if c := r.find(o.Key, o.Int); c != nil {
		for _, fl := range c.flows {
			if fl.id == o.ID && fl.peer == o.From.Addr && fl.port == o.From.Port {
				r.drop(now, c, fl)
				return
			}
		}
	}
}

// tick returns the claims that must be asked about.
func (r *refModel) tick(now, grace time.Duration) (ask []*refClaim) {
	for _, c := range append([]*refClaim(nil), r.claims...) {
		switch {
		case c.state == StateRefused && c.reason != ReasonIdle && c.reason != ReasonRevoked && now >= c.retry:
			r.grant(now, c)
		case c.state == StateStanding && now > c.made && now >= c.refreshed+r.policy.Lifetime:
			switch {
			case c.dieAt == 0 && len(c.flows) > 0:
				c.dieAt = now + grace
				ask = append(ask, c)
			case now < c.dieAt:
			case c.count(false, false) == 0 || r.wanted(c):
				r.end(now, c)
			default:
				c.state, c.reason = StateRefused, ReasonIdle
			}
		}
	}
	return ask
}

func (r *refModel) begin(now time.Duration) {
	r.began = now
	r.dumped, r.over, r.inbound = map[*refFlow]bool{}, map[uint32]bool{}, nil
}

func (r *refModel) dump(now time.Duration, f *Flow) {
	if r.over[f.ID] {
		return
	}
	if f.Status.Has(StatusSrcNAT) {
		r.show(now, f)
	} else {
		r.inbound = append(r.inbound, *f)
	}
}

func (r *refModel) show(now time.Duration, f *Flow) {
	r.showing = true
	r.seen(now, f)
	r.showing = false
}

func (r *refModel) finish(now time.Duration) {
	for i := range r.inbound {
		if f := &r.inbound[i]; !r.over[f.ID] {
			r.show(now, f)
		}
	}
	seen := r.dumped
	r.dumped, r.before = nil, r.began
	var lost []*refClaim
	for _, c := range r.claims {
		var left []*refFlow
		for _, fl := range c.flows {
			if seen[fl] {
				left = append(left, fl)
			}
		}
		if len(left) < len(c.flows) {
			c.flows = left
			lost = append(lost, c)
		}
	}
	slices.SortStableFunc(lost, func(a, b *refClaim) int { return cmp.Compare(b.state, a.state) })
	for _, c := range lost {
		r.settle(now, c)
	}
}

func (r *refModel) standing() map[Key]Endpoint {
	out := map[Key]Endpoint{}
	for _, c := range r.claims {
		if c.state == StateStanding {
			out[c.Key] = c.Int
		}
	}
	return out
}
