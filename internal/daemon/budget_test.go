package daemon

import (
	"testing"
	"time"
)

func TestBudgetAllowsABurstAndThenAShare(t *testing.T) {
	var b budget
	const piece = 20 * time.Millisecond
	done := func(from, to time.Duration) (n int) {
		for now := from; now < to; now += 10 * time.Millisecond {
			if b.allows(now) {
				b.left -= piece
				n++
			}
		}
		return n
	}
	if n, burst := done(0, time.Second), int(neighboursBurst/piece); n < burst || n > burst+2 {
		t.Errorf("%d pieces in the first second, want the burst, %d", n, burst)
	}
	const long = 100 * time.Second
	if took := time.Duration(done(time.Second, time.Second+long)) * piece; took > long/neighboursShare || took < long/neighboursShare-2*piece {
		t.Errorf("took %v in %v, want a share of 1/%d", took, long, neighboursShare)
	}
	if !b.allows(10*time.Minute) || b.wait() != 0 {
		t.Error("nothing saved up")
	}
	b.left = -time.Millisecond
	if w := b.wait(); w != neighboursShare*time.Millisecond || b.allows(10*time.Minute+w) || !b.allows(10*time.Minute+w+neighboursShare) {
		t.Errorf("waits %v", w)
	}
}

func TestBudgetSpendsCPUTimeAlone(t *testing.T) {
	b := budget{full: true}
	b.spend(func() { time.Sleep(30 * time.Millisecond) })
	if b.left < -20*time.Millisecond {
		t.Errorf("%v for having waited", -b.left)
	}
	b.left = 0
	b.spend(func() {
		for began := cpuTime(); cpuTime()-began < 30*time.Millisecond; {
		}
	})
	if b.left > -30*time.Millisecond {
		t.Errorf("%v for 30 ms of work", -b.left)
	}
}
