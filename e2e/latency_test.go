package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

const (
	latencyRepeats = 5
	latencyRounds  = 500 // of each program in each repeat
)

// BenchmarkPermissionLatency measures how long a permission takes, at idle, for
// conenatd and for the minimal loop (minimal_test.go), in turns:
//
//   - inside: from the event read to the kernel's acknowledgement, as each
//     program measures it itself;
//   - black box: from the arrival of the first packet at the peer to the arrival
//     of the first answer from another port that gets through. The peer sends
//     answers without pause meanwhile.
//
// It prints the distributions and, for each repeat, the ratio of the medians.
func BenchmarkPermissionLatency(b *testing.B) {
	if runtime.NumCPU() < 2 {
		b.Skip("needs a CPU for the program and one for the peer")
	}
	if err := pin(os.Getpid(), 1); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		var conenat, minimal latencies
		var inside, blackBox []float64
		for range latencyRepeats {
			c, m := latencyRepeat(b)
			fmt.Printf("inside, minimal loop     %v\n", m.inside)
			fmt.Printf("inside, conenatd         %v\n", c.inside)
			inside = append(inside, c.inside.P50/m.inside.P50)
			blackBox = append(blackBox, ratio(c.blackBox, m.blackBox))
			conenat.add(c)
			minimal.add(m)
		}
		for _, l := range []struct {
			what string
			took []time.Duration
		}{
			{"black box, minimal loop", minimal.blackBox},
			{"black box, conenatd", conenat.blackBox},
		} {
			fmt.Printf("%-24s %s\n", l.what, distribution(l.took))
		}
		fmt.Printf("ratio of medians, inside     %s\n", spread(inside))
		fmt.Printf("ratio of medians, black box  %s\n", spread(blackBox))
	}
}

type latencies struct {
	inside   control.Latency
	blackBox []time.Duration
}

func (l *latencies) add(m latencies) { l.blackBox = append(l.blackBox, m.blackBox...) }

func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func distribution(took []time.Duration) string {
	slices.Sort(took)
	us := func(q float64) float64 { return float64(quantile(took, q)) / 1e3 }
	return fmt.Sprintf("n=%d  p10 %.1f  p50 %.1f  p90 %.1f  p99 %.1f  p99.9 %.1f  max %.1f us",
		len(took), us(0.1), us(0.5), us(0.9), us(0.99), us(0.999), us(1))
}

func ratio(a, b []time.Duration) float64 {
	slices.Sort(a)
	slices.Sort(b)
	return float64(quantile(a, 0.5)) / float64(quantile(b, 0.5))
}

func spread(ratios []float64) string {
	slices.Sort(ratios)
	return fmt.Sprintf("%.2f (%.2f to %.2f, %d repeats)",
		ratios[len(ratios)/2], ratios[0], ratios[len(ratios)-1], len(ratios))
}

// latencyRepeat measures both programs, each in a lab of its own, in turns.
func latencyRepeat(b *testing.B) (conenat, minimal latencies) {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	c := newLatencyLab(b, stage.Exe(), "--backend=expect", "--subnet", lab.InsideNet.String(), "--log-level", "warn")
	b.Setenv(minimalEnv, "1")
	m := newLatencyLab(b, self)
	for range latencyRounds {
		conenat.blackBox = append(conenat.blackBox, c.round(b))
		minimal.blackBox = append(minimal.blackBox, m.round(b))
	}
	st, err := control.Dial(c.d.Socket).Status(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	conenat.inside = st.Latency
	c.end(b)
	m.end(b)
	var took []time.Duration
	if err := json.Unmarshal([]byte(m.d.Output()), &took); err != nil {
		b.Fatalf("%v: %q", err, m.d.Output())
	}
	slices.Sort(took)
	us := func(q float64) float64 { return float64(quantile(took, q)) / 1e3 }
	minimal.inside = control.Latency{Count: uint64(len(took)), P50: us(0.5), P99: us(0.99), Max: us(1)}
	return conenat, minimal
}

type latencyLab struct {
	*lab.Lab
	d            *lab.Daemon
	peer, answer *lab.Socket
	port         uint16
}

func newLatencyLab(b *testing.B, exe string, args ...string) *latencyLab {
	b.Helper()
	l := &latencyLab{Lab: lab.ForTest(b, lab.Options{Rules: lab.Masquerade + lab.DropPolicy}), port: 10000}
	var err error
	if l.peer, err = l.Outside.Socket(lab.PeerA, 5060); err != nil {
		b.Fatal(err)
	}
	if l.answer, err = l.Outside.Socket(lab.PeerA, 5070); err != nil {
		b.Fatal(err)
	}
	if l.d, err = l.StartDaemon(exe, args...); err != nil {
		b.Fatal(err)
	}
	if err := pin(l.d.PID(), 0); err != nil {
		b.Fatal(err)
	}
	return l
}

// pin binds all threads of a process to one CPU. The peer sends without pause; if
// the program and the peer shared a CPU, the benchmark would measure the
// scheduler's time slice.
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
			return fmt.Errorf("bind to CPU: %w", err)
		}
	}
	return nil
}

// round lets a new port of the inside host send one packet and returns how long
// the first answer from another port took to get through.
func (l *latencyLab) round(b *testing.B) time.Duration {
	b.Helper()
	l.port++
	in, err := l.Inside(0).Socket(l.Inside(0).Addr, l.port)
	if err != nil {
		b.Fatal(err)
	}
	defer in.Close()
	took, err := stage.FirstAnswer(in, l.peer, l.answer)
	if err != nil {
		b.Fatalf("%v\n%s", err, l.d.Output())
	}
	return took
}

func (l *latencyLab) end(b *testing.B) {
	b.Helper()
	if err := l.d.Stop(); err != nil {
		b.Fatal(err)
	}
	for _, s := range []*lab.Socket{l.peer, l.answer} {
		s.Close()
	}
}
