package e2e

import (
	"flag"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

var (
	manyPermissions = flag.Int("permissions", 100_000, "how many permissions BenchmarkPermissions makes")
	manyIdle        = flag.Duration("permissions.idle", time.Minute, "how long it watches the daemon at rest")
	manyEvents      = flag.String("permissions.events", "auto", "its --events")
)

// BenchmarkPermissions measures a daemon whose kernel learned many permissions, each from a
// flow of its own: memory, CPU at rest, status, list, revoke, start after kill -9, and stop.
//
// A network namespace has at most nf_conntrack_max flows of the initial one. If that is less
// than the permissions, flows come in waves: those of a wave end before the next one begins,
// their permissions stay. The flows of the last wave live on.
func BenchmarkPermissions(b *testing.B) {
	const ports, hosts, lifetime = stage.Peers, 200, time.Hour
	n, idle := *manyPermissions, *manyIdle
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		l := lab.ForTest(b, lab.Options{Inside: 1, Rules: lab.Masquerade + lab.DropPolicy})
		must(l.NFT("insert rule inet filter forward ct status dnat accept"))
		s, err := l.Gateway.Sysctl("net.netfilter.nf_conntrack_max")
		must(err)
		most, err := strconv.Atoi(s)
		must(err)
		wave := n
		if limit := most * 9 / 10; n > limit {
			waves := (n + limit - 1) / limit
			wave = (n + waves - 1) / waves
		}
		socket := filepath.Join(b.TempDir(), "control.sock") // the same before and after the kill
		args := stage.Flags(stage.NFT, "--events="+*manyEvents, "--lifetime="+lifetime.String(), "--learn-rate=100000",
			"--max-permissions-per-host=0", "--event-buffer=67108864", "--control-socket="+socket)
		d, err := l.StartDaemon(stage.Exe(), args...)
		must(err)
		status := func() control.Status {
			st, err := control.Dial(socket).Status(b.Context())
			must(err)
			return st
		}
		took := func(f func()) time.Duration {
			began := time.Now()
			f()
			return time.Since(began)
		}
		until := func(what string, cond func(st control.Status) bool) {
			b.Helper()
			var st control.Status
			for end := time.Now().Add(10 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
				if st = status(); cond(st) {
					return
				}
				if time.Now().After(end) {
					b.Fatalf("not %s: %+v, %d flows\n%s", what, st.Permissions, st.Flows, d.Output())
				}
			}
		}
		row := func(format string, args ...any) { fmt.Printf("  "+format+"\n", args...) }
		fmt.Printf("%d permissions, nft, events %s, %d flows at once\n", n, *manyEvents, wave)

		f, err := l.NewFlood(wave, true)
		must(err)
		cpu := cpuTime(b, d.PID())
		filled := took(func() {
			for first := 0; first < n; first += wave {
				last := min(first+wave, n)
				for i := first; i < last; i++ {
					port := i / ports
					host := l.Inside(0).Addr.As4()
					host[3] = byte(10 + port%hosts)
					f.Aim(i-first, netip.AddrPortFrom(netip.AddrFrom4(host), uint16(1024+port)), netip.AddrPortFrom(stage.Peer(i%ports), 9))
				}
				if first > 0 {
					must(l.Flush())
				}
				must(l.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "3600"))
				again := 0
				until(fmt.Sprintf("%d stand", last), func(st control.Status) bool {
					if st.Permissions.Standing >= last {
						return true
					}
					if again%50 == 0 { // a busy machine loses packets
						for at := 0; at < last-first; at += 2000 {
							must(f.Send(at, min(at+2000, last-first)))
						}
					}
					again++
					return false
				})
			}
		})
		must(f.Close())
		used := cpuTime(b, d.PID()) - cpu
		row("filled in %v, %.0f us of the daemon each", filled.Round(time.Second), float64(used.Microseconds())/float64(n))
		st := status()
		row("standing %d, flows %d, overruns %d, resident %d MB", st.Permissions.Standing, st.Flows, st.Events.Overruns, residentMemory(b, d.PID())>>20)

		var slowest time.Duration
		cpu = cpuTime(b, d.PID())
		for end := time.Now().Add(idle); time.Now().Before(end); time.Sleep(time.Second) {
			slowest = max(slowest, took(func() { status() }))
		}
		used = cpuTime(b, d.PID()) - cpu
		row("idle for %v: %.1f %% of a core, slowest status %v, resident %d MB", idle,
			100*used.Seconds()/idle.Seconds(), slowest.Round(time.Millisecond), residentMemory(b, d.PID())>>20)

		var listed int
		var first time.Duration
		before := residentMemory(b, d.PID())
		peak := before
		cpu = cpuTime(b, d.PID())
		began := time.Now()
		must(control.Dial(socket).Permissions(b.Context(), func(control.Permission) error {
			if listed == 0 {
				first = time.Since(began)
			}
			if listed++; listed%10_000 == 0 {
				peak = max(peak, residentMemory(b, d.PID()))
			}
			return nil
		}))
		row("list by the socket: %d in %v (first %v), %v of the daemon, %+d MB", listed, time.Since(began).Round(time.Millisecond),
			first.Round(time.Millisecond), cpuTime(b, d.PID())-cpu, (peak-before)>>20)
		whole := took(func() {
			out, err := l.Gateway.Output(stage.Exe(), "list", "--control-socket", socket)
			must(err)
			if lines := strings.Count(out, "\n"); lines < n {
				b.Errorf("%d lines of %d permissions", lines, n)
			}
		})
		row("conenatd list: %v", whole.Round(time.Millisecond))

		host := l.Inside(0).Addr.As4()
		host[3] = 10
		var revoked int
		long := took(func() {
			revoked, err = control.Dial(socket).Revoke(b.Context(), []control.Word{{Addrs: netip.PrefixFrom(netip.AddrFrom4(host), 32)}})
			must(err)
		})
		row("revoke by host: %d in %v", revoked, long.Round(time.Millisecond))

		must(d.Kill())
		answered := make(chan time.Duration, 1)
		began = time.Now()
		go func() {
			for {
				if _, err := control.Dial(socket).Status(b.Context()); err == nil || b.Context().Err() != nil {
					answered <- time.Since(began)
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
		}()
		d, err = l.StartDaemon(stage.Exe(), args...)
		must(err)
		ready := time.Since(began)
		until("adopted", func(st control.Status) bool { return st.Permissions.Standing >= n-revoked })
		row("after kill -9: status after %v, ready after %v, adopted after %v, %v of CPU, resident %d MB", (<-answered).Round(time.Millisecond), ready.Round(time.Millisecond),
			time.Since(began).Round(time.Millisecond), cpuTime(b, d.PID()), residentMemory(b, d.PID())>>20)
		row("stop: %v", took(func() { must(d.Stop()) }).Round(time.Millisecond))
	}
}
