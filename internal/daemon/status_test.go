package daemon

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/episodes"
)

// While another program reads or deletes flows, the kernel does not answer for their statistics.
//
// Fails when a status waits for such an answer for as long as it takes.
func TestStatusDoesNotWaitForTheKernel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &shared{looks: make(chan func(*reconciler)), ended: make(chan struct{})}
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			<-s.looks
			<-stop // the reconcile waits for the kernel
		}()
		s.readCounters()
	})
}

// slowStatistics answers only once it may.
type slowStatistics struct {
	may   chan struct{}
	asked int
}

func (s *slowStatistics) Table() (ctwatch.Table, error) {
	s.asked++
	<-s.may
	return ctwatch.Table{Entries: s.asked, Max: 100}, nil
}

func (s *slowStatistics) Counts() (ctwatch.Counts, error) { return ctwatch.Counts{}, nil }
func (s *slowStatistics) Close() error                    { return nil }

// The reconcile goes on while the kernel does not answer for its statistics, and later shows the
// answer.
//
// Fails when it waits, when it asks again before there is an answer, and when the answer is lost.
func TestStatisticsHoldNothingUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &slowStatistics{may: make(chan struct{}, 1)}
		now := func() time.Duration { return 0 }
		log := slog.New(slog.DiscardHandler)
		r := &reconciler{
			shared:     &shared{failures: episodes.NewFailures(log, now, time.Hour), noted: episodes.New(log, now, time.Hour)},
			statistics: ctwatch.NewPoller(k),
		}
		k.may <- struct{}{}
		read := func(want int) {
			t.Helper()
			if got, err := r.readConntrack(); err != nil || got.Entries != want || got.Max != 100 {
				t.Errorf("%+v, %v, want %d entries", got, err, want)
			}
		}
		read(1)
		read(1)
		read(1)
		k.may <- struct{}{}
		synctest.Wait()
		read(2)
		read(2)
		k.may <- struct{}{}
		if err := r.statistics.Close(); err != nil || k.asked != 3 {
			t.Errorf("asked %d times, %v", k.asked, err)
		}
	})
}
