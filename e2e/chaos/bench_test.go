package chaos

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

const (
	scanRate   = 5000 // packets a second, each a new flow
	scanTick   = 10 * time.Millisecond
	scanRounds = 9  // of each arm
	contacts   = 50 // in a round; all rounds together stay below the limit for one host
)

// BenchmarkHostileInside measures how long other hosts wait while an inside host scans:
// from the arrival of another host's first packet at its peer to the arrival of the first
// answer from another port, which the peer sends without pause. Rounds with a scan
// alternate with rounds in which a host that is not enabled sends the same packets, so
// only conenatd's work differs.
func BenchmarkHostileInside(b *testing.B) {
	for _, mode := range modes {
		b.Run(fmt.Sprint(mode), func(b *testing.B) {
			for b.Loop() {
				hostileInside(b, mode)
			}
		})
	}
}

func hostileInside(b *testing.B, mode []string) {
	b.Helper()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	l := lab.ForTest(b, lab.Options{Inside: 2, Rules: lab.Masquerade})
	must(l.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "5"))
	// The scanned peers must be silent: an ICMP error for each packet would be measured
	// too.
	_, err := l.Outside.Output("nft", "table ip silent { chain c { type filter hook prerouting priority raw; udp dport 9 drop; }; }")
	must(err)
	enabled := netip.PrefixFrom(l.Inside(1).Addr, 32)
	attacker := l.Inside(0).Addr
	d, err := l.StartDaemon(stage.Exe(), append([]string{
		"--subnet", enabled.String(), "--subnet", netip.PrefixFrom(attacker, 32).String(), "--max-permissions-per-host=1000", "--log-level=error",
	}, mode...)...)
	must(err)
	b.Cleanup(func() { must(d.Stop()) })
	peer, err := l.Outside.Socket(lab.PeerA, 5060)
	must(err)
	answer, err := l.Outside.Socket(lab.PeerA, 5070)
	must(err)

	const perTick = int(scanRate * scanTick / time.Second)
	scan, err := l.NewFlood(perTick, true)
	must(err)
	b.Cleanup(func() { must(scan.Close()) })
	sent, port := 0, uint16(10_000)
	// arm returns how long each contact waited while source sends the packets of the
	// scan.
	arm := func(source netip.Addr) (took []time.Duration) {
		end, ended := make(chan struct{}), make(chan error, 1)
		go func() {
			t := time.NewTicker(scanTick)
			defer t.Stop()
			for {
				select {
				case <-end:
					ended <- nil
					return
				case <-t.C:
				}
				for i := range perTick {
					scan.Aim(i, netip.AddrPortFrom(source, uint16(1024+sent/stage.Peers%60_000)), netip.AddrPortFrom(stage.Peer(sent%stage.Peers), 9))
					sent++
				}
				if err := scan.Send(0, perTick); err != nil {
					ended <- err
					return
				}
			}
		}()
		pace := time.NewTicker(scanTick / 2) // at varying offsets to the scan's ticks
		defer pace.Stop()
		for range contacts {
			<-pace.C
			port++
			in, err := l.Inside(1).Socket(l.Inside(1).Addr, port)
			must(err)
			wait, err := stage.FirstAnswer(in, peer, answer)
			must(err)
			took = append(took, wait)
			must(in.Close())
		}
		close(end)
		must(<-ended)
		return took
	}
	other := netip.MustParseAddr("10.47.11.111") // in no enabled subnet
	var medians, nineties []float64
	for i := range scanRounds {
		var quiet, loud []time.Duration
		if i%2 == 0 {
			quiet, loud = arm(other), arm(attacker)
		} else {
			loud, quiet = arm(attacker), arm(other)
		}
		slices.Sort(quiet)
		slices.Sort(loud)
		medians = append(medians, float64(loud[contacts/2])/float64(quiet[contacts/2]))
		nineties = append(nineties, float64(loud[contacts*9/10])/float64(quiet[contacts*9/10]))
		b.Logf("p50 %v and %v, p90 %v and %v", quiet[contacts/2], loud[contacts/2], quiet[contacts*9/10], loud[contacts*9/10])
	}
	slices.Sort(medians)
	slices.Sort(nineties)
	fmt.Printf("scan / the same packets of a host that is not enabled: p50 %.2f (%.2f to %.2f), p90 %.2f (%.2f to %.2f)\n",
		medians[scanRounds/2], medians[0], medians[scanRounds-1], nineties[scanRounds/2], nineties[0], nineties[scanRounds-1])
	b.ReportMetric(medians[scanRounds/2], "p50-ratio")
}
