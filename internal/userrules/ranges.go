package userrules

import (
	"net/netip"
	"sort"

	"github.com/conenatd/conenatd/internal/cone"
)

// hasAddr is ranges.Has for ranges that are sorted and disjoint.
func hasAddr(ranges cone.AddrRanges, a netip.Addr) bool {
	i := sort.Search(len(ranges), func(i int) bool { return !ranges[i].Last.Less(a) })
	return i < len(ranges) && !a.Less(ranges[i].First)
}

// commonAddrs returns the addresses of both, which are sorted and disjoint. The result is, too,
// and it is never nil.
func commonAddrs(a, b cone.AddrRanges) cone.AddrRanges {
	out := cone.AddrRanges{}
	for len(a) > 0 && len(b) > 0 {
		r := cone.AddrRange{First: a[0].First, Last: a[0].Last}
		if r.First.Less(b[0].First) {
			r.First = b[0].First
		}
		if b[0].Last.Less(r.Last) {
			r.Last = b[0].Last
		}
		if !r.Last.Less(r.First) {
			out = append(out, r)
		}
		if r.Last == a[0].Last {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return out
}

// exceptAddrs returns the addresses of a that are not in b, and whether a has others. Both are
// sorted and disjoint. The result is, too, and it is never nil.
func exceptAddrs(a, b cone.AddrRanges) (left cone.AddrRanges, some bool) {
	left = cone.AddrRanges{}
	for _, r := range a {
		for len(b) > 0 && b[0].Last.Less(r.First) {
			b = b[1:]
		}
		rest := true
		for _, not := range b {
			if r.Last.Less(not.First) {
				break
			}
			some = true
			if r.First.Less(not.First) {
				left = append(left, cone.AddrRange{First: r.First, Last: not.First.Prev()})
			}
			if rest = not.Last.Less(r.Last); !rest {
				break
			}
			r.First = not.Last.Next()
		}
		if rest {
			left = append(left, r)
		}
	}
	return left, some
}

// A subtraction remembers differences of lists of addresses: many rules behind one that returns
// the packets to thousands of prefixes share one list. The lists are not changed once made. The
// zero value is ready for use.
type subtraction struct {
	known map[[2]listAt[cone.AddrRange]]difference
	steps int
}

// A listAt identifies a list by where it lies.
type listAt[E any] struct {
	first *E
	n     int
}

func placeOf[E any](list []E) (at listAt[E]) {
	if len(list) > 0 {
		at = listAt[E]{&list[0], len(list)}
	}
	return at
}

type difference struct {
	left cone.AddrRanges
	some bool
}

// mostSteps limits what the subtractions of one table cost, and so the ranges that they make.
const mostSteps = 1 << 18

// except is exceptAddrs. If that would cost too much, ok is false.
func (s *subtraction) except(a, b cone.AddrRanges) (left cone.AddrRanges, some, ok bool) {
	if len(a) > 0 { // what a cannot have costs nothing
		b = b[sort.Search(len(b), func(i int) bool { return !b[i].Last.Less(a[0].First) }):]
		b = b[:sort.Search(len(b), func(i int) bool { return a[len(a)-1].Last.Less(b[i].First) })]
	}
	if len(a) == 0 || len(b) == 0 {
		return a, false, true
	}
	key := [2]listAt[cone.AddrRange]{placeOf(a), placeOf(b)}
	d, known := s.known[key]
	if !known {
		if s.steps += len(a) + len(b); s.steps > mostSteps {
			return nil, true, false
		}
		d.left, d.some = exceptAddrs(a, b)
		if s.known == nil {
			s.known = make(map[[2]listAt[cone.AddrRange]]difference)
		}
		s.known[key] = d
	}
	return d.left, d.some, true
}
