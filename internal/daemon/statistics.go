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

// readConntrack returns what status shows of the kernel's connection tracking, or what it last
// showed if that takes too long. The reconcile calls it, even in the middle of its work: so it has
// connections of its own.
func (r *reconciler) readConntrack() (control.Conntrack, error) {
	wait := time.NewTimer(statisticsTime)
	defer wait.Stop()
	return r.conntrackWithin(wait.C)
}

func (r *reconciler) conntrackWithin(wait <-chan time.Time) (k control.Conntrack, err error) {
	got, isNew := r.statistics.Read(wait)
	if got.Err != nil {
		return k, got.Err
	}
	if isNew {
		r.failures.Note(requestReadStatistics, 1, got.CountsErr)
		noteFull(r.noted, r.counts, got.Counts, got.Table.Max)
		r.counts = got.Counts
	}
	table, counts := got.Table, got.Counts
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
