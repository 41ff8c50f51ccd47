package userrules

import (
	"fmt"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Forwards returns what the rules do to UDP packets that come in by one of the links
// outside; nil stands for all links. It follows the NAT chains of the prerouting hook, and
// what they jump to. Chains of the output hook never see such packets.
//
// What was not understood is never taken for nothing: a Forward that is Unknown stands for
// it. Where something may have been missed, what was read before is in the answer, too.
func (rs *Ruleset) Forwards(outside []Link) (found []Forward) {
	for _, t := range rs.tables {
		found = append(found, t.forwards(outside)...)
	}
	return found
}

// ForwardsMayBeHidden reports whether there may be forwards of iptables-legacy that nobody
// but root may know of.
func (rs *Ruleset) ForwardsMayBeHidden() bool {
	return rs.hides(legacy4, natTable) || rs.hides(legacy6, natTable)
}

// A Forwarder finds forwards in one Ruleset after the other. It looks only into tables
// that are others than before. The zero value is ready for use.
type Forwarder struct {
	outside []Link
	found   map[*table][]Forward
}

// Forwards returns those of a ruleset, and whether they are the same as the last time, for
// the same links.
func (f *Forwarder) Forwards(rs *Ruleset, outside []Link) (all []Forward, same bool) {
	before := f.found
	if !slices.Equal(f.outside, outside) {
		before = nil
	}
	same = before != nil
	f.outside, f.found = slices.Clone(outside), map[*table][]Forward{}
	for _, t := range rs.tables {
		if len(t.of(unix.NF_INET_PRE_ROUTING, natKind)) == 0 && t.failed == nil {
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

// forwards returns what the table forwards.
func (t *table) forwards(outside []Link) []Forward {
	w := &walker{table: t, outside: outside, seen: map[string]bool{}}
	in := condition{family: t.family}
	switch {
	case t.failed == nil:
		for _, b := range t.of(unix.NF_INET_PRE_ROUTING, natKind) {
			w.chain(b.name, in, 0)
		}
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

// A walker follows packets through the chains of one table. It carries along
// what their rules ask for, so that a condition on a jump counts for all that
// comes behind it.
type walker struct {
	table   *table
	outside []Link
	found   []Forward
	seen    map[string]bool
	visits  int
	exempts bool // a rule that was seen may let packets go on as they are
	// sources gets what translates sources, in chains of postrouting; nil in others.
	sources func(r *rule, n SourceNAT, conds []condition)
}

const (
	// maxDepth is the kernel's own limit for jumps (NFT_JUMP_STACK_SIZE), but for those
	// of iptables-legacy.
	maxDepth = 16
	// maxVisits bounds the rules looked at in a table where each chain jumps
	// many times to the next.
	maxVisits = 1 << 18
)

func (w *walker) chain(name string, in condition, depth int) {
	c := w.table.chains[name]
	if c == nil {
		return // it is gone, or no packet gets there
	}
	if c.failed != nil {
		w.unread(in, fmt.Sprintf("%s %s: %v", w.table.title, name, c.failed))
	}
	if c.odd != "" {
		w.opaque(in, fmt.Sprintf("%s: %s", name, c.odd))
	}
	for i := range c.rules {
		switch w.visits++; {
		case w.visits == maxVisits: // nobody looks at what comes elsewhere either
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

// opaque reports something that may forward whatever comes there.
func (w *walker) opaque(in condition, why string) {
	in.unknown = true
	w.add(in.forward(w.table.title + " " + why))
}

// unread reports something that could not be read.
func (w *walker) unread(in condition, text string) {
	in.unknown = true
	f := in.forward(text)
	f.Unread = w.table.failed != nil || w.table.readable != nil
	w.add(f)
}

func (w *walker) opaqueAll(conds []condition, why string) {
	for _, c := range conds {
		w.opaque(c, why)
	}
}

// rule works off one rule. More than one condition at a time come from sets of
// concatenated keys; a packet has to meet one of them.
func (w *walker) rule(r *rule, in condition, depth int) {
	conds := []condition{in}
	var regs registers
	for _, s := range r.statements {
		if w.sources != nil && s.translatesSource() {
			w.sources(r, r.sourceNAT(), conds)
			return
		}
		switch e := s.expr.(type) {
		case *expr.Verdict:
			if e.Kind == expr.VerdictJump || e.Kind == expr.VerdictGoto {
				for _, c := range conds {
					w.chain(e.Chain, c, depth+1)
				}
			} else {
				w.exempts = true
			}
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
			fields, t := xtMatch(e)
			conds = w.narrow(conds, fields, t)
		case *expr.Lookup:
			set := w.set(e.SetName)
			fields := regs.take(e.SourceRegister, set.size)
			if !set.fixed() {
				fields = withoutSources(fields)
			}
			if e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT {
				w.branch(r, conds, e.SetName, fields, depth)
				continue // what is not in the map goes on
			}
			conds = w.narrow(conds, fields, set.test(e.Invert))
			if e.IsDestRegSet {
				regs.put(e.DestRegister, nil)
			}
		default:
			conds = w.plain(conds, &regs, s)
		}
	}
}

// set returns a set that a rule looks up; all registers are the key of one of which
// nothing is known.
func (w *walker) set(name string) *set {
	if s := w.table.sets[name]; s != nil && s.failed == nil {
		return s
	}
	return &set{size: 64, failed: unix.ENOENT}
}

// withoutSources returns fields with nothing known of sources: packets may add others to
// the set at any time.
func withoutSources(fields []field) []field {
	fields = slices.Clone(fields)
	for i := range fields {
		if fields[i].isSource() {
			fields[i].kind = other
		}
	}
	return fields
}

// branch follows packets through a map of verdicts.
func (w *walker) branch(r *rule, conds []condition, name string, fields []field, depth int) {
	set := w.set(name)
	if set.failed != nil || !set.loaded {
		w.opaqueAll(conds, fmt.Sprintf("%s: map %s cannot be read", r.chain, name))
	}
	for _, el := range set.elements {
		for _, c := range w.narrow(conds, fields, test{any: []span{el.span}, byPart: len(set.fields) > 1}) {
			if el.verdict.Chain == "" {
				w.exempts = true
			} else {
				w.chain(el.verdict.Chain, c, depth+1)
			}
		}
	}
}

func (w *walker) forward(r *rule, conds []condition) {
	text := r.title(w.table)
	if r.comment != "" {
		text += fmt.Sprintf(" (%s)", r.comment)
	}
	for _, c := range conds {
		c.partial = c.partial || w.exempts
		f := c.forward(text)
		f.To = r.leadsTo()
		w.add(f)
	}
}

// title names a rule of a table by its handle, as nft does, or where it has none by its
// number, as iptables-legacy does.
func (r *rule) title(t *table) string {
	if t.legacy != nil {
		return fmt.Sprintf("%s %s rule %d", t.title, r.chain, r.number)
	}
	return fmt.Sprintf("%s %s handle %d", t.title, r.chain, r.handle)
}

// add adds what is not there yet: two jumps may lead to one chain.
func (w *walker) add(f Forward) {
	key := fmt.Sprint(f)
	if !w.seen[key] {
		w.seen[key] = true
		w.found = append(w.found, f)
	}
}

// ofFamily narrows to the family that a statement translates; "dnat ip" in a
// table of family inet passes IPv6 by.
func (w *walker) ofFamily(conds []condition, fam byte) []condition {
	return w.narrow(conds, []field{{kind: family, size: 1}}, test{any: []span{only([]byte{fam})}})
}
