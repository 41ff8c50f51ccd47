//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A state is what stands in the kernel of one of our tables.
type state struct {
	table    *nftables.Table // nil where there is none
	chains   []*nftables.Chain
	sets     []*nftables.Set
	rules    []*nftables.Rule
	elements map[string][]nftables.SetElement // by set, of those asked for
	counters map[string]uint64
}

// read reads one of our tables, with the elements of the sets of want that are
// not free. The error wraps ErrForeignTable or ErrOwned when it is not ours.
func (t *Tables) read(table *nftables.Table, want *layout) (*state, error) {
	if err := t.c.begin(); err != nil {
		return nil, err
	}
	s := &state{counters: map[string]uint64{}, elements: map[string][]nftables.SetElement{}}
	err := s.read(t.c, table, want)
	switch {
	case errors.Is(err, unix.ENOENT):
		return &state{}, nil
	case err != nil:
		err = nfnl.Permitted(err)
	case !slices.ContainsFunc(s.chains, func(c *nftables.Chain) bool { return c.Name == markerChain }):
		err = ErrForeignTable
	case s.table.Flags&nftables.TableFlagOwner != 0 && s.table.Owner != t.port:
		err = ErrOwned
	default:
		return s, nil
	}
	return nil, fmt.Errorf("table %s: %w", title(table), err)
}

func (s *state) read(c *conn, t *nftables.Table, want *layout) (err error) {
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
		rules, err := c.GetRules(t, chain)
		if err != nil {
			return err
		}
		s.rules = append(s.rules, rules...)
	}
	if s.sets, err = c.GetSets(t); err != nil {
		return err
	}
	for _, set := range s.sets {
		if want.writes(set.Name) {
			if s.elements[set.Name], err = c.GetSetElements(set); err != nil {
				return err
			}
		}
	}
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

// writes reports whether the elements of a set are ours to write.
func (l *layout) writes(name string) bool {
	return l != nil && slices.ContainsFunc(l.sets, func(s *set) bool { return s.Name == name && !s.free })
}

// holds reports whether the table is there with the contents l.
func (s *state) holds(l *layout) bool {
	if s.table == nil || len(s.counters) != len(l.counters) {
		return false
	}
	for _, set := range l.sets {
		if !set.free && !sameElements(s.elements[set.Name], set.elements) {
			return false
		}
	}
	return sameAll(s.chains, l.chains, sameChain) && sameAll(s.sets, l.kernelSets(), sameSet) && sameRules(s.rules, l.rules)
}

func (l *layout) kernelSets() (sets []*nftables.Set) {
	for _, s := range l.sets {
		sets = append(sets, s.Set)
	}
	return sets
}

// sameAll compares two lists without doublets, in any order.
func sameAll[T any](a, b []T, same func(T) func(T) bool) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(x T) bool { return !slices.ContainsFunc(b, same(x)) })
}

// sameElements is sameAll for elements, which may be many.
func sameElements(a, b []nftables.SetElement) bool {
	sorted := func(es []nftables.SetElement) []nftables.SetElement {
		return slices.SortedFunc(slices.Values(es), func(a, b nftables.SetElement) int {
			c := bytes.Compare(a.Key, b.Key)
			if c == 0 && a.IntervalEnd != b.IntervalEnd {
				c = 1
				if b.IntervalEnd {
					c = -1
				}
			}
			return c
		})
	}
	return len(a) == len(b) && slices.EqualFunc(sorted(a), sorted(b), func(a, b nftables.SetElement) bool { return sameElement(a)(b) })
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

// sameRules compares the rules of each chain, in order.
func sameRules(a, b []*nftables.Rule) bool {
	byChain := func(rules []*nftables.Rule) map[string][]byte {
		m := map[string][]byte{}
		for _, r := range rules {
			m[r.Chain.Name] = append(append(m[r.Chain.Name], r.UserData...), '\n')
		}
		return m
	}
	x, y := byChain(a), byChain(b)
	for name := range x {
		if !bytes.Equal(x[name], y[name]) {
			return false
		}
	}
	return len(x) == len(y)
}
