package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// largeTime is how long each configuration or load runs: at least one reconcile.
const largeTime = 30 * time.Second

// statusesPerSecond is how often status is asked for, for as long as that again.
const statusesPerSecond = 20

// BenchmarkLarge measures large configurations and rulesets, and load from outside: how
// much CPU they take, how long a peer's first answer waits for a permission meanwhile, the
// slowest status, and the time for a reload and a stop.
//
// For each it prints the share of a CPU over largeTime, and these times. Statuses are asked for
// afterwards, under the same load, so they do not count for the CPU.
func BenchmarkLarge(b *testing.B) {
	const uplink = "via 198.51.100.254 dev wan0"
	list := func(n int, item func(i int) string) string {
		items := make([]string, n)
		for i := range items {
			items[i] = item(i)
		}
		return "[" + strings.Join(items, ", ") + "]\n"
	}
	prefixes := func(n int) string {
		return "exclude_peers = " + list(n, func(i int) string { return fmt.Sprintf(`"%d.%d.%d.0/24"`, 100+i/(1<<15), i>>7&0xff, i&0x7f<<1) })
	}
	ports := func(n int) string {
		return "exclude_ports = " + list(n, func(i int) string { return strconv.Itoa(1 + i) })
	}
	forwards := func(n int) string {
		var s strings.Builder
		s.WriteString("table ip busy { chain idle { }\nchain pre { type nat hook prerouting priority dstnat;\n")
		for i := range n {
			fmt.Fprintf(&s, "iifname wan0 udp dport %d dnat to %v\n", 5000+i, lab.InsideNet.Addr().Next().Next())
		}
		return s.String() + "}; }\n"
	}
	routes := func(n int) string {
		var s strings.Builder
		for i := range n {
			fmt.Fprintf(&s, "route add %d.%d.%d.0/24 %s\n", 100+i/(1<<15), i>>7&0xff, i&0x7f<<1, uplink)
		}
		return s.String()
	}
	route := func(l *lab.Lab, i int) error {
		_, err := l.Gateway.Output("ip", "route", []string{"add", "del"}[i%2], "99.0.0.0/24", "via", "198.51.100.254", "dev", "wan0")
		return err
	}
	outside := lab.OutsideNet.Addr().Next()
	served, forwarded := netip.AddrPortFrom(outside, 4000), netip.AddrPortFrom(outside, 5000)
	others := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{60, byte(i >> 16), byte(i >> 8), byte(i)}), 10_000)
	}
	toPort := func(p netip.AddrPort) *load {
		return &load{packets: 1 << 20, times: 100, each: 200, aim: func(i int) (from, to netip.AddrPort) { return others(i), p }}
	}
	var addresses, dmz strings.Builder
	var scanned [4]netip.Addr
	dmz.WriteString("table ip busy { chain pre { type nat hook prerouting priority dstnat;\n")
	for i := range scanned {
		scanned[i] = netip.AddrFrom4([4]byte{198, 51, 100, byte(100 + i)})
		fmt.Fprintf(&addresses, "addr add %v/24 dev wan0\n", scanned[i])
		fmt.Fprintf(&dmz, "ip daddr %v dnat to %v\n", scanned[i], lab.InsideNet.Addr().Next().Next())
	}
	dmz.WriteString("}; }\n")
	scan := &load{packets: len(scanned) << 16, times: 100, each: 50, aim: func(i int) (from, to netip.AddrPort) {
		return netip.AddrPortFrom(lab.PeerB, 10_000), netip.AddrPortFrom(scanned[i%len(scanned)], uint16(i/len(scanned)))
	}}
	bursts := &load{packets: 1 << 16, times: 1, each: 300, inside: true, aim: func(i int) (from, to netip.AddrPort) {
		return netip.AddrPort{}, others(i)
	}}
	const foreign = "add rule ip busy idle udp dport 9 accept; flush chain ip busy idle"
	nft := func(l *lab.Lab, _ int) error { return l.NFT(foreign) }
	for _, n := range []struct {
		name              string
		config, rules, ip string
		permissions       int
		change            func(l *lab.Lab, i int) error
		perSecond         int
		load              *load
		flags             string
	}{
		{name: "nothing"},
		{name: "20,000 excluded prefixes", config: prefixes(20_000), flags: "--learn"},
		{name: "60,000 excluded ports", config: ports(60_000), flags: "--learn"},
		{name: "36,000 permissions", permissions: 36_000},
		{name: "36,000 permissions, 5,000 forwards, 4 transactions", permissions: 36_000, rules: forwards(5000), change: nft, perSecond: 4},
		{name: "50,000 routes, 10 changes", ip: routes(50_000), change: route, perSecond: 10},
		{name: "200,000 routes, 10 changes", ip: routes(200_000), change: route, perSecond: 10},
		{name: "20,000 packets to a served port", load: toPort(served)},
		{name: "20,000 packets to a served port, no guard", load: toPort(served), flags: "--guard=false"},
		{name: "20,000 packets to a forwarded port", load: toPort(forwarded), rules: forwards(1)},
		{name: "20,000 packets to a port forwarded for some sources", load: toPort(forwarded), rules: strings.ReplaceAll(forwards(1), "udp dport", "ip saddr != 45.0.0.0/16 udp dport")},
		{name: "20,000 packets to a port forwarded with another condition", load: toPort(forwarded), rules: strings.ReplaceAll(forwards(1), "udp dport", "ip ttl 1-255 udp dport")},
		{name: "a scan of four addresses that are forwarded as a whole", load: scan, ip: addresses.String(), rules: dmz.String()},
		{name: "an overrun each second", load: bursts, config: "event_buffer = 65536\n"},
	} {
		b.Run(n.name, func(b *testing.B) {
			must := func(err error) {
				b.Helper()
				if err != nil {
					b.Fatal(err)
				}
			}
			l := lab.ForTest(b, lab.Options{Inside: 2, Rules: lab.Masquerade + lab.DropPolicy})
			must(l.NFT("insert rule inet filter forward ct status dnat accept; insert rule inet filter input udp dport 4000 accept"))
			if n.rules != "" {
				must(l.NFT(n.rules))
			}
			for lines := range slices.Chunk(slices.Collect(strings.Lines(n.ip)), 10_000) { // the program may run for half a minute
				batch := filepath.Join(b.TempDir(), "batch")
				must(os.WriteFile(batch, []byte(strings.Join(lines, "")), 0o600))
				_, err := l.Gateway.Output("ip", "-batch", batch)
				must(err)
			}
			config := filepath.Join(b.TempDir(), "conenatd.toml")
			must(os.WriteFile(config, []byte(n.config+"[[subnet]]\nprefix = \""+lab.InsideNet.String()+"\"\n"), 0o600))
			peer, err := l.Outside.Socket(lab.PeerA, 5060)
			must(err)
			defer peer.Close()
			answer, err := l.Outside.Socket(lab.PeerA, 5070)
			must(err)
			defer answer.Close()
			if n.load != nil { // a service was there before
				for _, at := range []struct {
					host *lab.Host
					to   netip.AddrPort
				}{{l.Gateway, served}, {l.Inside(0), netip.AddrPortFrom(l.Inside(0).Addr, forwarded.Port())}} {
					s, err := at.host.Socket(at.to.Addr(), at.to.Port())
					must(err)
					defer s.Close()
				}
			}
			began := time.Now()
			d, err := l.StartDaemon(stage.Exe(), append([]string{"--config", config, "--learn=false", "--lifetime", "1h", "--max-permissions-per-host=0"}, strings.Fields(n.flags)...)...)
			must(err)
			start := time.Since(began)
			if n.permissions > 0 {
				fill(b, l, d, n.permissions)
			}
			for b.Loop() {
				stop := everySecond(n.perSecond, func(i int) error { return n.change(l, i) })
				flood := func() error { return nil }
				if n.load != nil {
					flood = n.load.start(b, l, d)
				}
				memory := residentMemory(b, d.PID())
				_, share, took := waits(b, l, d, peer, answer, largeTime)
				grown := residentMemory(b, d.PID()) - memory
				statuses := statusTimes(b, d, largeTime)
				must(stop())
				must(flood())
				st, err := control.Dial(d.Socket).Status(b.Context())
				must(err)
				began := time.Now()
				must(control.Dial(d.Socket).Reload(b.Context()))
				reload := time.Since(began)
				const round = time.Millisecond
				fmt.Printf("%-52s %5.1f %% of a CPU, RSS %d MB and %+d MB, start %v, reload %v, %d overruns, %d lines\n%s\n%s\n",
					n.name, share, memory>>20, grown>>20, start.Round(round), reload.Round(round),
					st.Events.Overruns, strings.Count(d.Output(), "\n"), "  first answers: "+distribution(took), "  statuses: "+distribution(statuses))
				b.ReportMetric(share, "%CPU")
			}
			began = time.Now()
			must(d.Stop())
			fmt.Printf("%-52s stop %v\n", "", time.Since(began).Round(time.Millisecond))
		})
	}
}

// statusTimes returns how long each status took that was asked for in some time.
func statusTimes(b *testing.B, d *lab.Daemon, length time.Duration) (took []time.Duration) {
	b.Helper()
	pace := time.NewTicker(time.Second / statusesPerSecond)
	defer pace.Stop()
	for end := time.Now().Add(length); time.Now().Before(end); <-pace.C {
		began := time.Now()
		if _, err := control.Dial(d.Socket).Status(b.Context()); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	return took
}

// everySecond calls f n times a second until stop.
func everySecond(n int, f func(i int) error) (stop func() error) {
	if n == 0 {
		return func() error { return nil }
	}
	end, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		pace := time.NewTicker(time.Second / time.Duration(n))
		defer pace.Stop()
		for i := 0; ; i++ {
			select {
			case <-end:
				ended <- nil
				return
			case <-pace.C:
			}
			if err := f(i); err != nil {
				ended <- err
				return
			}
		}
	}()
	return func() error {
		close(end)
		return <-ended
	}
}

// A load sends packets in turn: each packets at a time, times a second.
type load struct {
	packets, times, each int
	aim                  func(i int) (from, to netip.AddrPort)
	// inside sends the packets from the first inside host, whatever aim says, and pauses
	// the daemon during each burst.
	inside bool
}

func (w *load) start(b *testing.B, l *lab.Lab, d *lab.Daemon) (stop func() error) {
	b.Helper()
	f, err := l.NewFlood(w.packets, w.inside)
	if err != nil {
		b.Fatal(err)
	}
	for i := range f.Len() {
		from, to := w.aim(i)
		if w.inside {
			from = netip.AddrPortFrom(l.Inside(0).Addr, 40_000)
		}
		f.Aim(i, from, to)
	}
	at := 0
	end := everySecond(w.times, func(int) error {
		if at+w.each > f.Len() {
			at = 0
		}
		at += w.each
		if !w.inside {
			return f.Send(at-w.each, at)
		}
		return errors.Join(d.Pause(), f.Send(at-w.each, at), d.Resume())
	})
	return func() error {
		defer f.Close()
		return end()
	}
}

// residentMemory returns the RSS of a process in bytes.
func residentMemory(b *testing.B, pid int) int64 {
	b.Helper()
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(statm))[1], 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}
