package daemon

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// neighboursShare limits looks at changes by neighbours, in rules, links and routes,
	// to 1/neighboursShare of one CPU while the changes go on.
	neighboursShare = 50
	// neighboursBurst is the CPU time that looks may take at once after a quiet time, so
	// that a change is noticed at once where changes are few. burstLooks is the same as a
	// number of looks, for a slow machine or many rules, and mostBurst limits it.
	neighboursBurst = 150 * time.Millisecond
	burstLooks      = 4
	mostBurst       = 2 * time.Second
	// mostLate is the longest time that a change waits for the budget. So looks exceed the
	// share only if one takes more than mostLate/neighboursShare (200 ms), and 5 % of a CPU
	// only if one takes more than half a second.
	mostLate = 10 * time.Second
)

// A budget limits the share of a CPU taken by looks whose number others decide. It has
// some CPU time left, up to a burst, and recovers by neighboursShare. A look may take more
// than is left; the next one waits until that has recovered, at most mostLate.
//
// A costly look enlarges the burst at once, and what is left by as much. The burst
// shrinks no faster than the budget recovers, so that costly and cheap looks in turn take
// twice the share at most.
//
// The zero value has the whole burst. The reconcile owns it.
type budget struct {
	left   time.Duration // CPU time
	at     time.Duration // when left was computed
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

// allowsPoll reports whether a poll may begin: a look that no change asks for. Polls leave
// half of the burst to other looks, however much they cost.
func (b *budget) allowsPoll(now time.Duration) bool { return b.allows(now) && b.left > b.burst/2 }

// open makes a zero budget ready.
func (b *budget) open() {
	if b.burst == 0 {
		b.burst, b.left = neighboursBurst, neighboursBurst
	}
}

// wait returns how long after the last call of allows it takes until a look may begin.
func (b *budget) wait() time.Duration { return max(-b.left, 0) * neighboursShare }

// spend calls look, and charges the budget with its CPU time: that of its own thread, in
// user space and the kernel, and that of the loop for it (reconciler.ask). Time in which look
// waits does not count, so that a busy machine delays nothing. What the process takes meanwhile
// for all else, such as the garbage collector and the scheduler, counts up to the same amount
// again: most of it may be for flows.
func (b *budget) spend(look func()) { b.charge(b.costOf(look)) }

// also is spend for a look that has a limit of its own, and not to be called within one. It uses
// up what is left, but no look at changes waits for it.
func (b *budget) also(look func()) {
	b.open()
	b.left = max(b.left-b.costOf(look), min(b.left, 0))
}

func (b *budget) costOf(look func()) time.Duration {
	inLoop, all := b.inLoop, processClock()
	own := threadTime(look) + b.inLoop - inLoop
	return min(max(own, processClock()-all), 2*own)
}

// charge takes the CPU time of a look from the budget.
func (b *budget) charge(took time.Duration) {
	b.open()
	grown := max(burstOf(took)-b.burst, 0)
	b.burst += grown
	b.left = max(b.left+grown-took, -mostLate/neighboursShare)
	b.look = took
}

// rest is the least time from a reconcile that took cost of CPU time to one that lost events
// ask for. If events are lost all the time, reading the table must not lose more of them: it
// takes a fixed share of a CPU, or more so as not to be later than mostLate.
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

// threadClock is the CPU time of this thread, processClock that of all threads.
func threadClock() time.Duration { return clock(unix.CLOCK_THREAD_CPUTIME_ID) }

func processClock() time.Duration { return clock(unix.CLOCK_PROCESS_CPUTIME_ID) }

func clock(id int32) time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(id, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
