package chaos

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

const (
	// soakEnv is the duration of the soak, as a Go duration.
	soakEnv = "CONENATD_SOAK"
	// If the soak is at least this long, the modes other than auto are soaked too, a
	// sixth of it each.
	soakOthers = 10 * time.Minute

	soakLifetime = 10 * time.Second

	// grownUp is when the model stops growing at this rate: its memory of ended claims
	// is full.
	grownUp = 50 * time.Second

	// How much more the end may show: samples are few, and a request may be running.
	moreAtMost   = 1
	memoryAtMost = 1.25
)

// A soak: 5,000 new flows a second for minutes. Some are answered, some by children, and
// permissions come and go at that rate. Many times a minute the daemon compares
// everything with the kernel, rereads its configuration, and sends the list. Two hosts
// talk meanwhile, and lose nothing. Memory, goroutines and open files do not grow. At
// the end the daemon, the expectations, the map and conntrack agree, first while
// thousands of permissions stand, then when none does.
//
// "make soak" runs it alone for three minutes, or longer with SOAK=2h; a shorter run
// cannot judge memory. The program is built without the race detector, with which two
// CPUs may be too slow.
//
// Fails when a reconcile leaks a file or a goroutine; when the model never forgets ended
// claims, or keeps expired ones; when the loop takes four events for each permission it
// looks after, or serves a whole list before it reads events again; and when verify
// takes a list of the map for complete.
func TestSoak(t *testing.T) {
	text := os.Getenv(soakEnv)
	if text == "" {
		t.Skip(`it takes the machine for itself: run "make soak"`)
	}
	long, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	modes := [][]string{stage.Auto, stage.Expect, stage.NFTByEvent}
	if long < soakOthers {
		modes = modes[:1]
	}
	exe := stage.Plain(t)
	others := long / 6
	stage.InModes(t, modes, func(t *testing.T, mode ...string) {
		soak(t, exe, long, mode)
		long = others
	})
}

func soak(t *testing.T, exe string, long time.Duration, mode []string) {
	s := stage.New(t, lab.Options{Inside: churnHosts + 1})
	s.Exe = exe
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "5"))
	s.Start(stage.Flags(mode, "--lifetime="+soakLifetime.String(), "--reconcile=5s",
		"--max-permissions-per-host=0", "--max-children=0", "--learn-rate=100000")...)
	hangUp := conversation(s)
	c, stop := churning(s)
	samples := watch(s, long)
	// Flows from now on stay alive, to be compared.
	before := c.made.Load()
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
	watch(s, time.Second)
	took := stop()
	made := int(c.made.Load())
	words := hangUp()
	st := s.Status()
	t.Logf("%d flows in %v, %d permissions granted, %d stand, %d as expectations, %d children came by the map; "+
		"%d overruns, put back %v; %v; %d words of the conversation, none lost",
		made, took.Round(time.Millisecond), st.Counters.Granted, st.Permissions.Standing, st.Permissions.Expectations,
		st.Tables.Map.Admitted, st.Events.Overruns, st.Counters.Repaired, latency(st), words)
	if wanted := int(churnRate * took.Seconds()); made < wanted*9/10 || st.Counters.Granted < uint64(made)*9/10 {
		t.Errorf("this was no soak: %d flows wanted", wanted)
	}
	for what, n := range st.Counters.Repaired {
		if n > uint64(made)/100 {
			t.Errorf("%d %s were gone from the kernel, and nobody took them away", n, what)
		}
	}
	flat(t, samples, long)

	claims := func() int {
		p := s.Status().Permissions
		return p.Standing + p.Refused + p.Waiting
	}
	last := made - int(before) + laterOn // some earlier flows were answered later
	s.UntilIn(5*stage.Patience(), "what was made before ran out", func() bool { return claims() <= last })
	if n := claims(); n < churnRate/2 {
		t.Errorf("%d claims are there to be compared", n)
	}
	s.Verified()
	_, err := s.Gateway.Output("conntrack", "-F")
	s.Must(err)
	s.UntilIn(5*stage.Patience(), "all ran out", func() bool { return claims() == 0 && held(s) == holdings{} })
	if n := s.Status().Flows; n > 0 {
		t.Errorf("%d flows are left in the model", n)
	}
	leavesNothing(s)
}

// watch samples the daemon each second. Every tenth second it also reloads and lists.
func watch(s *stage.Scene, long time.Duration) (samples []control.Process) {
	s.T.Helper()
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for end := time.Now().Add(long); time.Now().Before(end); {
		<-second.C
		if len(samples)%10 == 9 {
			if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
				s.T.Errorf("reload: exit %d, %s", code, out)
			}
			s.List()
		}
		samples = append(samples, s.Status().Process)
	}
	return samples
}

// flat checks that the daemon uses no more in the last quarter than in the first, after
// a third of the time as warm-up.
func flat(t *testing.T, samples []control.Process, long time.Duration) {
	t.Helper()
	rest := samples[len(samples)/3:]
	quarter := len(rest) / 4
	if quarter == 0 {
		t.Fatalf("%d samples are too few", len(samples))
	}
	first, last := summary(rest[:quarter]), summary(rest[len(rest)-quarter:])
	t.Logf("first quarter: %v", first)
	t.Logf("last quarter:  %v", last)
	if last.Goroutines > first.Goroutines+moreAtMost {
		t.Errorf("goroutines are leaked")
	}
	if last.Files > first.Files+moreAtMost {
		t.Errorf("file descriptors are leaked")
	}
	if long/3 < grownUp {
		return
	}
	grown := func(last, first uint64) bool { return float64(last) > memoryAtMost*float64(first) }
	if grown(last.Resident, first.Resident) || grown(last.Heap, first.Heap) {
		t.Errorf("memory is leaked")
	}
}

// A summarized process has the minimum of goroutines and open files, because a request
// or a reconcile may be running, and medians of memory, which includes garbage.
type summarized control.Process

func summary(samples []control.Process) summarized {
	of := func(f func(p *control.Process) uint64) []uint64 {
		var all []uint64
		for i := range samples {
			all = append(all, f(&samples[i]))
		}
		slices.Sort(all)
		return all
	}
	return summarized{
		Goroutines: int(of(func(p *control.Process) uint64 { return uint64(p.Goroutines) })[0]),
		Files:      int(of(func(p *control.Process) uint64 { return uint64(p.Files) })[0]),
		Resident:   of(func(p *control.Process) uint64 { return p.Resident })[len(samples)/2],
		Heap:       of(func(p *control.Process) uint64 { return p.Heap })[len(samples)/2],
	}
}

func (p summarized) String() string {
	return fmt.Sprintf("%d goroutines, %d files, %.1f MiB of memory, %.1f MiB of objects",
		p.Goroutines, p.Files, mib(p.Resident), mib(p.Heap))
}

func mib(n uint64) float64 { return float64(n) / (1 << 20) }

func latency(st control.Status) string {
	return fmt.Sprintf("latency p50 %.2f ms, p99 %.2f ms", st.Latency.P50/1000, st.Latency.P99/1000)
}

// conversation lets the last inside host and a peer talk until stop: the host sends from
// one port, the peer each time from a port that it has not used for half an hour.
func conversation(s *stage.Scene) (stop func() int) {
	s.T.Helper()
	phone, proxy := s.InsideSocket(churnHosts, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	pace := time.NewTicker(50 * time.Millisecond)
	s.T.Cleanup(pace.Stop)
	const ports = 50_000
	var answer func() error
	n := 0
	return s.Steady(func() error {
		<-pace.C
		if n%ports == 0 {
			answer = s.FreshPorts(phone, lab.PeerA, ext)
		}
		n++
		if _, err := phone.Contact(proxy); err != nil {
			return err
		}
		return answer()
	})
}
