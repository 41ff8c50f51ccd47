package userrules

import (
	"fmt"
	"math"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// fates is a set of things that may happen to a packet.
type fates uint8

const (
	accepts    fates = 1 << iota // goes on to the next base chain
	drops                        // or rejects
	returns                      // reaches the end of the chain
	proceeds                     // goes on to the next rule
	translates                   // gets another source in a postrouting chain, another destination in one of prerouting
)

// A hookWalk takes the packets of a class through the chains of one table.
type hookWalk struct {
	table *table
	child *child
	// most ignores rules that match only a few packets.
	most  bool
	known map[string]fates // by chain
	depth int
	// listed says that the last statement looked up an address in a set that was not read.
	// If packets in the set are dropped, the set is assumed to have few addresses; if they
	// are accepted, it may have most.
	listed bool
	at     string // the chain of the last statement
	// translator gets the rules that may translate the packets, with what the registers hold then. It may be nil.
	translator func(r *rule, regs *cells)
	members    *Members // nil if only the elements count that were read
}

// chain returns the possible fates of the packets in a chain.
func (w *hookWalk) chain(name string) (f fates, err error) {
	if f, ok := w.known[name]; ok {
		return f, nil
	}
	// The kernel allows neither loops nor more jumps than this.
	if w.known[name] = anyFate &^ proceeds; w.depth > maxDepth {
		return w.known[name], nil
	}
	w.depth++
	defer func() { w.depth-- }()
	c := w.table.chains[name]
	if c == nil {
		c = &chain{} // it was deleted, or no packet reaches it
	}
	if c.failed != nil {
		return 0, fmt.Errorf("chain %s: %w", name, c.failed)
	}
	for i := range c.rules {
		here, err := w.rule(&c.rules[i])
		if err != nil {
			return 0, err
		}
		f |= here &^ proceeds
		if here&proceeds == 0 {
			w.known[name] = f
			return f, nil
		}
	}
	f |= returns
	w.known[name] = f
	return f, nil
}

// weigh rounds rare cases to never, and their opposite to always, if w.most is set.
func (w *hookWalk) weigh(c chance) chance {
	switch {
	case w.most && c == rarely:
		return never
	case w.most && c == mostly:
		return always
	}
	return c
}

// rule returns the possible fates of the packets at a rule.
func (w *hookWalk) rule(r *rule) (fates, error) {
	var regs cells
	regs.forget(unix.NFT_REG_1)
	match, listed := always, false
	for _, s := range r.statements {
		w.listed, w.at = false, r.chain
		end, c, err := w.statement(&regs, s)
		if err != nil {
			return 0, err
		}
		if match = match.and(c); match == never {
			break
		}
		if end == 0 {
			listed = listed || w.listed
			continue
		}
		// The statement ends the rule.
		blocks := match == rarely && end == drops || match == mostly && end == accepts
		if listed && match != always && !blocks {
			match = maybe
		}
		likely := w.weigh(match)
		if end == translates && likely != never && w.translator != nil {
			w.translator(r, &regs)
		}
		switch likely {
		case never:
			return proceeds, nil
		case always:
			return end, nil
		}
		return end | proceeds, nil
	}
	return proceeds, nil
}

const anyFate = accepts | drops | returns | proceeds

// statement returns the chance that the rule continues after the statement. If the
// statement ends the rule, it returns the packets' fates and their chance instead.
func (w *hookWalk) statement(regs *cells, s statement) (end fates, c chance, err error) {
	switch e := s.expr.(type) {
	case *expr.Verdict:
		end, err = w.verdict(*e)
		return end, always, err
	case *expr.Reject:
		return drops, always, nil
	case *expr.Queue:
		return accepts | drops, always, nil
	case *expr.FlowOffload:
		return 0, never, nil // does not match while conntrack has not confirmed the flow
	case *expr.Lookup:
		return w.lookup(regs, e)
	case *expr.Target:
		if slices.Contains(natTargets, e.Name) {
			return translates, always, nil
		}
		return xtTarget(e), always, nil
	case *expr.Match:
		if w.members != nil && e.Name == "set" {
			if matches, known := w.members.matches(e, w.child); known {
				return 0, certain(matches), nil
			}
		}
		w.listed = e.Name == "set"
		return 0, w.child.xtMatch(e), nil
	case *expr.Cmp:
		return 0, regs.compare(e), nil
	case *expr.Range:
		in, _ := within(regs.get(e.Register, len(e.FromData)), e.FromData, e.ToData)
		return 0, in.inverted(e.Op == expr.CmpOpNeq), nil
	case *expr.Payload:
		if e.OperationType == expr.PayloadLoad {
			w.child.load(regs, e)
		} else {
			w.child.rewritten = true
			clear(w.known)
		}
	case *expr.Ct:
		if !e.SourceRegister && !w.child.has(e.Key) {
			return 0, never, nil // nft_ct_get_eval
		}
		w.child.load(regs, e)
	case *expr.Bitwise, *expr.Meta, *expr.Fib, *expr.Immediate:
		w.child.load(regs, e)
	case *expr.Objref:
		switch e.Type {
		case unix.NFT_OBJECT_QUOTA, unix.NFT_OBJECT_LIMIT, unix.NFT_OBJECT_CONNLIMIT, objectSynProxy:
			return 0, maybe, nil
		}
	case *expr.Dynset:
		return 0, maybe, nil // does not match if the set is full or a limit is met
	default:
		if s.name == "masq" || s.name == "nat" || s.name == "redir" {
			return translates, always, nil
		}
		return 0, w.other(regs, s.name), nil
	}
	return 0, always, nil
}

const objectSynProxy = 10 // NFT_OBJECT_SYNPROXY

// other evaluates statements of which only the name is known.
func (w *hookWalk) other(regs *cells, name string) chance {
	switch name {
	case "counter", "log", "notrack", "dup", "last", "cthelper", "cttimeout", "ctexpect", "secmark":
		return always
	case "byteorder", "hash", "numgen":
		regs.forget(unix.NFT_REG_1)
		return always
	}
	regs.forget(unix.NFT_REG_1)
	return maybe
}

func (w *hookWalk) verdict(v expr.Verdict) (fates, error) {
	switch v.Kind {
	case expr.VerdictAccept:
		return accepts, nil
	case expr.VerdictDrop:
		return drops, nil
	case expr.VerdictReturn:
		return returns, nil
	case expr.VerdictContinue, expr.VerdictBreak:
		return proceeds, nil
	case expr.VerdictGoto:
		return w.chain(v.Chain)
	case expr.VerdictJump:
		f, err := w.chain(v.Chain)
		if f&returns != 0 {
			f = f&^returns | proceeds
		}
		return f, err
	case expr.VerdictQueue:
		return accepts | drops, nil
	}
	return anyFate, nil
}

// lookup evaluates a lookup in a set, a map, or a verdict map.
func (w *hookWalk) lookup(regs *cells, e *expr.Lookup) (fates, chance, error) {
	set, err := w.set(e.SetName)
	if err != nil {
		return 0, never, err
	}
	key := slices.Clone(regs.get(e.SourceRegister, set.size))
	verdicts := set.verdicts && e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT
	if w.members != nil && set.named && !set.verdicts && !set.tells(key) {
		if exact, ok := set.exact(key); ok {
			if value, found, known := w.members.value(w.table, e.SetName, exact); known {
				if e.IsDestRegSet {
					regs.put(e.DestRegister, knownBytes(value))
				}
				return 0, certain(found).inverted(e.Invert), nil
			}
		}
	}
	if e.IsDestRegSet && !verdicts {
		regs.put(e.DestRegister, set.value(key))
	}
	if !set.tells(key) {
		if set.loaded && !set.changing { // it does of a part of the packets
			noteUnsure(key)
		}
		c := maybe
		if slices.ContainsFunc(key, func(c cell) bool { return c.origin != nil && c.even && c.known == 0 }) {
			c, w.listed = rarely, true
		}
		if verdicts {
			return anyFate, maybe, nil
		}
		return 0, c.inverted(e.Invert), nil
	}
	if !verdicts {
		c := set.contains(key)
		return 0, c.inverted(e.Invert), nil
	}
	var end fates
	c, err := w.branch(set, key, func(v expr.Verdict) error {
		f, err := w.verdict(v)
		end |= f
		return err
	})
	return end, c, err
}

// tells reports whether the elements of the set are known, and matter for the key. Those of a named
// set of addresses, which may be long, do not matter.
func (s *set) tells(key []cell) bool {
	return !s.changing && s.loaded && (s.verdicts || !s.named || slices.ContainsFunc(key, func(c cell) bool { return c.known != 0 }))
}

// value returns what a map has for a key, as far as it is known.
func (s *set) value(key []cell) []cell {
	if s.tells(key) {
		for _, el := range s.elements {
			c := always
			if !el.others {
				c, _ = s.has(key, el)
			}
			switch {
			case c == always && el.value != nil:
				return knownBytes(el.value)
			case c != never:
				return unknownBytes(16, nil)
			}
		}
	}
	return unknownBytes(16, nil)
}

// set returns a set that a rule of the table looks up. If UDP packets were not expected to
// reach the lookup (asked), the set was not read; the lookup says whether it is a verdict
// map.
func (w *hookWalk) set(name string) (*set, error) {
	s := w.table.sets[name]
	switch {
	case s == nil:
		return &set{verdicts: true}, nil
	case s.failed != nil:
		return nil, fmt.Errorf("chain %s: %w", w.at, s.failed)
	}
	return s, nil
}

// contains returns the chance that the key is in the set.
func (s *set) contains(key []cell) (c chance) {
	sum := 0.
	for _, el := range s.elements {
		if el.others {
			return always
		}
		one, p := s.has(key, el)
		c = max(c, one)
		if c == always {
			return always
		}
		if sum += p; sum > 0 && c < mostly {
			c = max(c, portion(sum))
		}
	}
	return c
}

// branch takes the verdicts of a verdict map that packets with the key may get, and returns the chance
// that the key is in the map.
func (w *hookWalk) branch(set *set, key []cell, take func(v expr.Verdict) error) (c chance, err error) {
	rest := always // the chance that no earlier element has the key
	for _, el := range set.elements {
		one := rest
		if !el.others {
			one, _ = set.has(key, el)
		}
		if one = w.weigh(one); one == never {
			continue
		}
		if err := take(el.verdict); err != nil || one == always {
			return always, err
		}
		c = max(c, one)
		rest = rest.and(one.not())
		if el.others {
			c = always
		}
	}
	return c, nil
}

// has returns the chance that a key is in an element. If all keys are equally likely, it
// also returns the fraction of keys that the element has.
func (s *set) has(key []cell, el element) (chance, float64) {
	if slices.Equal(el.low, el.high) && len(s.fields) <= 1 {
		c := equals(key, el.low)
		if c == rarely || c == mostly {
			unknown := 0
			for _, x := range key[:len(el.low)] {
				for bits := ^x.known; bits != 0; bits &= bits - 1 {
					unknown++
				}
			}
			return c, math.Ldexp(1, -unknown)
		}
		return c, 0
	}
	fields := s.fields
	if len(fields) == 0 {
		fields = []int{len(el.low)}
	}
	c, p, at := always, 1., 0
	for _, n := range fields {
		if at+n > len(key) || at+n > len(el.low) || at+n > len(el.high) {
			return min(c, maybe), 0
		}
		one, part := within(key[at:at+n], el.low[at:at+n], el.high[at:at+n])
		c, p = c.and(one), p*part
		at += (n + 3) &^ 3
	}
	return c, p
}
