package daemon

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// neighboursShare is the part of one CPU, as its inverse, that reading the rules,
	// links and routes again takes at most when neighbours keep changing them.
	neighboursShare = 40
	// neighboursBurst is how much may be taken at once after a quiet time: what
	// changes now and then is read at once.
	neighboursBurst = 500 * time.Millisecond
)

// A budget bounds the share of a CPU that work takes which others give occasion to.
// It is saved up while there is no such work, up to a burst; work is done while there
// is some left, and what one piece takes beyond it is waited for before the next.
type budget struct {
	left time.Duration // of CPU time
	at   time.Duration // when that was so
	full bool          // it was used before
}

// allows reports whether work may be done now.
func (b *budget) allows(now time.Duration) bool {
	if !b.full {
		b.left, b.at, b.full = neighboursBurst, now, true
	}
	b.left = min(b.left+(now-b.at)/neighboursShare, neighboursBurst)
	b.at = now
	return b.left > 0
}

// wait returns how long it takes until work is allowed again.
func (b *budget) wait() time.Duration { return max(-b.left, 0) * neighboursShare }

// spend does work and takes from the budget the CPU time of the process meanwhile:
// what the loop and the garbage collector do for it too, but not the time it waits, so
// that a busy machine makes nothing late.
func (b *budget) spend(work func()) {
	began := cpuTime()
	work()
	b.left -= cpuTime() - began
}

// cpuTime is the CPU time of this process.
func cpuTime() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
