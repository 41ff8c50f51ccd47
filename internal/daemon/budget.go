package daemon

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// neighboursShare is the part of one CPU, as its inverse, that looks at what
	// neighbours change in rules, links and routes take while they keep changing it.
	neighboursShare = 50
	// neighboursBurst is the CPU time that looks may take at once after a quiet time, so
	// that a change is noticed at once where changes are few. burstLooks is the same in
	// looks, for a slow machine or many rules, and mostBurst limits it.
	neighboursBurst = 250 * time.Millisecond
	burstLooks      = 4
	mostBurst       = 2 * time.Second
	// mostLate is the longest time that a change waits for the budget. It exceeds the
	// share only if one look takes more than mostLate/neighboursShare (200 ms), and 5 %
	// of a CPU only if one takes more than half a second.
	mostLate = 10 * time.Second
)

// A budget limits the share of a CPU that looks take whose number others decide. It has
// some CPU time left, up to a burst, and recovers by neighboursShare. A look may take more
// than is left; the next one waits until that has recovered, at most mostLate.
//
// A costly look makes the burst larger at once, and as much more is left. The burst
// shrinks no faster than the budget recovers, so that costly and cheap looks in turn take
// twice the share at most.
//
// The zero value has the whole burst. The reconcile owns it.
type budget struct {
	left   time.Duration // CPU time
	at     time.Duration // when that was so
	burst  time.Duration // the most that may be left; 0 before the first use
	look   time.Duration // CPU time of the last look
	inLoop time.Duration // CPU time of the loop for the reconcile, in all
}

// burstOf returns the burst for looks that take so long.
func burstOf(look time.Duration) time.Duration {
	return min(max(neighboursBurst, burstLooks*look), mostBurst)
}

// allows reports whether a look may begin now.
func (b *budget) allows(now time.Duration) bool {
	b.open()
	recovered := (now - b.at) / neighboursShare
	b.at = now
	b.burst = max(b.burst-recovered, burstOf(b.look))
	b.left = min(b.left+recovered, b.burst)
	return b.left > 0
}

// allowsPoll reports whether a look may begin that no change asks for. It leaves half of the
// burst to those that one does, however much polls cost.
func (b *budget) allowsPoll(now time.Duration) bool { return b.allows(now) && b.left > b.burst/2 }

// open makes a zero budget ready.
func (b *budget) open() {
	if b.burst == 0 {
		b.burst, b.left = neighboursBurst, neighboursBurst
	}
}

// wait returns how long after the last call of allows it takes until a look may begin.
func (b *budget) wait() time.Duration { return max(-b.left, 0) * neighboursShare }

// spend looks, and charges the budget with the CPU time of the look: that of its own
// thread, with the kernel's part, and that of the loop for it (Daemon.ask). It leaves out
// the time that the look waits, so that a busy machine delays nothing, and what other
// goroutines do meanwhile. The garbage collector works in threads of its own and is not
// counted.
func (b *budget) spend(look func()) {
	before := b.inLoop
	b.charge(threadTime(look) + b.inLoop - before)
}

// charge takes the CPU time of a look from the budget.
func (b *budget) charge(took time.Duration) {
	b.open()
	grown := max(burstOf(took)-b.burst, 0)
	b.burst += grown
	b.left = max(b.left+grown-took, -mostLate/neighboursShare)
	b.look = took
}

// rest is how long after a reconcile that took so much CPU time the next one may come that
// is not due. Where events are lost all the time, looking at the table must not lose more,
// and takes a fixed share of a CPU unless what was lost would wait too long.
func rest(cost time.Duration) time.Duration {
	return max(time.Second, 4*cost, min(hurriedShare*cost, mostLate))
}

// threadTime returns the CPU time that f takes in this goroutine.
func threadTime(f func()) time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began := threadClock()
	f()
	return threadClock() - began
}

// threadClock is the CPU time of this thread.
func threadClock() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
