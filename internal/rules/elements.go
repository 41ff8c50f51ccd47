//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"bytes"
	"encoding/binary"
	"math/big"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// An elementSet is a set or map of the user's.
type elementSet struct {
	size     int // of a key
	set      *nftables.Set
	elements []element
	unknown  bool   // it could not be read
	loaded   bool   // the elements were asked for
	print    uint64 // of the elements, from before
}

// An element has the keys in its span, and, in a map of verdicts, the chain
// that they go to, if any.
type element struct {
	span
	chain string
}

func (s *elementSet) test(not bool) test {
	t := test{not: not, unknown: s.unknown}
	for _, e := range s.elements {
		t.any = append(t.any, e.span)
	}
	return t
}

// set reads a set once, without its elements.
func (w *walker) set(name string) *elementSet {
	if s := w.sets[name]; s != nil {
		return s
	}
	s := &elementSet{size: 64, unknown: true} // all registers
	w.sets[name] = s
	set, err := w.c.GetSetByName(w.table, name)
	if err == nil {
		*s = elementSet{size: int(set.KeyType.Bytes), set: set}
	}
	return s
}

// load reads the elements of a set once: what has many is better not asked.
func (w *walker) load(s *elementSet) {
	if s.unknown || s.loaded {
		return
	}
	s.loaded = true
	s.print = w.print(s.set.Name)
	es, err := w.c.GetSetElements(s.set)
	if err != nil {
		s.unknown = true
		return
	}
	if s.set.Interval {
		es = joinIntervals(es, s.size)
	}
	for _, e := range es {
		el := element{span: span{e.Key, e.Key}, chain: verdictChain(s.set, e)}
		switch {
		case e.Key == nil: // the element that takes what no other does
			el.span = span{make([]byte, s.size), slices.Repeat([]byte{0xff}, s.size)}
		case e.KeyEnd != nil:
			el.high = e.KeyEnd
		}
		s.elements = append(s.elements, el)
	}
}

// joinIntervals puts the two elements that an interval has into one. The second
// holds the first key that is not in it, and is missing at the end.
func joinIntervals(es []nftables.SetElement, size int) []nftables.SetElement {
	slices.SortStableFunc(es, func(a, b nftables.SetElement) int { return bytes.Compare(a.Key, b.Key) })
	var out []nftables.SetElement
	for i, e := range es {
		if e.IntervalEnd {
			continue
		}
		if e.Key != nil && e.KeyEnd == nil {
			e.KeyEnd = slices.Repeat([]byte{0xff}, size)
			next := slices.IndexFunc(es[i+1:], func(n nftables.SetElement) bool { return !bytes.Equal(n.Key, e.Key) })
			if next >= 0 {
				e.KeyEnd = before(es[i+1+next].Key)
			}
		}
		out = append(out, e)
	}
	return out
}

// before returns the key before b, which is not 0.
func before(b []byte) []byte {
	n := new(big.Int).SetBytes(b)
	return n.Sub(n, big.NewInt(1)).FillBytes(make([]byte, len(b)))
}

// verdictChain returns the chain that an element of a verdict map jumps to.
func verdictChain(set *nftables.Set, e nftables.SetElement) (chain string) {
	if set.DataType.Name != nftables.TypeVerdict.Name {
		return ""
	}
	attrs, err := netlink.UnmarshalAttributes(e.Val)
	if err != nil {
		return ""
	}
	for _, a := range attrs {
		if a.Type == unix.NFTA_VERDICT_CHAIN {
			chain = string(bytes.TrimRight(a.Data, "\x00"))
		}
	}
	return chain
}

// portSpan is a span of ports.
func portSpan(first, last uint16) span {
	return span{binary.BigEndian.AppendUint16(nil, first), binary.BigEndian.AppendUint16(nil, last)}
}
