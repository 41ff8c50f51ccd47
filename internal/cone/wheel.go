package cone

import "time"

// A wheel orders claims by the time of their next work. It may return a claim early, but
// never late by more than its grain; the caller schedules an early one again. Lists run
// through the claims themselves, so that scheduling costs no memory.
type wheel struct {
	grain  time.Duration
	done   int64 // last tick that was worked through
	count  int
	claims *[]claim
	slots  [wheelSlots]int32 // first claim of each slot, -1 for none
}

// wheelSlots must be more than twice wheelPerLifetime: nothing is scheduled further ahead
// than a lifetime, and a claim clamped to the horizon is just returned and scheduled once
// more.
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

// schedule puts claim i into the slot for time t, and removes it from any other.
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

// pop removes a claim whose slot is due at now and returns it, or none.
func (w *wheel) pop(now time.Duration) int32 {
	due := int64(now / w.grain)
	if w.count == 0 {
		w.done = max(w.done, due)
		return none
	}
	// After a long pause one turn visits every slot.
	w.done = max(w.done, due-wheelSlots)
	for ; w.done < due; w.done++ {
		if i := w.slots[(w.done+1)%wheelSlots]; i != none {
			w.remove(i)
			return i
		}
	}
	return none
}

// next returns when pop must be called next, and false if the wheel is empty.
func (w *wheel) next() (time.Duration, bool) {
	return time.Duration(w.done+1) * w.grain, w.count > 0
}
