package budget

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// neighboursShare limits looks at changes by neighbours, in rules, links and routes,
	// to 1/neighboursShare of one CPU while the changes go on.
	neighboursShare = 50
	// PollEvery is the time between two polls: checks whether somebody changed nftables. A
	// check costs one query.
	PollEvery = 250 * time.Millisecond

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
	// hurriedShare limits reconciles that lost events ask for to 1/hurriedShare of a CPU
	// (see Rest).
	hurriedShare = 30
)

// A Budget limits the share of a CPU taken by looks whose number others decide. It has
// some CPU time left, up to a burst, and recovers by neighboursShare. A look may take more
// than is left; the next one waits until that has recovered, at most mostLate.
//
// A costly look enlarges the burst at once, and what is left by as much. The burst
// shrinks no faster than the budget recovers, so that costly and cheap looks in turn take
// twice the share at most.
//
// The zero value has the whole burst. It is not safe for concurrent use.
type Budget struct {
	left   time.Duration // CPU time
	at     time.Duration // when left was computed
	burst  time.Duration // the most that may be left; 0 before the first use
	Look   time.Duration // CPU time of the last look
	InLoop time.Duration // CPU time of the loop for the reconcile, in all
}

// burstOf returns the burst for looks that take so long.
func burstOf(look time.Duration) time.Duration {
	return min(max(neighboursBurst, burstLooks*look), mostBurst)
}

// Allows reports whether a look may begin now.
func (b *Budget) Allows(now time.Duration) bool {
	b.open()
	recovered := (now - b.at) / neighboursShare
	b.at = now
	b.burst = max(b.burst-recovered, burstOf(b.Look))
	b.left = min(b.left+recovered, b.burst)
	return b.left > 0
}

// AllowsPoll reports whether a poll may begin: a look that no change asks for. Polls leave
// half of the burst to other looks, however much they cost.
func (b *Budget) AllowsPoll(now time.Duration) bool { return b.Allows(now) && b.left > b.burst/2 }

// open makes a zero budget ready.
func (b *Budget) open() {
	if b.burst == 0 {
		b.burst, b.left = neighboursBurst, neighboursBurst
	}
}

// Wait returns how long after the last call of Allows it takes until a look may begin.
func (b *Budget) Wait() time.Duration { return max(-b.left, 0) * neighboursShare }

// Spend calls look, and charges the budget with its CPU time: that of its own thread, in
// user space and the kernel, and that of the loop for it (InLoop). Time in which look
// waits does not count, so that a busy machine delays nothing. What the process takes meanwhile
// for all else, such as the garbage collector and the scheduler, counts up to the same amount
// again: most of it may be for flows.
func (b *Budget) Spend(look func()) { b.charge(b.costOf(look)) }

// Also is Spend for a look that has a limit of its own, and not to be called within one. It uses
// up what is left, but no look at changes waits for it.
func (b *Budget) Also(look func()) {
	b.open()
	b.left = max(b.left-b.costOf(look), min(b.left, 0))
}

func (b *Budget) costOf(look func()) time.Duration {
	inLoop, all := b.InLoop, processClock()
	own := ThreadTime(look) + b.InLoop - inLoop
	return min(max(own, processClock()-all), 2*own)
}

// charge takes the CPU time of a look from the budget.
func (b *Budget) charge(took time.Duration) {
	b.open()
	grown := max(burstOf(took)-b.burst, 0)
	b.burst += grown
	b.left = max(b.left+grown-took, -mostLate/neighboursShare)
	b.Look = took
}

// Rest is the least time from a reconcile that took cost of CPU time to one that lost events
// ask for. If events are lost all the time, reading the table must not lose more of them: it
// takes a fixed share of a CPU, or more so as not to be later than mostLate.
func Rest(cost time.Duration) time.Duration {
	return max(time.Second, 4*cost, min(hurriedShare*cost, mostLate))
}

// ThreadTime returns the CPU time that f takes in this goroutine.
func ThreadTime(f func()) time.Duration {
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
