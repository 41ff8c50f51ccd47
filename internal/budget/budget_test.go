package budget

import (
	"testing"
	"time"
)

// looks asks for a look every step and lets each take this long. It returns how many there
// were and the longest time between two of them.
func looks(b *Budget, from, to, step, took time.Duration) (n int, apart time.Duration) {
	last := from
	for now := from; now < to; now += step {
		if b.Allows(now) {
			b.charge(took)
			apart = max(apart, now-last)
			last = now
			n++
		}
	}
	return n, max(apart, to-last)
}

func TestBudgetAllowsABurstAndThenAShare(t *testing.T) {
	var b Budget
	const look, step = 20 * time.Millisecond, 10 * time.Millisecond
	if n, _ := looks(&b, 0, time.Second, step, look); n < int(neighboursBurst/look) || n > int(neighboursBurst/look)+2 {
		t.Errorf("%d looks in the first second, want the burst, %d", n, neighboursBurst/look)
	}
	const long = 100 * time.Second
	n, _ := looks(&b, time.Second, time.Second+long, step, look)
	if took := time.Duration(n) * look; took > long/neighboursShare+look || took < long/neighboursShare-2*look {
		t.Errorf("took %v in %v, want a share of 1/%d", took, long, neighboursShare)
	}
	if !b.Allows(10*time.Minute) || b.Wait() != 0 {
		t.Error("the burst has not recovered")
	}
	b.left = -time.Millisecond
	if w := b.Wait(); w != neighboursShare*time.Millisecond || b.Allows(10*time.Minute+w) || !b.Allows(10*time.Minute+w+neighboursShare) {
		t.Errorf("waits %v", w)
	}
}

// Fails when polls use up the burst, or are beyond the share.
func TestPollsLeaveRoomForChanges(t *testing.T) {
	for _, poll := range []time.Duration{100 * time.Microsecond, 10 * time.Millisecond, 100 * time.Millisecond} {
		var b Budget
		polls, left := 0, neighboursBurst
		const long = 10 * time.Minute
		for now := time.Duration(0); now < long; now += PollEvery {
			if b.AllowsPoll(now) {
				b.charge(poll)
				polls++
			}
			left = min(left, b.left)
		}
		if left < neighboursBurst/2-poll {
			t.Errorf("polls of %v leave %v to changes", poll, left)
		}
		if took := time.Duration(polls) * poll; took > long/neighboursShare+mostBurst {
			t.Errorf("polls of %v take %v in %v", poll, took, long)
		}
		if polls == 0 || poll < PollEvery/neighboursShare && polls != int(long/PollEvery) {
			t.Errorf("%d polls of %v", polls, poll)
		}
	}
}

// On a slow machine, or with many rules, one look takes long. Fails when it uses up the
// burst, or when its cost is waited for without limit.
func TestAChangeIsNeverVeryLate(t *testing.T) {
	for _, tt := range []struct {
		look  time.Duration
		burst int           // changes, one a second, each of which is looked at at once
		late  time.Duration // at most, while there is a change each second
		share float64       // at most, meanwhile
	}{
		{10 * time.Millisecond, 15, time.Second, 0.02},
		{100 * time.Millisecond, 4, 6 * time.Second, 0.02},
		{450 * time.Millisecond, 4, mostLate + 2*time.Second, 0.05},
		{1750 * time.Millisecond, 2, mostLate + 2*time.Second, 0.18},
	} {
		var b Budget
		at := time.Duration(0)
		for i := range tt.burst {
			if at += time.Second; !b.Allows(at) {
				t.Errorf("looks of %v: change %d waits %v", tt.look, i+1, b.Wait())
			}
			b.charge(tt.look)
		}
		_, _ = looks(&b, at, at+10*time.Minute, time.Second, tt.look) // what is left of the burst
		const long = 10 * time.Minute
		n, late := looks(&b, at+10*time.Minute, at+10*time.Minute+long, time.Second, tt.look)
		if late > tt.late {
			t.Errorf("looks of %v: %v late, want at most %v", tt.look, late, tt.late)
		}
		if share := float64(n) * tt.look.Seconds() / long.Seconds(); share > tt.share+0.005 {
			t.Errorf("looks of %v take %.1f %% of a CPU, want at most %.1f %%", tt.look, 100*share, 100*tt.share)
		}
	}
}

// A cheap look waits for its own cost, and for that of one costly look before it.
func TestCheapLooksAfterCostlyOnesAreNotLate(t *testing.T) {
	const cheap, step = 10 * time.Millisecond, 100 * time.Millisecond
	var b Budget
	for range 20 {
		b.charge(3 * time.Second)
	}
	if n, _ := looks(&b, 0, mostLate+2*step, step, cheap); n == 0 {
		t.Errorf("the first waits longer than %v", mostLate)
	}
	if _, late := looks(&b, mostLate+2*step, time.Minute, step, cheap); late > neighboursShare*cheap+2*step {
		t.Errorf("the next ones are %v late", late)
	}
}

// Fails when the burst of costly looks is granted again after each cheap one.
func TestAlternatingLooksTakeALimitedShare(t *testing.T) {
	for cheap := range 20 {
		var b Budget
		var took time.Duration
		const long = time.Hour
		n := 0
		for now := time.Duration(0); now < long; now += 250 * time.Millisecond {
			if b.Allows(now) {
				look := 10 * time.Millisecond
				if n%(cheap+1) == 0 {
					look = 400 * time.Millisecond
				}
				b.charge(look)
				took += look
				n++
			}
		}
		if most := 2*long/neighboursShare + mostBurst; took > most {
			t.Errorf("with %d cheap looks after each costly one %v of CPU time in %v, want at most %v", cheap, took, long, most)
		}
	}
}

// spin takes CPU time of its thread.
func spin(d time.Duration) {
	for began := threadClock(); threadClock()-began < d; {
	}
}

// Fails when what others do meanwhile is charged: the events, the requests and the
// renewals of the loop.
func TestBudgetChargesALookAlone(t *testing.T) {
	const some, much = 15 * time.Millisecond, 200 * time.Millisecond
	var b Budget
	b.Spend(func() {
		end := make(chan struct{})
		go func() {
			defer close(end)
			ThreadTime(func() { spin(much) })
		}()
		<-end
	})
	if took := neighboursBurst - b.left; took > some {
		t.Errorf("%v for having waited while another goroutine works", took)
	}
	b = Budget{}
	b.Spend(func() {
		spin(some)
		b.InLoop += some // as reconciler.ask does
	})
	if took := neighboursBurst - b.left; took < 2*some || took > much {
		t.Errorf("%v for %v of a look and the same of the loop", took, some)
	}
}

// Looks that have limits of their own leave less to those at changes, but never make them wait.
//
// Fails when such a look costs nothing, and when a change waits for one.
func TestOtherLooksUseTheBudgetUp(t *testing.T) {
	const some = 15 * time.Millisecond
	var b Budget
	b.Also(func() { spin(some) })
	if took := neighboursBurst - b.left; took < some {
		t.Errorf("%v for %v of another look", took, some)
	}
	b.left = some / 2
	b.Also(func() { spin(some) })
	if b.left != 0 || !b.Allows(b.at+time.Second) {
		t.Errorf("%v are left, and a second later no look may begin", b.left)
	}
	b.left = -some
	b.Also(func() { spin(some) })
	if b.left != -some {
		t.Errorf("%v are left, want %v", b.left, -some)
	}
}
