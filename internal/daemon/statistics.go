package daemon

import (
	"log/slog"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
)

// readConntrack returns what status shows of the kernel's connection tracking. The
// reconcile calls it, even in the middle of its work: so it has connections of its own.
func (r *reconciler) readConntrack() (k control.Conntrack, err error) {
	table, err := r.statistics.Table()
	if err != nil {
		return k, err
	}
	counts, err := r.statistics.Counts()
	r.failures.note(requestReadStatistics, 1, err) // counts are the last ones then
	noteFull(r.noted, r.counts, counts, table.Max)
	r.counts = counts
	return control.Conntrack{
		Entries: table.Entries, Max: table.Max,
		InsertFailed: counts.InsertFailed, Drop: counts.Drop, EarlyDrop: counts.EarlyDrop,
		Invalid: counts.Invalid, Error: counts.Error, SearchRestart: counts.SearchRestart,
		ExpectationsMade: counts.ExpectationsMade, ExpectationsEnded: counts.ExpectationsEnded, Expected: counts.Expected,
	}, nil
}

// noteFull notes that conntrack was full, as early drops show. Dropped packets do not show
// it: two flows may have wanted the same addresses and ports, as happens on many gateways.
func noteFull(e *episodes, was, is ctwatch.Counts, most int) {
	e.note(slog.LevelWarn, "conntrack full", "conntrack was full, and the kernel took out flows before their time; raise net.netfilter.nf_conntrack_max",
		is.EarlyDrop-was.EarlyDrop, "nf_conntrack_max", most, "packets_dropped", is.Drop-was.Drop)
}
