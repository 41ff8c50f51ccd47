package cone

import "hash/maphash"

// An index finds elements of a slice by their keys. Unlike a map it keeps no keys, but asks for
// that of an element: with a million of them that is most of the memory. It grows in parts, so
// that no call takes long.
type index[K comparable] struct {
	key   func(i int32) K // of an element that is in the index
	seed  maphash.Seed
	parts [indexParts]indexPart
}

const indexParts = 256

// An indexPart is a hash table with linear probing, at most three quarters full.
type indexPart struct {
	slots []indexSlot // a power of two of them, or none
	n     int
}

type indexSlot struct {
	at   int32 // index of the element plus 1; 0 if the slot is empty
	hash uint32
}

func newIndex[K comparable](key func(i int32) K) index[K] {
	return index[K]{key: key, seed: maphash.MakeSeed()}
}

// hash returns which part k is in, and its hash there.
func (x *index[K]) hash(k K) (p *indexPart, hash uint32) {
	h := maphash.Comparable(x.seed, k)
	return &x.parts[h>>56], uint32(h)
}

// slot returns the place of k in p, or of the empty slot where it would be.
func (x *index[K]) slot(p *indexPart, k K, hash uint32) int {
	for at := int(hash) & (len(p.slots) - 1); ; at = (at + 1) & (len(p.slots) - 1) {
		if s := &p.slots[at]; s.at == 0 || s.hash == hash && x.key(s.at-1) == k {
			return at
		}
	}
}

// find returns the element with key k.
func (x *index[K]) find(k K) (i int32, ok bool) {
	p, hash := x.hash(k)
	if p.n == 0 {
		return 0, false
	}
	s := &p.slots[x.slot(p, k, hash)]
	return s.at - 1, s.at != 0
}

// set makes i the element with key k, in place of any other. Both must have that key now.
func (x *index[K]) set(k K, i int32) {
	p, hash := x.hash(k)
	if 4*(p.n+1) > 3*len(p.slots) {
		p.grow()
	}
	s := &p.slots[x.slot(p, k, hash)]
	if s.at == 0 {
		p.n++
	}
	*s = indexSlot{i + 1, hash}
}

// remove takes the element with key k, which it must still have, out of the index.
func (x *index[K]) remove(k K) {
	p, hash := x.hash(k)
	if p.n == 0 {
		return
	}
	at := x.slot(p, k, hash)
	if p.slots[at].at == 0 {
		return
	}
	p.n--
	// Move up what would not be found behind an empty slot.
	mask := len(p.slots) - 1
	for next := (at + 1) & mask; p.slots[next].at != 0; next = (next + 1) & mask {
		if home := int(p.slots[next].hash) & mask; (next-home)&mask >= (next-at)&mask {
			p.slots[at] = p.slots[next]
			at = next
		}
	}
	p.slots[at] = indexSlot{}
}

func (p *indexPart) grow() {
	old := p.slots
	p.slots = make([]indexSlot, max(8, 2*len(old)))
	mask := len(p.slots) - 1
	for _, s := range old {
		if s.at == 0 {
			continue
		}
		at := int(s.hash) & mask
		for p.slots[at].at != 0 {
			at = (at + 1) & mask
		}
		p.slots[at] = s
	}
}
