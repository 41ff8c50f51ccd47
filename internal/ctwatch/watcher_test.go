package ctwatch

import (
	"bytes"
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// pipeWatcher returns a Watcher whose datagrams the test writes.
func pipeWatcher(t testing.TB) (*Watcher, func(parts ...[]byte)) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
	w, err := newWatcher(near)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close(); _ = far.Close() })
	if err := w.SetReadDeadline(time.Now().Add(within)); err != nil {
		t.Fatal(err)
	}
	return w, func(parts ...[]byte) {
		t.Helper()
		if _, err := far.Write(bytes.Join(parts, nil)); err != nil {
			t.Fatal(err)
		}
	}
}

// flowMsg is a NEW event with this mark.
func flowMsg(mark byte) []byte { return newMsg(tuples, attr(nfnl.CTAMark, 0, 0, 0, mark)) }

func marks(events []Event) []byte {
	var m []byte
	for _, ev := range events {
		m = append(m, byte(ev.Flow.Mark))
	}
	return m
}

func TestReadTakesWhatIsQueuedInOrder(t *testing.T) {
	w, write := pipeWatcher(t)
	write(flowMsg(1), flowMsg(2), flowMsg(3))
	write(flowMsg(4))
	write(flowMsg(5), flowMsg(6))
	events := make([]Event, 2)
	for _, want := range []string{"\x01\x02", "\x03\x04", "\x05\x06"} {
		n, err := w.Read(events)
		if err != nil || string(marks(events[:n])) != want {
			t.Fatalf("%d events, marks %v, error %v, want %v", n, marks(events[:n]), err, []byte(want))
		}
	}
	if got := w.Stats().Received; got != 6 {
		t.Errorf("%d events counted, want 6", got)
	}
}

func TestReadCountsAndSkipsWhatItCannotUse(t *testing.T) {
	w, write := pipeWatcher(t)
	for _, tt := range oddMessages {
		if tt.want != nil {
			write(tt.msg)
		}
	}
	// Only what follows a broken length in the same datagram is lost.
	write(flowMsg(1), []byte{3, 0, 0, 0}, flowMsg(2))
	write(flowMsg(3))
	if got := marks(readQueued(t, w)); string(got) != "\x01\x03" {
		t.Errorf("marks %v, want 1 and 3", got)
	}
	want := Stats{Received: 2, Malformed: 1}
	for _, tt := range oddMessages {
		switch tt.want {
		case errForeign:
			want.Filtered++
		case errMalformed:
			want.Malformed++
		}
	}
	if got := w.Stats(); got != want {
		t.Errorf("counters %+v, want %+v", got, want)
	}
}

func TestReadDoesNotAllocate(t *testing.T) {
	w, write := pipeWatcher(t)
	const runs = 60
	for range runs + 1 { // AllocsPerRun calls once more, to warm up
		write(flowMsg(1), flowMsg(2), flowMsg(3))
	}
	events := make([]Event, 2) // so that a Read ends within a datagram
	allocs := testing.AllocsPerRun(runs, func() {
		if n, err := w.Read(events); n != 2 || err != nil {
			t.Error(n, err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
	if err := w.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = w.Read(events) }); n != 0 {
		t.Errorf("%v allocations at the deadline", n)
	}
}

func TestReadWithoutRoomReturnsAtOnce(t *testing.T) {
	w, write := pipeWatcher(t)
	write(flowMsg(1))
	if n, err := w.Read(nil); n != 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

func TestReadEndsAtTheDeadline(t *testing.T) {
	w, write := pipeWatcher(t)
	if err := w.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := w.Read(make([]Event, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%d, %v, want os.ErrDeadlineExceeded", n, err)
	}
	if err := w.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	write(flowMsg(1))
	readOne(t, w)
}

func TestWakeEndsAReadThatWaits(t *testing.T) {
	w, write := pipeWatcher(t)
	done := make(chan error)
	go func() {
		_, err := w.Read(make([]Event, 1))
		done <- err
	}()
	w.Wake()
	if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("error %v, want os.ErrDeadlineExceeded", err)
	}
	// Once only: the next Read waits as before.
	write(flowMsg(1))
	readOne(t, w)
}

func TestWakeIsNotLostToANewDeadline(t *testing.T) {
	w, write := pipeWatcher(t)
	w.Wake()
	if err := w.SetReadDeadline(time.Now().Add(within)); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := w.Read(make([]Event, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("error %v, want os.ErrDeadlineExceeded", err)
	}
	if time.Since(start) >= within {
		t.Error("only the deadline ended the Read")
	}
	write(flowMsg(1))
	readOne(t, w)
}

// Otherwise a loop that is always woken, or always late, never reads.
func TestReadTakesWhatIsQueuedWhenItIsWokenOrLate(t *testing.T) {
	w, write := pipeWatcher(t)
	write(flowMsg(1))
	w.Wake()
	readOne(t, w)
	if err := w.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	write(flowMsg(2))
	readOne(t, w)
	if _, err := w.Read(make([]Event, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("error %v, want os.ErrDeadlineExceeded", err)
	}
}

// stoppedAfter runs stopped after each look at the socket, as if the process were stopped
// before the look returns.
type stoppedAfter struct {
	syscall.RawConn
	stopped func()
}

func (c stoppedAfter) Read(look func(uintptr) bool) error {
	return c.RawConn.Read(func(fd uintptr) bool {
		defer c.stopped()
		return look(fd)
	})
}

// What happens while the process is stopped comes after the time at which nothing was queued,
// wherever it is stopped.
//
// Fails when the time is that of Read's return.
func TestNothingWasQueuedBeforeTheLook(t *testing.T) {
	w, write := pipeWatcher(t)
	var queued time.Time
	w.rc = stoppedAfter{w.rc, func() {
		if queued.IsZero() {
			queued = time.Now()
			write(flowMsg(2))
		}
	}}
	write(flowMsg(1))
	for _, mark := range []string{"\x01", "\x02"} {
		if got := marks(readQueued(t, w)); string(got) != mark {
			t.Fatalf("marks %v, want %v", got, []byte(mark))
		}
		if at := w.Emptied(); at.Before(queued) != (mark == "\x01") {
			t.Errorf("the queue was empty at %v after event %q, and the second came at %v", at, mark, queued)
		}
	}
}

func TestCloseEndsAReadThatWaits(t *testing.T) {
	w, _ := pipeWatcher(t)
	done := make(chan error)
	go func() {
		_, err := w.Read(make([]Event, 1))
		done <- err
	}()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the Read that waited, and one more
		err := <-done
		if !errors.Is(err, os.ErrClosed) || !errors.Is(err, net.ErrClosed) {
			t.Errorf("error %v, want os.ErrClosed and net.ErrClosed", err)
		}
		go func() {
			_, err := w.Read(make([]Event, 1))
			done <- err
		}()
	}
	<-done
	w.Wake()
	if err := w.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}
