package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cpus returns the CPU of programs in gateways and that of the sender.
func cpus() (programs, sender int) { return 0, runtime.NumCPU() - 1 }

// pinSelf binds the calling goroutine to its thread, and the thread to a CPU.
func pinSelf(cpu int) error {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("bind to CPU %d: %w", cpu, err)
	}
	return nil
}

// pin binds all threads of a process to a CPU.
func pin(pid, cpu int) error {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		return err
	}
	var set unix.CPUSet
	set.Set(cpu)
	for _, t := range tasks {
		tid, err := strconv.Atoi(filepath.Base(t))
		if err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(tid, &set); err != nil {
			return fmt.Errorf("bind to CPU %d: %w", cpu, err)
		}
	}
	return nil
}

// A clock is a CPU-time clock (clock_gettime(2)).
type clock int32

// The clock IDs of the kernel's include/linux/posix-timers_types.h.
const (
	cpuclockSched         = 2
	cpuclockPerThreadMask = 4
)

const ownThread clock = unix.CLOCK_THREAD_CPUTIME_ID

func processClock(pid int) clock { return clock(^pid<<3 | cpuclockSched) }

func threadClock(tid int) clock { return clock(^tid<<3 | cpuclockSched | cpuclockPerThreadMask) }

func (c clock) now() (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(int32(c), &t); err != nil {
		return 0, fmt.Errorf("read CPU time: %w", err)
	}
	return time.Duration(t.Nano()), nil
}

// settle waits until the program of this clock has nothing more to do.
func (c clock) settle() error {
	const look, quiet = 5 * time.Millisecond, 200 * time.Microsecond
	last, err := c.now()
	for end := time.Now().Add(time.Minute); err == nil; {
		time.Sleep(look)
		var now time.Duration
		if now, err = c.now(); err == nil && now-last < quiet {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("a program in the gateway is still busy after a minute")
		}
		last = now
	}
	return err
}

// machine describes the machine and its kernel.
func machine() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err.Error()
	}
	model := "unknown CPU"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if name, ok := field(string(info), "model name"); ok {
			model = name
		}
	}
	release, _, _ := strings.Cut(unix.ByteSliceToString(u.Release[:]), "-")
	return fmt.Sprintf("Linux %s, %s, %d CPUs (%s)", release, unix.ByteSliceToString(u.Machine[:]), runtime.NumCPU(), model)
}
