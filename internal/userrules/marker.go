package userrules

import (
	"cmp"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Marker finds which marks packets have when they are routed. It is not safe for concurrent use.
type Marker struct {
	steps   [][]baseChain // the chains that may set marks, in the order of packets; those of one step in any order
	unknown bool          // rules are not understood, or may be missing
	guards  guards
	members *Members
}

// Marker returns a Marker for the rules.
func (rs *Ruleset) Marker() *Marker {
	m := &Marker{guards: guards{}}
	m.unknown = slices.ContainsFunc(rs.hidden, func(h hiddenTable) bool { return h.family == legacy4 })
	var chains []baseChain
	for _, t := range rs.tables {
		if !t.has(unix.NFPROTO_IPV4) {
			continue
		}
		m.unknown = m.unknown || t.failed != nil || t.torn
		for _, b := range t.of(unix.NF_INET_PRE_ROUTING, "") {
			if t.mayMark(b.name, make(map[string]bool)) {
				chains = append(chains, baseChain{t, b})
			}
		}
	}
	order := func(a, b baseChain) int {
		return cmp.Or(cmp.Compare(a.hookPriority(), b.hookPriority()), cmp.Compare(a.priority, b.priority))
	}
	slices.SortStableFunc(chains, order)
	for _, c := range chains {
		if last := len(m.steps) - 1; last >= 0 && order(m.steps[last][0], c) == 0 {
			m.steps[last] = append(m.steps[last], c)
		} else {
			m.steps = append(m.steps, []baseChain{c})
		}
	}
	return m
}

// Marks returns the marks with which a packet over IPv4 may be routed. Its flow is f, turned if it is
// a child, so that the source of f sends the packet. It comes in by a link, with one of the marks in
// arriving: rules of the families netdev and bridge, which are not read, or traffic control may have
// set these. known is false if it may have any other mark.
//
// A child has a connmark of its own, and what its host sends answers it: the packet is ESTABLISHED,
// and of the direction reply. No NAT chain sees a packet of an established flow.
//
// members tells what sets contain now. If it is nil, both outcomes of a set that was not read count.
func (m *Marker) Marks(f *cone.Flow, in Link, arriving []uint32, members *Members) (all []uint32, known bool) {
	if m.unknown {
		return nil, false
	}
	m.members = members
	if len(m.steps) == 0 {
		return arriving, true
	}
	packet, raw := sent(f, in), rawPacketOf(f, in)
	var states []marks
	for _, a := range arriving {
		states = append(states, marks{wholeMark(a), wholeMark(f.Mark)})
	}
	for _, step := range m.steps {
		var after []marks
		for _, order := range orders(step) {
			here := states
			for _, c := range order {
				var err error
				if here, err = m.through(c, packet, raw, here); err != nil {
					return nil, false
				}
			}
			for _, s := range here {
				after = added(after, s)
			}
		}
		if states = after; len(step) > 2 || len(states) > mostMarkEnds {
			return nil, false
		}
	}
	for _, s := range states {
		if s.packet != wholeMark(s.packet.val) {
			return nil, false
		}
		all = added(all, s.packet.val)
	}
	return all, len(all) > 0 // else it is dropped
}

// orders returns the orders in which a packet may meet one or two chains.
func orders(step []baseChain) [][]baseChain {
	if len(step) == 1 {
		return [][]baseChain{step}
	}
	turned := slices.Clone(step)
	slices.Reverse(turned)
	return [][]baseChain{step, turned}
}

// through returns the marks that a packet may have behind a base chain.
func (m *Marker) through(c baseChain, packet *child, raw *rawPacket, before []marks) (after []marks, err error) {
	at := c.hookPriority()
	if c.kind == natKind && packet.state == expr.CtStateBitESTABLISHED {
		return before, nil
	}
	if c.kind == natKind { // it may see the first packet alone
		after = slices.Clone(before)
	}
	for _, untracked := range []bool{true, false} {
		if untracked && at > priorityConntrack || !untracked && at < priorityConntrack {
			continue
		}
		packet.untracked = untracked
		w := markWalk{
			hookWalk: hookWalk{table: c.table, child: packet, known: map[string]fates{}, members: m.members},
			packet:   raw, guards: m.guards, ends: make(map[markChain][]markEnd),
		}
		w.regs.forget(unix.NFT_REG_1)
		for _, s := range before {
			ends, err := w.chain(c.base.name, s)
			if err != nil {
				return nil, err
			}
			for _, e := range ends {
				if e.fate == accepts || !c.drops {
					after = added(after, e.marks)
				}
			}
		}
	}
	return after, nil
}

// sent returns the packets that the source of f sends, as chains of the prerouting hook see them.
func sent(f *cone.Flow, in Link) *child {
	c := Leaving{Src: f.Src.Netip(), Dst: f.ReplySrc.Netip()}.packet()
	c.in, c.out = oneLink(&in, nil), oneLink(nil, nil)
	c.status, c.labelled, c.answers = uint32(f.Status), f.Labelled, f.IsChild()
	if !f.Status.Has(cone.StatusSeenReply) {
		c.knownStatus &^= statusSeenReply | statusAssured
	}
	switch {
	case c.answers:
		c.replies = unknownBytes(4, nil)
		c.state = expr.CtStateBitESTABLISHED
	case f.Status.Has(cone.StatusSeenReply):
		c.state = expr.CtStateBitESTABLISHED
	case f.Status.Has(cone.StatusExpected):
		c.state = expr.CtStateBitRELATED
	}
	return c
}

// mayMark reports whether packets may get other marks in a chain, or in one that they reach from
// it, or if that is not understood.
func (t *table) mayMark(name string, seen map[string]bool) bool {
	c := t.chains[name]
	if c == nil || seen[name] {
		return false
	}
	seen[name] = true
	if c.failed != nil || c.odd != "" || slices.ContainsFunc(c.rules, rule.marks) {
		return true
	}
	follow := func(chain string) bool { return t.mayMark(chain, seen) }
	jumps := func(r rule) bool { // c.jumps has none in iptables-legacy
		return slices.ContainsFunc(r.statements, func(s statement) bool {
			v, ok := s.expr.(*expr.Verdict)
			return ok && v.Chain != "" && follow(v.Chain)
		})
	}
	return slices.ContainsFunc(c.rules, jumps) || slices.ContainsFunc(c.lookups, func(l lookup) bool {
		s := t.sets[l.set]
		return l.verdicts && s != nil && (!s.loaded || slices.ContainsFunc(s.elements, func(e element) bool { return follow(e.verdict.Chain) }))
	})
}

func (r rule) marks() bool {
	return slices.ContainsFunc(r.statements, func(s statement) bool {
		switch e := s.expr.(type) {
		case *expr.Meta:
			return e.SourceRegister && e.Key == expr.MetaKeyMARK
		case *expr.Ct:
			return e.SourceRegister && e.Key == expr.CtKeyMARK
		case *expr.Queue:
			return true
		case *expr.Target:
			return slices.Contains(markTargets, e.Name)
		}
		return false
	})
}

// markTargets are the targets of iptables that may change the mark of a packet or its flow.
var markTargets = []string{"MARK", "CONNMARK", "HMARK", "SET", "TPROXY", "NFQUEUE"}
