package userrules

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A reading reads one table, chain by chain, as packets reach them from the base chains. It
// reuses the unchanged parts of the last reading.
type reading struct {
	r     *Reader
	key   tableKey
	bases []base
	old   *table // nil for a new table
	same  bool   // everything so far is the same as in old

	// The parts of old that were found unchanged.
	sameRules map[string]bool // by chain; the empty name stands for all chains
	sameSets  map[string]bool // by set: the elements are the same

	dumped map[string][]rawRule // by chain; nil until all are dumped in one go
	failed error                // of the dump in one go
	chains map[string]*chain
	sets   map[string]*set
	done   map[string]purposes // by chain
	fresh  map[string]bool     // sets that were described in this reading
	loaded map[string]bool     // sets whose elements were read or compared in this reading
}

// A rawRule is a rule as the kernel returned it.
type rawRule struct {
	print uint64
	body  []byte
}

// table reads a table. It returns old, the last reading or nil, if that is still the same.
func (r *Reader) table(o outline, old *table) *table {
	w := &reading{
		r: r, key: o.key, bases: o.bases, old: old,
		sameRules: map[string]bool{}, sameSets: map[string]bool{},
		chains: map[string]*chain{}, sets: map[string]*set{},
		done: map[string]purposes{}, fresh: map[string]bool{}, loaded: map[string]bool{},
	}
	if !w.inOneGo() {
		delete(r.prints, o.key) // the hashes would be those of an earlier table
	}
	if old != nil {
		w.compare()
	}
	w.same = old != nil && !old.torn && slices.Equal(old.bases, o.bases)
	for _, b := range o.bases {
		w.follow(b.name, b.purposes())
	}
	if w.same && len(w.chains) == len(old.chains) {
		return old
	}
	return &table{title: o.key.title(), name: o.key.name, family: o.key.family, handle: o.handle, bases: o.bases, chains: w.chains, sets: w.sets}
}

// inOneGo reports whether all rules of the table are dumped at once. Tables that translate
// may have thousands of chains. Tables that only filter may have very many rules that do
// not matter here.
func (w *reading) inOneGo() bool {
	return slices.ContainsFunc(w.bases, func(b base) bool { return b.kind == natKind })
}

// compare finds out which parts of old are still the same.
func (w *reading) compare() {
	if w.inOneGo() {
		known := w.r.prints[w.key]
		w.sameRules[""] = known != nil && w.r.sameRules(w.key, "", known)
	} else {
		for name, c := range w.old.chains {
			w.sameRules[name] = c.failed == nil && w.r.sameRules(w.key, name, c.prints)
		}
	}
	for name, s := range w.old.sets {
		if s.failed != nil || !s.loaded {
			continue
		}
		if !s.named { // it belongs to one rule, and cannot be changed
			w.sameSets[name] = true
			continue
		}
		print, err := w.r.elements(w.key, name, nil)
		w.sameSets[name] = err == nil && print == s.print
	}
}

// follow reads a chain for some purposes, and the chains and sets that packets reach from
// it.
func (w *reading) follow(name string, why purposes) {
	if w.done[name]&why == why {
		return
	}
	w.done[name] |= why
	c := w.chains[name]
	if c == nil {
		c = w.chain(name)
		w.chains[name] = c
	}
	for _, l := range c.lookups {
		s := w.set(l.set, false)
		if asks := l.asks & why; asks&forDestinations != 0 || asks != 0 && !s.changing {
			s = w.load(l.set)
		} else if l.sources && why&forDestinations != 0 || l.spares && why&(forDestinations|forHelpers) != 0 ||
			l.values && why&forSources != 0 {
			w.loadFew(l.set)
		}
		if l.verdicts {
			for _, e := range s.elements {
				if e.verdict.Chain != "" {
					w.follow(e.verdict.Chain, why)
				}
			}
		}
	}
	for _, jump := range c.jumps {
		w.follow(jump, why)
	}
}

// chain reads a chain.
func (w *reading) chain(name string) *chain {
	var old *chain
	if w.old != nil {
		old = w.old.chains[name]
	}
	failed := error(nil)
	if w.r.fail != nil {
		failed = w.r.fail(w.key.title(), name)
	}
	if failed == nil && old != nil && old.failed == nil && (w.sameRules[""] || w.sameRules[name]) {
		return old
	}
	var raw []rawRule
	if failed == nil {
		raw, failed = w.rules(name)
	}
	c := &chain{prints: rulePrints{}}
	for _, r := range raw {
		c.prints[r.print] = 0
	}
	if failed == nil && old != nil && old.failed == nil && old.prints.equal(c.prints) {
		return old
	}
	w.same = false
	if failed != nil {
		c.failed = nfnl.Permitted(failed)
		return c
	}
	for _, r := range raw {
		d, odd := ruleOf(w.key.family, r.body)
		if odd != "" {
			c.odd = "a rule has " + odd
		}
		c.rules, c.proxies = append(c.rules, d), c.proxies || d.proxies()
	}
	c.lookups, c.jumps = w.references(c.rules)
	return c
}

// rules dumps the rules of a chain.
func (w *reading) rules(name string) (raw []rawRule, err error) {
	if !w.inOneGo() {
		_, err = w.r.eachRule(w.key, name, func(print uint64, body []byte) { raw = append(raw, rawRule{print, bytes.Clone(body)}) })
		return raw, err
	}
	if w.dumped == nil {
		w.dumped = map[string][]rawRule{}
		all := rulePrints{}
		_, w.failed = w.r.eachRule(w.key, "", func(print uint64, body []byte) {
			all[print] = 0
			chain := chainOf(body)
			w.dumped[chain] = append(w.dumped[chain], rawRule{print, bytes.Clone(body)})
		})
		// Chains that compared as the same before may differ in this dump.
		if w.r.prints[w.key] = all; w.failed != nil || w.sameRules[""] {
			delete(w.r.prints, w.key)
		}
	}
	return w.dumped[name], w.failed
}

// chainOf returns the chain of a rule.
func chainOf(body []byte) (name string) {
	nfnl.Attributes(body, func(typ uint16, b []byte) {
		if typ == unix.NFTA_RULE_CHAIN {
			name = nfnl.Text(b)
		}
	})
	return name
}

// set describes a set once, without its elements. With fresh it does not reuse the last
// reading: a new rule may look up another set of the same name.
func (w *reading) set(name string, fresh bool) *set {
	if s := w.sets[name]; s != nil && (w.fresh[name] || !fresh) {
		return s
	}
	if !fresh && w.old != nil && w.old.sets[name] != nil && w.old.sets[name].failed == nil {
		w.sets[name] = w.old.sets[name]
		return w.sets[name]
	}
	wanted := w.loaded[name] // by a chain that was followed earlier
	w.same = false
	w.sets[name], w.fresh[name], w.loaded[name] = w.r.set(w.key, name), true, false
	if wanted {
		return w.load(name)
	}
	return w.sets[name]
}

// load reads the elements of a set that set described, once.
func (w *reading) load(name string) *set {
	s := w.sets[name]
	if w.loaded[name] || s.failed != nil {
		return s
	}
	w.loaded[name] = true
	if s.loaded && w.sameSets[name] {
		return s
	}
	w.same = false
	with := *s
	with.elements, with.loaded = nil, false
	var es []rawElement
	print, err := w.r.elements(w.key, name, func(b []byte) { es = append(es, elementOf(bytes.Clone(b))) })
	if err != nil {
		with.failed = fmt.Errorf("elements of set %s: %w", name, err)
	} else {
		with.fill(es)
		with.print = print
	}
	w.sets[name] = &with
	return &with
}

// mostSources limits the elements of a set that is read only for sources. They are dumped at each
// change of the rules, to find out whether they changed. 20,000 elements take the kernel about
// 0.02 s, and ten times as many a hundred times that: for each part of a dump, it goes through the
// set from its beginning.
const mostSources = 1 << 15

// loadFew is load, but leaves a set with many elements unread. The set counts as long until
// a rule that looks it up changes.
func (w *reading) loadFew(name string) {
	if w.sets[name].long || w.loaded[name] {
		return
	}
	if s := w.load(name); len(s.elements) > mostSources {
		long := *s
		long.elements, long.loaded, long.long = nil, false, true
		w.sets[name], w.loaded[name] = &long, false
	}
}

// A lookup is a lookup in a set or map.
type lookup struct {
	set      string
	verdicts bool
	asks     purposes // the purposes for which the elements matter
	sources  bool     // the elements say whom a forward is for, if they are few
	spares   bool     // the elements, if they are few, keep hosts from a rule that takes packets
	values   bool     // the elements, if they are few, say to what a rule translates sources
}

// references returns the lookups of rules, and the chains that they jump to.
func (w *reading) references(rules []rule) (lookups []lookup, jumps []string) {
	for i := range rules {
		for _, l := range asked(&rules[i], w.key.family, func(name string) *set { return w.set(name, true) }) {
			if !slices.Contains(lookups, l) {
				lookups = append(lookups, l)
			}
		}
		for _, s := range rules[i].statements {
			if v, ok := s.expr.(*expr.Verdict); ok && v.Chain != "" && !slices.Contains(jumps, v.Chain) {
				jumps = append(jumps, v.Chain)
			}
		}
	}
	return lookups, jumps
}
