package rules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// A state is what the kernel holds of one of our tables.
type state struct {
	table    *nftables.Table // nil if there is none
	chains   []*nftables.Chain
	sets     []*nftables.Set
	rules    map[string][]byte   // by chain, the user data of its rules
	elements map[string][]setKey // by set, sorted; only of sets that were read
	known    map[string]bool     // sets that certainly have the wanted elements
	counters map[string]uint64
}

// read reads one of our tables, with the elements of those sets of want that are not free.
// The error wraps ErrForeignTable or ErrOwned if the table is not ours.
func (t *Tables) read(table *nftables.Table, want *layout) (*state, error) {
	s := &state{counters: map[string]uint64{}, elements: map[string][]setKey{}, known: map[string]bool{}}
	err := s.read(t, table, want)
	switch {
	case errors.Is(err, unix.ENOENT):
		return &state{}, nil
	case err != nil:
		err = nfnl.Permitted(err)
	case !slices.ContainsFunc(s.chains, func(c *nftables.Chain) bool { return c.Name == MarkerChain }):
		err = ErrForeignTable
	case s.table.Flags&nftables.TableFlagOwner != 0 && s.table.Owner != t.port:
		err = ErrOwned
	default:
		return s, nil
	}
	return nil, fmt.Errorf("table %s: %w", title(table), err)
}

func (s *state) read(ours *Tables, t *nftables.Table, want *layout) (err error) {
	c := ours.c
	if s.table, err = c.ListTableOfFamily(t.Name, t.Family); err != nil {
		return err
	}
	all, err := c.ListChainsOfTableFamily(t.Family)
	if err != nil {
		return err
	}
	for _, chain := range all {
		if chain.Table.Name != t.Name {
			continue
		}
		s.chains = append(s.chains, chain)
	}
	if s.rules, err = readRules(ours.netns, t); err != nil {
		return err
	}
	if s.sets, err = c.GetSets(t); err != nil {
		return err
	}
	for _, set := range s.sets {
		if want.writes(set.Name) {
			if s.table.Owner == ours.port && ours.wrote(want, set.Name) {
				s.known[set.Name] = true
				continue
			}
			keys := []setKey{}
			err := elements.List(ours.netns, byte(t.Family), t.Name, set.Name, func(b []byte) { keys = append(keys, setKeyOf(b)) })
			if err != nil {
				return err
			}
			s.elements[set.Name] = slices.Compact(sortKeys(keys))
		}
	}
	return s.readCounters(c, t)
}

// readRules reads the user data of the rules of each chain, in their order, over its own
// connection, which tells rules apart (layout.sign). What they do is not decoded: the library
// refuses the attributes by which machines that cannot read a u64 anywhere in memory, such
// as MIPS and RISC-V, align that of a limit.
func readRules(netns int, t *nftables.Table) (rules map[string][]byte, err error) {
	c, err := nfnl.Dial(netns)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	err = nfnl.Uninterrupted(func() error {
		rules = map[string][]byte{}
		var e nfnl.Encoder
		e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETRULE, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, c.NextSeq(1), byte(t.Family))
		e.Str(unix.NFTA_RULE_TABLE, t.Name)
		e.End()
		return c.Ask(&e, func(_ uint16, body []byte) {
			if len(body) < nfnl.FamilyHeaderLen {
				return
			}
			var chain string
			var data []byte
			nfnl.Attributes(body[nfnl.FamilyHeaderLen:], func(typ uint16, b []byte) {
				switch typ {
				case unix.NFTA_RULE_CHAIN:
					chain = nfnl.Text(b)
				case unix.NFTA_RULE_USERDATA:
					data = b
				}
			})
			rules[chain] = addRule(rules[chain], data)
		})
	})
	return rules, err
}

// addRule adds the user data of one more rule to that of a chain.
func addRule(chain, data []byte) []byte { return append(append(chain, data...), '\n') }

func (s *state) readCounters(c *conn, t *nftables.Table) error {
	objs, err := c.GetNamedObjects(t)
	for _, o := range objs {
		if o, ok := o.(*nftables.NamedObj); ok {
			if n, ok := o.Obj.(*expr.Counter); ok {
				s.counters[o.Name] = n.Packets
			}
		}
	}
	return err
}

// A writtenSet names a set of ours whose elements we know.
type writtenSet struct {
	family nftables.TableFamily
	name   string
}

var elementSeed = maphash.MakeSeed()

// print returns a hash of the elements that does not depend on their order.
func (s *set) print() (sum uint64) {
	for _, e := range s.elements {
		n := maphash.Bytes(elementSeed, e.Key)
		if e.IntervalEnd {
			n = ^n
		}
		sum += n
	}
	return sum
}

// note records that the kernel now holds what want says. Nobody else can change the
// elements of a table that we own, so they need not be read again.
func (t *Tables) note(want []*layout) {
	t.written = map[writtenSet]uint64{}
	for _, l := range want {
		for _, s := range l.sets {
			if !s.free {
				t.written[writtenSet{l.table.Family, s.Name}] = s.print()
			}
		}
	}
}

// wrote reports whether we own the set and last wrote the elements that want says.
func (t *Tables) wrote(want *layout, name string) bool {
	print, ok := t.written[writtenSet{want.table.Family, name}]
	i := slices.IndexFunc(want.sets, func(s *set) bool { return s.Name == name })
	return ok && t.Owned() && i >= 0 && want.sets[i].print() == print
}

// writes reports whether this package writes the elements of the set.
func (l *layout) writes(name string) bool {
	return l != nil && slices.ContainsFunc(l.sets, func(s *set) bool { return s.Name == name && !s.free })
}

// holds reports whether the table exists with the contents l.
func (s *state) holds(l *layout) bool {
	if s.table == nil || len(s.counters) != len(l.counters) {
		return false
	}
	for _, set := range l.sets {
		if !set.free && !s.hasElements(set) {
			return false
		}
	}
	return sameAll(s.chains, l.chains, sameChain) && sameAll(s.sets, l.kernelSets(), sameSet) && sameRules(s.rules, l.rules)
}

// hasElements reports whether the kernel's set of this name has exactly the wanted elements.
func (s *state) hasElements(want *set) bool {
	return s.known[want.Name] || sameElements(s.elements[want.Name], want.elements)
}

func (l *layout) kernelSets() (sets []*nftables.Set) {
	for _, s := range l.sets {
		sets = append(sets, s.Set)
	}
	return sets
}

// sameAll compares two lists without duplicates, in any order.
func sameAll[T any](a, b []T, same func(T) func(T) bool) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(x T) bool { return !slices.ContainsFunc(b, same(x)) })
}

// A setKey identifies an element of one of our sets.
type setKey struct {
	key string
	end bool // the element ends an interval, which lies before it
}

// setKeyOf reads an element's attributes.
func setKeyOf(b []byte) (k setKey) {
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			k.key = string(nfnl.Data(b))
		case unix.NFTA_SET_ELEM_FLAGS:
			k.end = len(b) == 4 && binary.BigEndian.Uint32(b)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		}
	})
	return k
}

func sortKeys(keys []setKey) []setKey {
	slices.SortFunc(keys, func(a, b setKey) int {
		if c := strings.Compare(a.key, b.key); c != 0 || a.end == b.end {
			return c
		}
		if a.end {
			return -1
		}
		return 1
	})
	return keys
}

// sameElements reports whether keys, which must be sorted, are those of es.
func sameElements(keys []setKey, es []nftables.SetElement) bool {
	if len(keys) != len(es) {
		return false
	}
	want := make([]setKey, len(es))
	for i, e := range es {
		want[i] = setKey{string(e.Key), e.IntervalEnd}
	}
	return slices.Equal(keys, sortKeys(want))
}

func sameChain(a *nftables.Chain) func(*nftables.Chain) bool {
	return func(b *nftables.Chain) bool {
		return a.Name == b.Name && a.Type == b.Type &&
			equal(a.Hooknum, b.Hooknum) && equal(a.Priority, b.Priority) && equal(a.Policy, b.Policy)
	}
}

func equal[T comparable](a, b *T) bool {
	return a == b || a != nil && b != nil && *a == *b
}

func sameSet(a *nftables.Set) func(*nftables.Set) bool {
	return func(b *nftables.Set) bool {
		return a.Name == b.Name && a.Dynamic == b.Dynamic && a.KeyType.Name == b.KeyType.Name &&
			a.IsMap == b.IsMap && a.Interval == b.Interval && (!a.IsMap || a.DataType.Name == b.DataType.Name) &&
			a.HasTimeout == b.HasTimeout && a.Timeout == b.Timeout && sizeOf(a) == sizeOf(b)
	}
}

// sizeOf is the size that the kernel gives a set.
func sizeOf(s *nftables.Set) uint32 {
	if s.Size == 0 && s.Dynamic {
		return math.MaxUint16
	}
	return s.Size
}

// changes returns which elements a set with these keys lacks, and which it must lose. The set has no
// intervals.
func (s *set) changes(keys []setKey) (add, gone []nftables.SetElement) {
	surplus := map[string]bool{}
	for _, k := range keys {
		surplus[k.key] = true
	}
	for _, e := range s.elements {
		if !surplus[string(e.Key)] {
			add = append(add, e)
		}
		delete(surplus, string(e.Key))
	}
	for key := range surplus {
		gone = append(gone, nftables.SetElement{Key: []byte(key)})
	}
	return add, gone
}

// sameRules reports whether there are the rules of each chain, in order, and no others.
func sameRules(have map[string][]byte, want []*nftables.Rule) bool {
	wanted := map[string][]byte{}
	for _, r := range want {
		wanted[r.Chain.Name] = addRule(wanted[r.Chain.Name], r.UserData)
	}
	return maps.EqualFunc(have, wanted, bytes.Equal)
}
