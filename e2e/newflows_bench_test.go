package e2e

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// BenchmarkNewFlows measures the first packets of flows from inside, each with a permission of
// its own, through gateways on which conenatd runs: the CPU time of the sending thread, which
// carries each packet through its gateway, and that of the daemon. The baseline is a gateway
// without conenatd; it pays for events, too, because the kernel builds them while anybody on
// the machine listens. Rounds go to the gateways in turns, so ratios are of neighbouring
// rounds.
func BenchmarkNewFlows(b *testing.B) {
	const flows, rounds = 4000, 20
	type arm struct {
		name  string
		l     *lab.Lab
		d     *lab.Daemon
		f     *lab.Flood
		sent  []float64     // ns of the sender for each flow, by round
		began time.Duration // CPU time of the daemon before the first round
	}
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	var arms []*arm
	for _, a := range []struct {
		name string
		args []string
	}{
		{"stock", nil},
		{"stock again, for the noise", nil},
		{"nft, events all", slices.Concat(stage.NFT, []string{"--events=all"})},
		{"nft, events lean", slices.Concat(stage.NFT, []string{"--events=lean"})},
		{"auto, events lean", slices.Concat(stage.Auto, []string{"--events=lean"})},
		{"nft, without learning", stage.NFTByEvent},
	} {
		x := &arm{name: a.name, l: lab.ForTest(b, lab.Options{})}
		if a.args != nil {
			var err error
			x.d, err = x.l.StartDaemon(stage.Exe(), stage.Flags(a.args, "--learn-rate=100000", "--max-permissions-per-host=0")...)
			must(err)
			b.Cleanup(func() { must(x.d.Stop()) })
			must(pin(x.d.PID(), 0))
			want := "all"
			if slices.Contains(a.args, "--events=lean") {
				want = "lean"
			}
			for mode := ""; mode != want; {
				st, err := control.Dial(x.d.Socket).Status(b.Context())
				must(err)
				mode = st.Events.Mode
			}
			x.began = cpuTime(b, x.d.PID())
		}
		var err error
		x.f, err = x.l.NewFlood(flows, true)
		must(err)
		b.Cleanup(func() { must(x.f.Close()) })
		arms = append(arms, x)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var last unix.CPUSet
	last.Set(runtime.NumCPU() - 1)
	must(unix.SchedSetaffinity(0, &last))
	for b.Loop() {
		for r := range rounds {
			for k := range arms {
				x := arms[(k+r)%len(arms)]
				for i := range flows {
					x.f.Aim(i, netip.AddrPortFrom(x.l.Inside(0).Addr, uint16(10_000+i)), netip.AddrPortFrom(stage.Peer(r), 5060))
				}
				began := sendersTime(b)
				must(x.f.Send(0, flows))
				x.sent = append(x.sent, float64(sendersTime(b)-began)/flows)
			}
		}
		fmt.Printf("new flows, %d rounds of %d\n", rounds, flows)
		for _, x := range arms {
			ratios := slices.Clone(x.sent)
			for i := range ratios {
				ratios[i] /= arms[0].sent[i]
			}
			fmt.Printf("  %-28s %6.0f ns, ratio %s", x.name, slices.Sorted(slices.Values(x.sent))[rounds/2], spread(ratios))
			if x.d != nil {
				st, err := control.Dial(x.d.Socket).Status(b.Context())
				must(err)
				fmt.Printf(", daemon %.0f ns, %d MiB", float64(cpuTime(b, x.d.PID())-x.began)/(rounds*flows), st.Process.Resident>>20)
			}
			fmt.Println()
		}
	}
}

func sendersTime(b *testing.B) time.Duration {
	b.Helper()
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}
