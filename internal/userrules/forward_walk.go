package userrules

import (
	"fmt"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// Forwards returns what the rules do to UDP packets that come in by one of the links
// outside; nil stands for all links. It follows the chains of the prerouting hook that translate, or
// hand packets to transparent proxies, and the chains that they jump to. Chains of the output
// hook never see such packets.
//
// A rule that was not understood is never ignored: a Forward that is Unknown stands for it.
// If something may have been missed, the answer also includes the last complete reading.
func (rs *Ruleset) Forwards(outside []Link) (found []Forward) {
	for _, t := range rs.tables {
		found = append(found, t.forwards(outside)...)
	}
	return found
}

// ForwardsMayBeHidden reports whether iptables-legacy may have forwards that only root
// and its group can see.
func (rs *Ruleset) ForwardsMayBeHidden() bool {
	return rs.hides(legacy4, natTable) || rs.hides(legacy6, natTable)
}

// A Forwarder finds the forwards in one Ruleset after the other. It looks only at tables
// that changed. The zero value is ready for use.
type Forwarder struct {
	outside []Link
	found   map[*table][]Forward
}

// Forwards returns the forwards of a ruleset, and whether they are the same as in the last
// call with the same links.
func (f *Forwarder) Forwards(rs *Ruleset, outside []Link) (all []Forward, same bool) {
	before := f.found
	if !slices.EqualFunc(f.outside, outside, Link.Equal) {
		before = nil
	}
	same = before != nil
	f.outside, f.found = slices.Clone(outside), map[*table][]Forward{}
	for _, t := range rs.tables {
		if len(t.of(unix.NF_INET_PRE_ROUTING, natKind)) == 0 && t.failed == nil && !t.mayProxy() {
			continue
		}
		found, known := before[t]
		if !known {
			found, same = t.forwards(outside), false
		}
		f.found[t] = found
		all = append(all, found...)
	}
	return all, same && len(f.found) == len(before)
}

// forwards returns the forwards of the table.
func (t *table) forwards(outside []Link) []Forward {
	w := &walker{table: t, outside: outside, seen: map[string]bool{}}
	in := condition{family: t.family}
	switch {
	case t.failed == nil:
		for _, b := range t.of(unix.NF_INET_PRE_ROUTING, natKind) {
			w.accepted = letPass{}
			w.chain(b.name, in, 0)
		}
		w.proxied()
	case t.name == natTable:
		w.unread(in, t.failed.Error())
	default:
		return nil
	}
	if t.readable != nil {
		for _, f := range t.readable.forwards(outside) {
			w.add(f)
		}
	}
	return w.found
}

// A walker follows packets through the chains of one table. It carries the conditions of
// the rules along, so that a condition on a jump applies to everything behind the jump.
type walker struct {
	table   *table
	outside []Link
	found   []Forward
	seen    map[string]bool
	visits  int
	// sources gets the rules that translate sources, in postrouting chains; nil for others.
	sources func(r *rule, n SourceNAT, conds []condition)
	exempts bool // an earlier rule may let packets pass untranslated; for source NAT
	// passes gets the packets that such chains let pass untranslated.
	passes func(conds []condition)
	// translates gets the rules that translate destinations, instead of found, and helps those
	// with a statement of finds.
	translates, helps func(r *rule, conds []condition)
	finds             func(s statement) bool
	// first says what is known of the packets, for diversions; nil for others.
	first *firstPacket
	// accepted and returned have, unless sources is set, the packets that earlier rules let pass: to
	// the end of the base chain, and of the chain.
	accepted letPass
	returned []letPass // of each chain on the way
	subtraction
	own *ownAddrs // nil until it is needed
	// The keys of sets that rules look up, and for diversions the addresses among them.
	spans map[*set][]span
	lists map[*set]cone.AddrRanges
}

const (
	// maxDepth is the kernel's own limit for jumps (NFT_JUMP_STACK_SIZE); iptables-legacy
	// has another one.
	maxDepth = 16
	// maxVisits limits how many rules of a table are visited if each chain jumps many times
	// to the next.
	maxVisits = 1 << 18
)

func (w *walker) chain(name string, in condition, depth int) {
	c := w.table.chains[name]
	if c == nil {
		return // it was deleted, or no packet reaches it
	}
	if c.failed != nil {
		w.unread(in, fmt.Sprintf("%s %s: %v", w.table.title, name, c.failed))
	}
	if c.odd != "" {
		w.opaque(in, fmt.Sprintf("%s: %s", name, c.odd))
	}
	if w.sources == nil {
		w.returned = append(w.returned, letPass{})
		defer func() { w.returned = w.returned[:len(w.returned)-1] }()
	}
	for i := range c.rules {
		switch w.visits++; {
		case w.visits == maxVisits: // nobody looks at the remaining rules, whatever their conditions
			w.opaque(condition{family: w.table.family}, "too many jumps")
		case depth > maxDepth:
			w.opaque(in, "too many jumps")
		}
		if depth > maxDepth || w.visits >= maxVisits {
			return
		}
		w.rule(&c.rules[i], in, depth)
	}
}

// opaque reports something that may forward any packet that reaches it.
func (w *walker) opaque(in condition, why string) {
	in.unknown = true
	for _, c := range w.byAddr(in) {
		w.add(c.forward(w.table.title + " " + why))
	}
}

// unread reports something that could not be read.
func (w *walker) unread(in condition, text string) {
	in.unknown = true
	for _, c := range w.byAddr(in) {
		f := c.forward(text)
		f.Unread = w.table.failed != nil || w.table.readable != nil
		w.add(f)
	}
}

func (w *walker) opaqueAll(conds []condition, why string) {
	for _, c := range conds {
		w.opaque(c, why)
	}
}

// rule evaluates one rule. Sets of concatenated keys lead to several conditions at a time;
// a packet must meet one of them.
func (w *walker) rule(r *rule, in condition, depth int) {
	conds := []condition{in}
	var regs registers
	for _, s := range r.statements {
		if w.sources != nil && s.translatesSource() {
			w.sources(r, w.table.sourceNAT(r), conds)
			return
		}
		if w.first != nil {
			var known chance
			switch s, conds, known = w.ofFirst(r, &regs, s, conds); known {
			case always:
				continue
			case never:
				return
			}
		}
		switch e := s.expr.(type) {
		case *expr.Verdict:
			w.verdict(e, conds, depth)
			return
		case *expr.NAT:
			if e.Type == expr.NATTypeDestNAT {
				w.forward(r, w.ofFamily(conds, byte(e.Family)))
			}
			return
		case *expr.Redir:
			w.forward(r, conds)
			return
		case *expr.Target:
			if slices.Contains([]string{"DNAT", "REDIRECT", "NETMAP"}, e.Name) {
				w.forward(r, conds)
			}
		case *expr.Match:
			if e.Name == "comment" {
				continue
			}
			if fromSomePorts(e) {
				conds = partly(conds)
			}
			fields, t := xtMatch(e)
			conds = w.narrow(conds, fields, t)
		case *expr.Lookup:
			conds = w.lookup(r, e, &regs, conds, depth)
		default:
			conds = w.plain(conds, &regs, s)
		}
	}
}

// ofFirst evaluates what a statement asks of the first packet, of which more is known. It returns the
// statement for the rest of the rule's evaluation: always says that there is nothing more to it, never
// that the packet does not match.
func (w *walker) ofFirst(r *rule, regs *registers, s statement, conds []condition) (statement, []condition, chance) {
	if f, reg := w.first.loads(s.expr); f.kind != other {
		regs.put(reg, []field{f})
		return s, conds, always
	}
	if m, ok := s.expr.(*expr.Match); ok {
		s.expr = toPeers(m)
		if known := w.first.xtMatch(m); known == always || known == never {
			return s, conds, known
		}
	}
	if e, ok := s.expr.(*expr.TProxy); ok && e.Family != unix.NFPROTO_UNSPEC {
		conds = w.ofFamily(conds, e.Family)
	}
	if w.helps != nil && w.finds(s) {
		w.helps(r, w.notPassed(conds))
	}
	if w.table.givesHelper(s) || s.proxies() || s.untracks() { // the packet goes on unchanged
		return s, conds, always
	}
	return s, conds, maybe
}

// verdict follows packets that meet the conditions of a rule.
func (w *walker) verdict(e *expr.Verdict, conds []condition, depth int) {
	if e.Kind == expr.VerdictJump || e.Kind == expr.VerdictGoto {
		for _, c := range conds {
			w.chain(e.Chain, c, depth+1)
		}
		w.exempts = w.exempts || e.Kind == expr.VerdictGoto && len(conds) > 0 // later rules do not see them
	} else {
		w.exempts = true
		if w.passes != nil && (e.Kind == expr.VerdictAccept || depth == 0) {
			w.passes(conds)
		}
	}
	w.pass(e.Kind, conds)
}

// lookup narrows the conditions to keys that a set has, and follows the verdicts of a verdict map.
func (w *walker) lookup(r *rule, e *expr.Lookup, regs *registers, conds []condition, depth int) []condition {
	set := w.set(e.SetName)
	fields := regs.take(e.SourceRegister, set.size)
	read := fields // as if nobody but the user changed the set
	if !set.fixed() {
		conds, fields = w.unfixed(r, conds, fields, set)
	}
	if e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT {
		w.branch(r, conds, e.SetName, fields, read, depth)
		return partly(conds) // packets whose key is not in the map go on to the next rule
	}
	if w.first != nil && r.spares(e, set) {
		fields = read
	}
	conds = w.narrow(conds, fields, w.test(set, e.Invert))
	if e.IsDestRegSet {
		regs.put(e.DestRegister, nil)
	}
	return conds
}

// set returns a set that a rule looks up. If nothing is known of it, its key is all
// registers.
func (w *walker) set(name string) *set {
	if s := w.table.sets[name]; s != nil && s.failed == nil {
		return s
	}
	return &set{size: 64, failed: unix.ENOENT}
}

// unfixed returns fields, which a rule looks up in a set, without what is known of sources: packets
// may add sources to the set at any time. If they do, or elements expire, then that holds for
// destinations as well in the walk for diversions and in rules that let packets pass, and the
// conditions are in doubt.
func (w *walker) unfixed(r *rule, conds []condition, fields []field, s *set) ([]condition, []field) {
	changing := s.changing && (w.first != nil || r.letsPass())
	fields = slices.Clone(fields)
	for i, f := range fields {
		if f.isSource() || changing && (f.kind == address4 || f.kind == address6) {
			fields[i].kind = other
		}
	}
	if changing {
		conds = partly(conds)
	}
	return conds, fields
}

// spares reports whether the keys in a set can only keep packets from a rule that takes them. Then,
// in the walk for diversions, the elements count as they were read: what packets add later makes
// conditions too wide, until the next look.
func (r *rule) spares(e *expr.Lookup, s *set) bool { return !s.changing && r.letsPass() != e.Invert }

// letsPass reports whether the rule does nothing with packets but to let them pass.
func (r *rule) letsPass() bool {
	passes := false
	for _, s := range r.statements {
		switch e := s.expr.(type) {
		case *expr.Verdict:
			passes = e.Kind == expr.VerdictAccept || e.Kind == expr.VerdictReturn
		case *expr.Target, *expr.Objref, *objrefMap:
			return false
		}
		if s.proxies() {
			return false
		}
	}
	return passes
}

// branch follows packets through a verdict map. read are the fields as spares says, for elements that let packets pass.
func (w *walker) branch(r *rule, conds []condition, name string, fields, read []field, depth int) {
	set := w.set(name)
	if set.failed != nil || !set.loaded {
		w.opaqueAll(conds, fmt.Sprintf("%s: map %s cannot be read", r.chain, name))
	}
	passed := make(map[expr.VerdictKind][]condition) // by elements that have no packet in common
	pass := func() {
		for kind, conds := range passed {
			w.pass(kind, conds)
		}
		clear(passed)
	}
	defer pass()
	overlap := set.interval && len(set.fields) > 1 // elements may, and the first one wins
	for _, el := range set.elements {
		if overlap || el.others { // the latter comes last, for what no other element has
			pass()
		}
		key := fields
		if w.first != nil && !set.changing && el.verdict.Chain == "" {
			key = read
		}
		for _, c := range w.narrow(conds, key, test{any: []span{el.span}, byPart: len(set.fields) > 1}) {
			c.wide = c.wide || w.first != nil && el.others
			if el.verdict.Chain == "" {
				w.exempts = true
			} else {
				w.chain(el.verdict.Chain, c, depth+1)
				w.exempts = w.exempts || el.verdict.Kind == expr.VerdictGoto
			}
			c.wide = c.wide || set.changing
			passed[el.verdict.Kind] = append(passed[el.verdict.Kind], c)
		}
	}
}

func (w *walker) forward(r *rule, conds []condition) {
	conds = w.notPassed(conds)
	if w.translates != nil {
		w.translates(r, conds)
		return
	}
	text := r.title(w.table)
	if r.comment != "" {
		text += fmt.Sprintf(" (%s)", r.comment)
	}
	maps := w.netmaps(r)
	for _, all := range conds {
		for _, c := range w.byAddr(all) {
			f := c.forward(text)
			f.To = r.leadsTo()
			for _, f := range f.by(maps) {
				w.add(f)
			}
		}
	}
}

// by returns what each of the netmaps does, if there are any, and what is left.
func (f Forward) by(maps []netmap) (all []Forward) {
	for _, m := range maps {
		one := f
		if one.ToPrefix = m.to; m.from.First.IsValid() {
			one.Addrs = intersectAddrs(f.Addrs, cone.AddrRanges{m.from})
		}
		if len(one.Addrs) > 0 || one.Addrs == nil {
			all = append(all, one)
		}
	}
	if all == nil {
		all = []Forward{f}
	}
	return all
}

// title names a rule of a table by its handle, as nft does, or by its number, as
// iptables-legacy does.
func (r *rule) title(t *table) string {
	if t.legacy != nil {
		return fmt.Sprintf("%s %s rule %d", t.title, r.chain, r.number)
	}
	return fmt.Sprintf("%s %s handle %d", t.title, r.chain, r.handle)
}

// add adds f unless it was found already: two jumps may lead to one chain. Rules that look up one
// set share the list of its addresses.
func (w *walker) add(f Forward) {
	brief, list := f, listAt[cone.AddrRange]{}
	if len(f.Sources) > 16 {
		brief.Sources, list = nil, placeOf(f.Sources)
	}
	key := fmt.Sprint(brief, list)
	if !w.seen[key] {
		w.seen[key] = true
		w.found = append(w.found, f)
	}
}

// ofFamily narrows conds to the family that a statement translates: "dnat ip" in a table of
// family inet leaves IPv6 packets alone.
func (w *walker) ofFamily(conds []condition, fam byte) []condition {
	return w.narrow(conds, []field{{kind: family, size: 1}}, test{any: []span{only([]byte{fam})}})
}
