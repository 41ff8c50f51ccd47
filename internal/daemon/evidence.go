package daemon

import "time"

const (
	// enoughChildren tell what a firewall does. Some of their events may be lost.
	enoughChildren = 3
	// manyChildren are so many that the older ones count half.
	manyChildren = 64
	// evidenceMemory is how long children tell of what a firewall does. It may have
	// changed, and nobody noticed.
	evidenceMemory = time.Hour
)

// A witness knows how many children one carrier admitted lately, and how many of them
// the user's firewall let pass: these conntrack has confirmed.
type witness struct {
	counting         bool
	admitted, passed uint64 // as read last
	lately, through  uint64
	seen             time.Duration // when there was a child
}

// read takes in the totals.
func (w *witness) read(now time.Duration, admitted, passed uint64) {
	if w.counting && admitted > w.admitted {
		w.lately += admitted - w.admitted
		w.through += passed - w.passed
		w.seen = now
	}
	w.counting, w.admitted, w.passed = true, admitted, passed
	if w.lately > manyChildren {
		w.lately, w.through = w.lately/2, w.through/2
	}
	if now-w.seen >= evidenceMemory {
		w.lately, w.through = 0, 0
	}
}

// passes reports whether children pass, if that can be told.
func (w *witness) passes() (pass, known bool) {
	switch {
	case w.lately > 0 && 2*w.through >= w.lately:
		return true, true
	case w.lately >= enoughChildren && 4*w.through < w.lately:
		return false, true
	}
	return false, false
}
