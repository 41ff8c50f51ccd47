package ctwatch

import (
	"errors"
	"net"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/ti-mo/conntrack"
)

// Fails when one counter is taken for another, when the counter of one CPU replaces that of
// another, and when what was counted before the first call counts.
func TestCountsAreTheSumOfAllCPUsSinceTheFirstLook(t *testing.T) {
	counts := func(n uint32) cpuCounts {
		return cpuCounts{
			conntrack.Stats{InsertFailed: n, Drop: 2 * n, EarlyDrop: 3 * n, Invalid: 4 * n, Error: 5 * n, SearchRestart: 6 * n},
			conntrack.StatsExpect{Create: 7 * n, Delete: 8 * n, New: 9 * n},
		}
	}
	var s Statistics
	for _, step := range []struct{ first, second uint32 }{{1000, 2000}, {1001, 2000}, {1001, 2010}} {
		s.add(map[uint16]cpuCounts{0: counts(step.first), 1: counts(step.second)})
	}
	want := Counts{
		InsertFailed: 11, Drop: 22, EarlyDrop: 33, Invalid: 44, Error: 55, SearchRestart: 66,
		ExpectationsMade: 77, ExpectationsEnded: 88, Expected: 99,
	}
	if diff := cmp.Diff(want, s.total); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// Fails when a counter that wrapped counts as one that started again.
func TestCountersOfTheKernelMayWrap(t *testing.T) {
	var s Statistics
	for _, n := range []uint32{1<<32 - 2, 1, 1<<32 - 1, 0} {
		s.add(map[uint16]cpuCounts{3: {flows: conntrack.Stats{Drop: n}}})
	}
	if want := (Counts{Drop: 1<<32 + 2}); s.total != want {
		t.Errorf("%+v, want %+v", s.total, want)
	}
}

// makeErrors sends n ICMP messages of a type that there is not.
func makeErrors(t testing.TB, n int) {
	t.Helper()
	c, err := net.Dial("ip4:icmp", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	for range n {
		if _, err := c.Write([]byte{200, 0, 0x37, 0xff, 0, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
	}
}

func dialStatistics(t testing.TB) *Statistics {
	t.Helper()
	s, err := DialStatistics(Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// Fails when the kernel's answer is not understood, or is another network namespace's.
func TestStatisticsAreThoseOfTheKernel(t *testing.T) {
	enterNetNS(t)
	makeErrors(t, 5) // before the first look
	s := dialStatistics(t)
	read := func() uint64 {
		t.Helper()
		c, err := s.Counts()
		if err != nil {
			t.Fatal(err)
		}
		n := c.Error
		if c.Error = 0; c != (Counts{}) {
			t.Errorf("nothing but errors happened: %+v", c)
		}
		return n
	}
	if n := read(); n != 0 {
		t.Errorf("%d errors at the first look", n)
	}
	makeErrors(t, 1)
	each := read() // each hook that sees it counts it
	if each == 0 {
		t.Fatal("an error is not counted")
	}
	makeErrors(t, 9)
	if n := read(); n != 10*each {
		t.Errorf("%d errors, want %d", n, 10*each)
	}
}

// Fails when Counts waits for a kernel that does not answer, when it then forgets its
// totals, and when it uses the abandoned connection again.
func TestStatisticsGiveUpAndTryAgain(t *testing.T) {
	enterNetNS(t)
	s := dialStatistics(t)
	s.total.Drop = 7
	s.cfg.Timeout = 1
	for { // the kernel may be quicker
		c, err := s.Counts()
		if c.Drop != 7 {
			t.Errorf("%+v, %v", c, err)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s.cfg.Timeout = DefaultTimeout
	if _, err := s.Counts(); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Counts(); err == nil {
		t.Error("it can be read after Close")
	}
}
