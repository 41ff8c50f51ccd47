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
	claims    []*refClaim // oldest first
	forwarded map[extKey]time.Duration
	dumped    map[*refFlow]bool // not nil: a snapshot is running
	over      map[uint32]bool
	inbound   []Flow
}

type refClaim struct {
	Permission
	state  State
	reason Reason
	made   time.Duration
	fed    time.Duration
	dieAt  time.Duration // 0: not asked
	retry  time.Duration
	flows  []*refFlow
}

type refFlow struct {
	id       uint32
	port     uint16
	child    bool
	answered bool
	packets  uint64
}

func newRef(p Policy, t Topology) *refModel {
	return &refModel{policy: p, topo: t, forwarded: map[extKey]time.Duration{}}
}

func (r *refModel) ofKey(k Key) (cs []*refClaim) {
	for _, c := range r.claims {
		if c.Key == k {
			cs = append(cs, c)
		}
	}
	return cs
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

func (c *refClaim) lingers() bool {
	return c.state == StateStanding && c.count(false, false) == 0 && c.count(true, true) == 0 ||
		c.state == StateRefused && c.reason == ReasonIdle
}

// classify says what f is: "out", "child", "dnat" or "".
func (r *refModel) classify(f *Flow) (string, Permission) {
	in := Permission{Key: Key{f.Dst, f.Src.Addr, f.OrigZone}, Int: f.ReplySrc}
	inside := false
	for _, s := range r.policy.Subnets {
		inside = inside || s.Prefix.Contains(f.Src.Addr.Netip())
	}
	switch {
	case f.Status.Has(StatusExpected):
		return "child", in
	case inside && f.Status.Has(StatusSrcNAT):
		return "out", Permission{Key: Key{f.ReplyDst, f.ReplySrc.Addr, f.ReplyZone}, Int: f.Src}
	case !inside && f.Status.Has(StatusDstNAT):
		return "dnat", in
	}
	return "", in
}

func (r *refModel) seen(now time.Duration, f *Flow) {
	what, p := r.classify(f)
	c := r.find(p.Key, p.Int)
	switch what {
	case "out":
		for _, x := range r.policy.ExcludePeerPorts {
			if f.ReplySrc.Port == x {
				return
			}
		}
		if c != nil {
			r.add(now, c, f, false)
			return
		}
		c = &refClaim{Permission: p, state: StateWaiting}
		rivals := r.ofKey(p.Key)
		r.claims = append(r.claims, c)
		r.add(now, c, f, false)
		if len(rivals) == 0 {
			r.grant(now, c)
		} else if rivals[0].lingers() {
			r.end(now, rivals[0])
		}
	case "child":
		if c != nil {
			r.add(now, c, f, true)
		}
	case "dnat":
		e := p.extKey()
		last, known := r.forwarded[e]
		r.forwarded[e] = now
		if known && now-last < forwardMemory {
			return
		}
		for _, c := range append([]*refClaim(nil), r.claims...) {
			if c.extKey() == e && c.state == StateStanding {
				r.refuse(now, c, ReasonForwarded)
				if c.count(false, false) == 0 {
					r.end(now, c)
				}
			}
		}
	}
}

func (r *refModel) add(now time.Duration, c *refClaim, f *Flow, child bool) {
	port, packets := f.ReplySrc.Port, f.OrigPackets
	if child {
		port, packets = f.Src.Port, f.ReplyPackets
	}
	var fl *refFlow
	for _, x := range c.flows {
		if x.port == port && x.child == child {
			fl = x
		}
	}
	known := fl != nil && fl.id == f.ID
	if fl == nil {
		fl = &refFlow{port: port, child: child}
		c.flows = append(c.flows, fl)
	}
	fed := !child || f.Status.Has(StatusSeenReply)
	if !f.HasCounters && !known && !child {
		packets = 1
	}
	if fed && known && f.HasCounters {
		fed = fl.packets != packets
	}
	fl.id, fl.packets, fl.answered = f.ID, packets, child && f.Status.Has(StatusSeenReply)
	if r.dumped != nil {
		r.dumped[fl] = true
	}
	if fed {
		c.fed, c.dieAt = now, 0
		if c.state == StateRefused && c.reason == ReasonIdle {
			r.grant(now, c)
		}
	}
}

func (r *refModel) grant(now time.Duration, c *refClaim) {
	if seen, ok := r.forwarded[c.extKey()]; ok && now-seen < forwardMemory {
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
	if next := r.ofKey(c.Key); owner && len(next) > 0 {
		r.grant(now, next[0])
	}
}

func (r *refModel) settle(now time.Duration, c *refClaim) {
	if c.state != StateStanding && c.count(false, false) == 0 ||
		c.lingers() && len(r.ofKey(c.Key)) > 1 {
		r.end(now, c)
	}
}

func (r *refModel) gone(now time.Duration, f *Flow) {
	if r.dumped != nil {
		r.over[f.ID] = true
	}
	what, p := r.classify(f)
	c := r.find(p.Key, p.Int)
	if c == nil || what != "out" && what != "child" {
		return
	}
	for _, fl := range c.flows {
		port := f.ReplySrc.Port
		if what == "child" {
			port = f.Src.Port
		}
		if fl.id == f.ID && fl.port == port && fl.child == (what == "child") {
			r.add(now, c, f, fl.child)
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
			if fl.id == o.ID && fl.port == o.Port {
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
		case c.state == StateRefused && c.reason != ReasonIdle && now >= c.retry:
			r.grant(now, c)
		case c.state == StateStanding && now > c.made && now >= c.fed+r.policy.Lifetime:
			switch {
			case c.dieAt == 0 && len(c.flows) > 0:
				c.dieAt = now + grace
				ask = append(ask, c)
			case now < c.dieAt:
			case c.count(false, false) == 0 || len(r.ofKey(c.Key)) > 1:
				r.end(now, c)
			default:
				c.state, c.reason = StateRefused, ReasonIdle
			}
		}
	}
	return ask
}

func (r *refModel) begin() {
	r.dumped, r.over, r.inbound = map[*refFlow]bool{}, map[uint32]bool{}, nil
}

func (r *refModel) dump(now time.Duration, f *Flow) {
	if r.over[f.ID] {
		return
	}
	if f.Status.Has(StatusSrcNAT) {
		r.seen(now, f)
	} else {
		r.inbound = append(r.inbound, *f)
	}
}

func (r *refModel) finish(now time.Duration) {
	for i := range r.inbound {
		if f := &r.inbound[i]; !r.over[f.ID] {
			r.seen(now, f)
		}
	}
	seen := r.dumped
	r.dumped = nil
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

func ep(s string) Endpoint { return EndpointFrom(netip.MustParseAddrPort(s)) }
