package daemon

import (
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/episodes"
	"github.com/conenatd/conenatd/internal/episodes/episodestest"
)

// Fails when each look at a full table is a line of the log, and when packets that were
// dropped for another reason make one.
func TestFullConntrackIsLoggedOnce(t *testing.T) {
	log, lines := episodestest.Logged()
	e := episodes.New(log, func() time.Duration { return time.Hour }, 30*time.Second)
	var was ctwatch.Counts
	look := func(is ctwatch.Counts, want string) {
		t.Helper()
		noteFull(e, was, is, 4096)
		was = is
		if got := lines(); got != want {
			t.Errorf("logged %q, want %q", got, want)
		}
	}
	look(ctwatch.Counts{Drop: 5, InsertFailed: 5}, "")
	look(ctwatch.Counts{Drop: 7, InsertFailed: 5, EarlyDrop: 3}, `level=WARN msg="conntrack was full, and the kernel took out flows before their time; `+
		`raise net.netfilter.nf_conntrack_max" count=3 nf_conntrack_max=4096 packets_dropped=2`+"\n")
	look(ctwatch.Counts{Drop: 9, InsertFailed: 5, EarlyDrop: 6}, "")
	look(ctwatch.Counts{Drop: 9, InsertFailed: 5, EarlyDrop: 6}, "")
}
