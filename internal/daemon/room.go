package daemon

import (
	"log/slog"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/engine"
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
func (d *Daemon) readSpace() (s space, before int, err error) {
	if s.conntrack, err = d.reads.Table(); err != nil {
		return s, 0, err
	}
	before, s.expectations, err = d.conntrack.raise(expectMax)
	return s, before, err
}

// lookAtConntrack updates the room for expectations. It leaves the loop alone while
// the conntrack table is far from full.
func (d *Daemon) lookAtConntrack() (err error) {
	if d.backends.expect == nil { // written by the reconcile alone
		return nil
	}
	s := d.space
	if s.conntrack, err = d.reads.Table(); err != nil {
		return err
	}
	n, _ := s.share()
	if r := s.room(0); r.New == n && r == d.space.room(0) {
		return nil
	}
	d.space = s
	if !d.ask(func() { d.setRoom(s) }) {
		return errEnded
	}
	return nil
}

// setRoom tells the model and the backend how much room there is. The loop calls it.
func (d *Daemon) setRoom(s space) {
	e := d.backends.expect
	n, _ := s.share()
	e.SetMax(n)
	d.room, d.entries = s.room(e.Standing()), s.conntrack
	d.engine.Model.SetRoom(d.now(), d.room)
}

// mendTableSize makes the expectation table larger again if somebody made it smaller, or
// adapts the room to its size.
func (d *Daemon) mendTableSize() error {
	if d.backends.expect == nil { // written by the reconcile alone
		return nil
	}
	s, before, err := d.readSpace()
	if err != nil {
		return err
	}
	d.space = s
	ok := d.ask(func() {
		if s.expectations != before {
			d.engine.Repaired[engine.PartTableSize]++
			d.noted.note(slog.LevelWarn, "table size", "somebody made the expectation table smaller; it has its size again", 1, "sysctl", expectMax, "was", before, "is", s.expectations)
		}
		d.setRoom(s)
	})
	if !ok {
		return errEnded
	}
	return nil
}

// warnRoom warns of a conntrack table that has no room for more expectations.
func (d *Daemon) warnRoom(out *warnings) {
	if d.backends.expect != nil && d.room.Lack == cone.ReasonNoRoom && d.engine.Model.Stats().Expected >= d.room.New {
		out.add(warnNoRoom, "", "conntrack has %d of %d entries, and no room for more than %d expectations, which take one each: "+
			"what the map cannot carry is refused; raise net.netfilter.nf_conntrack_max", d.entries.Entries, d.entries.Max, d.room.New)
	}
}
