//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Forwards reads what the NAT rules of the network namespace behind the
// descriptor netns, 0 for the current, do to UDP packets that come in by one of
// the links outside; nil stands for all links. It reads the prerouting chains
// of all tables of the families ip, ip6 and inet, and what they jump to, but
// those of our own tables. Chains of the output hook never see such packets.
// Rules of iptables-nft are among them, and those of iptables-legacy.
//
// Where there is no nftables the error is an *UnsupportedError.
func Forwards(netns int, outside []Link) ([]Forward, error) {
	r := &ForwardReader{netns: netns}
	found, _, err := r.Read(outside)
	return found, errors.Join(err, r.Close())
}

func familyOf(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyINet:
		return "inet"
	}
	return ""
}

// A walker follows packets through the chains of one table. It carries along
// what their rules ask for, so that a condition on a jump counts for all that
// comes behind it.
type walker struct {
	c       *conn                   // nil where all rules are there
	print   func(set string) uint64 // of the set's elements
	table   *nftables.Table
	title   string // of the table
	outside []Link
	foreign map[string]string // by chain: an expression that Linux does not have
	rules   map[string][]*nftables.Rule
	sets    map[string]*elementSet
	found   []Forward
	seen    map[string]bool
	visits  int
	unread  bool // something could not be read
	exempts bool // a rule that was seen may let packets go on as they are
	fail    func(chain string) error
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
	rules, ok := w.rules[name]
	if !ok {
		rules = w.read(name, in)
		w.rules[name] = rules
	}
	for _, r := range rules {
		if w.visits++; w.visits == maxVisits || depth > maxDepth {
			w.opaque(in, "too many jumps")
		}
		if depth > maxDepth || w.visits >= maxVisits {
			return
		}
		w.rule(r, in, depth)
	}
}

// read reads the rules of a chain. One that the library does not understand
// makes them all unknown.
func (w *walker) read(name string, in condition) []*nftables.Rule {
	rules, err := w.c.GetRules(w.table, &nftables.Chain{Name: name})
	if w.fail != nil {
		err = errors.Join(err, w.fail(name))
	}
	if err != nil && !errors.Is(err, unix.ENOENT) { // it may be gone
		w.unread = true
		w.opaque(in, fmt.Sprintf("%s: %v", name, nfnl.Permitted(err)))
	}
	if e := w.foreign[name]; e != "" {
		w.opaque(in, fmt.Sprintf("%s: a rule has %q, which is not known", name, e))
	}
	return rules
}

// opaque reports something that may forward whatever comes there.
func (w *walker) opaque(in condition, why string) {
	in.unknown = true
	w.add(in.forward(w.title + " " + why))
}

func (w *walker) opaqueAll(conds []condition, why string) {
	for _, c := range conds {
		w.opaque(c, why)
	}
}

// rule works off one rule. More than one condition at a time come from sets of
// concatenated keys; a packet has to meet one of them.
func (w *walker) rule(r *nftables.Rule, in condition, depth int) {
	conds := []condition{in}
	var regs registers
	for _, e := range r.Exprs {
		switch e := e.(type) {
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
			verdicts := e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT
			if verdicts || slices.ContainsFunc(fields, field.isAsked) {
				w.load(set)
			}
			if verdicts {
				if set.unknown {
					w.opaqueAll(conds, fmt.Sprintf("%s: map %s cannot be read", r.Chain.Name, e.SetName))
				}
				for _, el := range set.elements {
					for _, c := range w.narrow(conds, fields, test{any: []span{el.span}}) {
						w.chain(el.chain, c, depth+1)
					}
				}
				continue // what is not in the map goes on
			}
			conds = w.narrow(conds, fields, set.test(e.Invert))
			if e.IsDestRegSet {
				regs.put(e.DestRegister, nil)
			}
		default:
			conds = w.plain(conds, &regs, e)
		}
	}
}

func (w *walker) forward(r *nftables.Rule, conds []condition) {
	text := ruleName(w.title, r)
	if s := comment(r); s != "" {
		text += fmt.Sprintf(" (%s)", s)
	}
	for _, c := range conds {
		c.partial = c.partial || w.exempts
		w.add(c.forward(text))
	}
}

// ruleName names a rule of a table by its handle, as nft does, or where it has none by its
// number, as iptables-legacy does.
func ruleName(table string, r *nftables.Rule) string {
	if r.Handle == 0 {
		return fmt.Sprintf("%s %s rule %d", table, r.Chain.Name, r.Position)
	}
	return fmt.Sprintf("%s %s handle %d", table, r.Chain.Name, r.Handle)
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

// comment returns the comment of a rule, nft's or iptables'.
func comment(r *nftables.Rule) string {
	for _, e := range r.Exprs {
		if m, ok := e.(*expr.Match); ok {
			if c, ok := m.Info.(*xt.Comment); ok {
				return string(*c)
			}
		}
	}
	// userdata.Get does not check the length.
	if b := r.UserData; len(b) > 2 && b[0] == byte(userdata.TypeComment) && len(b) >= 2+int(b[1]) {
		return string(bytes.TrimRight(b[2:2+int(b[1])], "\x00"))
	}
	return ""
}
