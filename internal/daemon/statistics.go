package daemon

import (
	"log/slog"
	"time"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/episodes"
)

// statisticsTime is how long the reconcile, and with it a status, waits for conntrack's statistics.
// The kernel gives them to one program at a time, in all network namespaces, and to none while
// somebody deletes flows.
const statisticsTime = 50 * time.Millisecond

// kernelStatistics is a *ctwatch.Statistics.
type kernelStatistics interface {
	Table() (ctwatch.Table, error)
	Counts() (ctwatch.Counts, error)
	Close() error
}

// A statistician reads conntrack's statistics in a goroutine of its own, one reading at a time. Only
// the reconcile may use it.
type statistician struct {
	kernel  kernelStatistics
	pending chan reading // of the goroutine that reads; nil if there is none
	last    reading
}

type reading struct {
	table     ctwatch.Table
	counts    ctwatch.Counts
	err       error // of table
	countsErr error // counts are the last ones then
}

// read returns what the kernel says now, or if that takes longer than wait what it said last. It
// reports whether this is new.
func (s *statistician) read(wait <-chan time.Time) (_ reading, isNew bool) {
	select {
	case r := <-s.pending: // it answers an earlier call: keep it, and ask again
		isNew = s.take(r)
	default:
	}
	if s.pending == nil {
		answer := make(chan reading, 1)
		s.pending = answer
		go func() {
			var r reading
			if r.table, r.err = s.kernel.Table(); r.err == nil {
				r.counts, r.countsErr = s.kernel.Counts()
			}
			answer <- r
		}()
	}
	select {
	case r := <-s.pending:
		s.take(r)
		return r, true
	case <-wait:
		return s.last, isNew
	}
}

// take ends the reading under way. It reports whether r is one to remember.
func (s *statistician) take(r reading) bool {
	s.pending = nil
	if r.err == nil {
		s.last = r
	}
	return r.err == nil
}

// close waits for the reading under way, which has a deadline.
func (s *statistician) close() error {
	if s.pending != nil {
		<-s.pending
	}
	return s.kernel.Close()
}

// readConntrack returns what status shows of the kernel's connection tracking, or what it last
// showed if that takes too long. The reconcile calls it, even in the middle of its work: so it has
// connections of its own.
func (r *reconciler) readConntrack() (control.Conntrack, error) {
	wait := time.NewTimer(statisticsTime)
	defer wait.Stop()
	return r.conntrackWithin(wait.C)
}

func (r *reconciler) conntrackWithin(wait <-chan time.Time) (k control.Conntrack, err error) {
	got, isNew := r.statistics.read(wait)
	if got.err != nil {
		return k, got.err
	}
	if isNew {
		r.failures.Note(requestReadStatistics, 1, got.countsErr)
		noteFull(r.noted, r.counts, got.counts, got.table.Max)
		r.counts = got.counts
	}
	table, counts := got.table, got.counts
	return control.Conntrack{
		Entries: table.Entries, Max: table.Max,
		InsertFailed: counts.InsertFailed, Drop: counts.Drop, EarlyDrop: counts.EarlyDrop,
		Invalid: counts.Invalid, Error: counts.Error, SearchRestart: counts.SearchRestart,
		ExpectationsMade: counts.ExpectationsMade, ExpectationsEnded: counts.ExpectationsEnded, Expected: counts.Expected,
	}, nil
}

// noteFull notes that conntrack was full, as early drops show. Dropped packets do not show
// it: two flows may have wanted the same addresses and ports, as happens on many gateways.
func noteFull(e *episodes.Log, was, is ctwatch.Counts, most int) {
	e.Note(slog.LevelWarn, "conntrack full", "conntrack was full, and the kernel took out flows before their time; raise net.netfilter.nf_conntrack_max",
		is.EarlyDrop-was.EarlyDrop, "nf_conntrack_max", most, "packets_dropped", is.Drop-was.Drop)
}
