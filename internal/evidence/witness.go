package evidence

import (
	"cmp"
	"time"
)

const (
	// enoughChildren is how many children it takes to show that a firewall drops them, since
	// events of a few may be lost.
	enoughChildren = 3
	// manyChildren is the count above which all counts are halved, so that older children
	// weigh less.
	manyChildren = 64
	// Memory is how long evidence holds after the last child: the firewall may have
	// changed unnoticed.
	Memory = time.Hour
)

// A Witness counts the children that one carrier admitted lately, and how many of them
// the user's firewall let pass: those that conntrack confirmed.
type Witness struct {
	counting         bool
	admitted, passed uint64 // as read last
	before           uint64 // passed, as it was before admitted was read
	lately, through  uint64
	pending          uint64        // admitted after the last dump of flows, so events may be missing
	seen             time.Duration // when the last child came
	lost             bool          // after a dump of flows, no child had passed
	anyPassed        bool          // since Restart
	accepted         bool          // the rules that are read accept all children
}

// Read takes in the totals. The daemon hears of a child after the kernel has counted it, so what
// begins to count begins with those that had passed before admitted was read: a child that is not
// among admitted must not be missing later among those that passed.
func (w *Witness) Read(now time.Duration, admitted, before, passed uint64) {
	if w.counting {
		if admitted > w.admitted {
			w.pending += admitted - w.admitted
			w.seen = now
		}
		// Of one child the two totals may be of different readings.
		w.through += passed - w.passed
		w.anyPassed = w.anyPassed || passed > w.passed
	}
	if !w.counting {
		passed = before
	}
	w.counting, w.admitted, w.before, w.passed = true, admitted, before, passed
	if w.lately > manyChildren {
		w.lately, w.through, w.pending = w.lately/2, w.through/2, w.pending/2
	}
	if now-w.seen >= Memory {
		w.lately, w.through, w.pending = 0, 0, 0
	}
}

// SawFlows tells the Witness that flows were dumped since the last reading. Events are late on a
// busy machine, and some are lost. The dump shows all the same which children passed until that
// reading: the others are lost.
func (w *Witness) SawFlows() { w.lately, w.pending = w.lately+w.pending, 0 }

// Pause ends counting. The next reading begins again at its values, so children whose events are
// missing are forgotten.
func (w *Witness) Pause() {
	w.lately = max(w.lately, min(w.through, w.lately+w.pending))
	w.counting, w.pending = false, 0
}

// Judge updates what Contradicts reports. dumped says whether flows were dumped since the last call.
func (w *Witness) Judge(dumped bool) {
	pass, known := w.Passes()
	all := known && !pass && !w.anyPassed
	w.lost = all && (w.lost || dumped)
}

// Contradicts reports whether all children are lost though the rules that are read accept
// them, for instance in a chain of another hook. If one child passed, the lost ones may be those
// of a peer that the user blocks.
func (w *Witness) Contradicts() bool { return w.lost }

// AcceptedNow takes in whether the rules that are read accept all children. Children that
// were lost before say nothing against them.
func (w *Witness) AcceptedNow(accepted bool) {
	if accepted && !w.accepted {
		w.Restart()
	}
	w.accepted = accepted
}

// Restart forgets earlier children.
func (w *Witness) Restart() {
	w.lately, w.through, w.pending, w.lost, w.anyPassed = 0, 0, 0, false, false
	w.passed = w.before
}

// Judged returns how many children Passes judges. Before the first dump, these are all that were
// admitted: that they passed is known at once.
func (w *Witness) Judged() uint64 { return cmp.Or(w.lately, w.pending) }

// Passes reports whether children pass, and whether there is enough evidence to know.
func (w *Witness) Passes() (pass, known bool) {
	switch {
	case w.Judged() > 0 && 2*w.through >= w.Judged():
		return true, true
	case w.lately >= enoughChildren && 4*w.through < w.lately:
		return false, true
	}
	return false, false
}

// Through returns how many of Judged passed.
func (w *Witness) Through() uint64 { return min(w.through, w.Judged()) }

// ForgetLoss forgets whether children were lost or passed, but not how many.
func (w *Witness) ForgetLoss() { w.lost, w.anyPassed = false, false }

// A Retry says when to gather evidence against rules again, because somebody changed them.
// Each time children may be lost, so the waits grow if the rules keep changing.
type Retry struct {
	Changed  bool // by somebody, since Due was true
	at, wait time.Duration
}

// Due reports whether to begin now.
func (r *Retry) Due(now time.Duration) bool {
	if !r.Changed || now-r.at < r.wait {
		return false
	}
	if now-r.at >= Memory {
		r.wait = 0
	}
	r.Changed, r.at, r.wait = false, now, min(max(2*r.wait, time.Minute), Memory)
	return true
}
