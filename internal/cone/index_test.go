package cone

import (
	"math/rand/v2"
	"testing"
)

// An index finds what a map finds, whatever was set and removed before.
//
// Fails when remove leaves a gap, or when grow loses an element.
func TestIndexIsLikeAMap(t *testing.T) {
	const keys = 3000
	random := rand.New(rand.NewPCG(1, 2))
	elements := make([]int, 2*keys) // two elements have each key
	for i := range elements {
		elements[i] = i % keys
	}
	x, want := newIndex(func(i int32) int { return elements[i] }), map[int]int32{}
	for step := range 100_000 {
		k := random.IntN(keys)
		if random.IntN(5) < 3-step/50_000*2 { // more and more, then fewer
			i := int32(k + random.IntN(2)*keys)
			x.set(k, i)
			want[k] = i
		} else {
			x.remove(k)
			delete(want, k)
		}
		if x.len() != len(want) {
			t.Fatalf("step %d: %d elements, want %d", step, x.len(), len(want))
		}
		if step%1000 > 0 {
			continue
		}
		for k := range keys {
			i, ok := x.find(k)
			if w, known := want[k]; ok != known || ok && i != w {
				t.Fatalf("step %d: key %d: %d, %v; want %d, %v", step, k, i, ok, w, known)
			}
		}
	}
}

// len returns the number of elements in the index.
func (x *index[K]) len() (n int) {
	for i := range x.parts {
		n += x.parts[i].n
	}
	return n
}
