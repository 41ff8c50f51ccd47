package cone

import "time"

// A wheel keeps claims by the time at which they want attention. It may call
// early, never late by more than its grain; who is called early schedules
// itself again. Lists run through the claims themselves, so that scheduling
// costs no memory.
type wheel struct {
	grain  time.Duration
	done   int64 // last tick that was worked off
	count  int
	claims *[]claim
	slots  [wheelSlots]int32 // first claim of each slot, -1 for none
}

// wheelSlots must be more than twice wheelPerLifetime: nothing is scheduled
// further ahead than a lifetime, and one clamped to the horizon just comes
// back once more.
const (
	wheelSlots       = 256
	wheelPerLifetime = 64
)

func newWheel(claims *[]claim, lifetime time.Duration) wheel {
	w := wheel{grain: max(lifetime/wheelPerLifetime, time.Millisecond), claims: claims}
	for i := range w.slots {
		w.slots[i] = none
	}
	return w
}

// schedule puts claim i in the slot for time t, from wherever it was.
func (w *wheel) schedule(i int32, t time.Duration) {
	w.remove(i)
	tick := int64((t + w.grain - 1) / w.grain)
	tick = min(max(tick, w.done+1), w.done+wheelSlots-1)
	s := int32(tick % wheelSlots)
	c := &(*w.claims)[i]
	c.slot, c.wheelPrev, c.wheelNext = s, none, w.slots[s]
	if c.wheelNext != none {
		(*w.claims)[c.wheelNext].wheelPrev = i
	}
	w.slots[s] = i
	w.count++
}

// remove takes claim i out of the wheel, if it is in it.
func (w *wheel) remove(i int32) {
	c := &(*w.claims)[i]
	if c.slot == none {
		return
	}
	if c.wheelPrev != none {
		(*w.claims)[c.wheelPrev].wheelNext = c.wheelNext
	} else {
		w.slots[c.slot] = c.wheelNext
	}
	if c.wheelNext != none {
		(*w.claims)[c.wheelNext].wheelPrev = c.wheelPrev
	}
	c.slot = none
	w.count--
}

// pop returns a claim whose slot is due at now, out of the wheel, or none.
func (w *wheel) pop(now time.Duration) int32 {
	due := int64(now / w.grain)
	if w.count == 0 {
		w.done = max(w.done, due)
		return none
	}
	// After a long pause one turn meets every slot.
	w.done = max(w.done, due-wheelSlots)
	for ; w.done < due; w.done++ {
		if i := w.slots[(w.done+1)%wheelSlots]; i != none {
			w.remove(i)
			return i
		}
	}
	return none
}

// next returns when pop wants to be called again, and whether it does at all.
func (w *wheel) next() (time.Duration, bool) {
	return time.Duration(w.done+1) * w.grain, w.count > 0
}
