package daemon

import (
	"log/slog"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/handover"
)

// Shares of the kernel's tables, in percent. Each expectation has an anchor, which the
// kernel never drops early: if the table is full it drops other people's flows instead.
const (
	expectShare = 75 // of the expectation table may be ours
	anchorShare = 20 // of the conntrack table may be anchors

	// Anchors may fill the conntrack table up to fullForNew while new ones are made or
	// idle permissions keep theirs, and up to fullForLive in any case.
	fullForNew  = 80
	fullForLive = 90
)

// A space is the size of the kernel's tables, and how full conntrack is.
type space struct {
	expectations int // most that the kernel allows (nf_conntrack_expect_max)
	conntrack    ctwatch.Table
}

// share returns how many expectations may be ours if the conntrack table is otherwise empty,
// and why no more.
func (s space) share() (n int, lack cone.Reason) {
	n = s.expectations * expectShare / 100
	if anchors := s.conntrack.Max * anchorShare / 100; s.conntrack.Max > 0 && anchors < n {
		return anchors, cone.ReasonNoRoom
	}
	return n, cone.ReasonTableFull
}

// room returns the room for expectations if this many entries of conntrack are anchors.
func (s space) room(anchors int) cone.Room {
	n, lack := s.share()
	r := cone.Room{New: n, Live: n, Lack: lack}
	if s.conntrack.Max == 0 {
		return r
	}
	left := func(full int) int {
		return max(s.conntrack.Max*full/100-(s.conntrack.Entries-anchors), 0)
	}
	if left(fullForNew) < n {
		r.New, r.Lack = left(fullForNew), cone.ReasonNoRoom
	}
	r.Live = min(left(fullForLive), n)
	return r
}

// readSpace asks the kernel, and makes the expectation table larger if that is
// allowed; before is its size before that.
func (r *reconciler) readSpace() (s space, before int, err error) {
	if s.conntrack, err = r.reads.Table(); err != nil {
		return s, 0, err
	}
	before, s.expectations, err = r.conntrack.Raise(handover.ExpectMax)
	return s, before, err
}

// lookAtConntrack updates the room for expectations. It leaves the loop alone while
// the conntrack table is far from full.
func (r *reconciler) lookAtConntrack() (err error) {
	if r.backends.expect == nil {
		return nil
	}
	s := r.space
	if s.conntrack, err = r.reads.Table(); err != nil {
		return err
	}
	n, _ := s.share()
	if room := s.room(0); room.New == n && room == r.space.room(0) {
		return nil
	}
	r.space = s
	if !r.ask(func(l *loop) { l.setRoom(s) }) {
		return errEnded
	}
	return nil
}

// setRoom tells the model and the backend how much room there is.
func (l *loop) setRoom(s space) {
	e := l.backends.expect
	n, _ := s.share()
	e.SetMax(n)
	l.room, l.entries = s.room(e.Standing()), s.conntrack
	l.engine.Model.SetRoom(l.now(), l.room)
}

// repairTableSize makes the expectation table larger again if somebody made it smaller, or
// adapts the room to its size.
func (r *reconciler) repairTableSize() error {
	if r.backends.expect == nil {
		return nil
	}
	s, before, err := r.readSpace()
	if err != nil {
		return err
	}
	r.space = s
	ok := r.ask(func(l *loop) {
		if s.expectations != before {
			l.engine.Repaired[engine.PartTableSize]++
			r.noted.Note(slog.LevelWarn, "table size", "somebody made the expectation table smaller; it has its size again", 1, "sysctl", handover.ExpectMax, "was", before, "is", s.expectations)
		}
		l.setRoom(s)
	})
	if !ok {
		return errEnded
	}
	return nil
}

// warnRoom warns of a conntrack table that has no room for more expectations.
func (l *loop) warnRoom(out *warnings) {
	if l.backends.expect != nil && l.room.Lack == cone.ReasonNoRoom && l.engine.Model.Stats().Expected >= l.room.New {
		out.add(warnNoRoom, "", "conntrack has %d of %d entries, and no room for more than %d expectations, which take one each: "+
			"what the map cannot carry is refused; raise net.netfilter.nf_conntrack_max", l.entries.Entries, l.entries.Max, l.room.New)
	}
}
