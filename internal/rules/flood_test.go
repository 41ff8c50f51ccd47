package rules_test

import (
	"errors"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
)

// A flood is a series of packets whose cost is measured as the CPU time of the sending
// thread.
type flood struct {
	*lab.Lab
	*lab.Flood
	sink *lab.Host
}

// newFlood prepares n packets that go in. The inside host counts and drops them,
// so that no socket has to be emptied.
func newFlood(tb testing.TB, l *lab.Lab, n int) *flood {
	tb.Helper()
	f := &flood{Lab: l, sink: l.Inside(0)}
	var err error
	f.Flood, err = l.NewFlood(n, false)
	must(tb, err)
	tb.Cleanup(func() { must(tb, f.Flood.Close()) })
	_, err = f.sink.Output("nft", `table ip sink { counter came { }; chain c {
		type filter hook prerouting priority raw; meta l4proto udp counter name came drop; }; }`)
	must(tb, err)
	return f
}

// send sends the packets from first to last and returns the CPU time of that. The thread
// must be bound to one CPU.
func (f *flood) send(tb testing.TB, first, last int) time.Duration {
	tb.Helper()
	began := threadTime(tb)
	must(tb, f.Send(first, last))
	return threadTime(tb) - began
}

// came returns how many packets have come to the host since the last call.
func (f *flood) came(tb testing.TB) int {
	tb.Helper()
	out, err := f.sink.Output("nft", "reset", "counter", "ip", "sink", "came")
	must(tb, err)
	_, rest, _ := strings.Cut(out, "packets ")
	digits, _, _ := strings.Cut(rest, " ")
	n, err := strconv.Atoi(digits)
	must(tb, err)
	return n
}

// A listener receives the gateway's netlink events of one group, as conenatd does.
type listener int

func listenForEvents(tb testing.TB, l *lab.Lab, group int) listener {
	tb.Helper()
	var fd int
	must(tb, l.Gateway.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER); err != nil {
			return err
		}
		const room = 64 << 20
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room),
			unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
			unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group))
	}))
	tb.Cleanup(func() { must(tb, unix.Close(fd)) })
	return listener(fd)
}

// empty reads the queued events and returns their number.
func (l listener) empty() (n int) {
	var b [1 << 12]byte
	for ; ; n++ {
		if _, err := unix.Read(int(l), b[:]); err != nil {
			return n
		}
	}
}

func threadTime(tb testing.TB) time.Duration {
	tb.Helper()
	var t unix.Timespec
	must(tb, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t))
	return time.Duration(t.Nano())
}

// onOneCPU binds the goroutine to its thread, and the thread to a CPU, until the benchmark
// ends. It takes the last CPU, because the first serves most interrupts.
func onOneCPU(tb testing.TB) {
	tb.Helper()
	runtime.LockOSThread()
	var allowed, last unix.CPUSet
	must(tb, unix.SchedGetaffinity(0, &allowed))
	for cpu := 8*int(unsafe.Sizeof(allowed)) - 1; last.Count() == 0; cpu-- {
		if allowed.IsSet(cpu) {
			last.Set(cpu)
		}
	}
	must(tb, unix.SchedSetaffinity(0, &last))
	tb.Cleanup(func() {
		must(tb, unix.SchedSetaffinity(0, &allowed))
		runtime.UnlockOSThread()
	})
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
