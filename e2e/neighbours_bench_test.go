package e2e

import (
	"bytes"
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

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// neighboursTime is how long each neighbour runs: at least one reconcile. Before, the load of the
// start ends, which settling is for.
const (
	neighboursTime = 30 * time.Second
	settling       = 8 * time.Second
)

// BenchmarkBusyNeighbours measures how much CPU the daemon takes, and how long a peer's
// first answer waits for a permission, while others keep changing rules, links and routes.
// The kernel learns nothing, so the daemon grants each permission.
//
// For each neighbour it prints the share of a CPU over neighboursTime, these times, and how
// long a minimal transaction of another program takes meanwhile.
func BenchmarkBusyNeighbours(b *testing.B) {
	const (
		uplink  = "via 198.51.100.254 dev wan0"
		foreign = "add rule ip busy idle udp dport 9 accept; flush chain ip busy idle"
	)
	rules := func(n int) string {
		var s strings.Builder
		s.WriteString("table ip busy { chain idle { }\n")
		for i := range n {
			fmt.Fprintf(&s, "chain s%d { udp dport %d dnat to 172.18.%d.%d; }\n", i, 20000+i, i/250, 1+i%250)
		}
		s.WriteString("chain pre { type nat hook prerouting priority dstnat;\n")
		for i := range n {
			fmt.Fprintf(&s, "ip daddr 10.96.%d.%d udp dport 53 jump s%d\n", i/250, 1+i%250, i)
		}
		return s.String() + "}; }\n"
	}
	services := func(n int) string {
		var s, elements strings.Builder
		s.WriteString("table ip busy { chain idle { }\n")
		for i := range n {
			fmt.Fprintf(&s, "chain s%d { meta l4proto udp dnat to 172.18.%d.%d; }\n", i, i/250, 1+i%250)
			fmt.Fprintf(&elements, "10.96.%d.%d . udp . 53 : goto s%d,\n", i/250, 1+i%250, i)
		}
		fmt.Fprintf(&s, "map m { type ipv4_addr . inet_proto . inet_service : verdict; elements = { %s }; }\n", &elements)
		return s.String() + "chain pre { type nat hook prerouting priority dstnat; ip daddr . meta l4proto . th dport vmap @m; }; }\n"
	}
	routes := func(n int) string {
		var s strings.Builder
		for i := range n {
			fmt.Fprintf(&s, "route add %d.%d.%d.0/24 %s\n", 100+i/(1<<15), i>>7&0xff, i&0x7f<<1, uplink)
		}
		return s.String()
	}
	noDefault := "route del default\nroute add 203.0.113.0/24 " + uplink + "\nroute add 192.0.2.0/24 " + uplink + "\n"
	flap := func(up, down string) func(l *lab.Lab, i int) error {
		return func(l *lab.Lab, i int) error {
			_, err := l.Gateway.Output("ip", strings.Fields([]string{up, down}[i%2])...)
			return err
		}
	}
	nft := func(l *lab.Lab, _ int) error { return l.NFT(foreign) }
	for _, n := range []struct {
		name        string
		rules, ip   string // run before the start, by nft and "ip -batch"
		permissions int
		change      func(l *lab.Lab, i int) error // nil: nothing
		perSecond   int
	}{
		{name: "nothing"},
		{name: "20 transactions", rules: rules(0), change: nft, perSecond: 20},
		{name: "20 transactions, 10,000 NAT rules", rules: rules(5000), change: nft, perSecond: 20},
		{name: "20 transactions, 10,000 services in a map", rules: services(10_000), change: nft, perSecond: 20},
		{name: "20 transactions, 10,000 NAT rules, 50,000 permissions", rules: rules(5000), permissions: 50_000, change: nft, perSecond: 20},
		{name: "10 of a link without address", ip: "link add idle0 type bridge\n", change: flap("link set idle0 up", "link set idle0 down"), perSecond: 10},
		{
			name: "10 of a link with an address", ip: "link add idle0 type bridge\naddr add 10.48.0.1/24 dev idle0\n",
			change: flap("link set idle0 up", "link set idle0 down"), perSecond: 10,
		},
		{
			name: "10 of a link with an address, 50,000 permissions", ip: "link add idle0 type bridge\naddr add 10.48.0.1/24 dev idle0\n",
			permissions: 50_000, change: flap("link set idle0 up", "link set idle0 down"), perSecond: 10,
		},
		{name: "10 of a route, 50,000 routes", ip: routes(50_000), change: flap("route add 99.0.0.0/24 "+uplink, "route del 99.0.0.0/24"), perSecond: 10},
		{
			name: "10 of a route, 50,000 routes, no default", ip: routes(50_000) + noDefault,
			change: flap("route add 99.0.0.0/24 "+uplink, "route del 99.0.0.0/24"), perSecond: 10,
		},
	} {
		b.Run(n.name, func(b *testing.B) {
			must := func(err error) {
				b.Helper()
				if err != nil {
					b.Fatal(err)
				}
			}
			l := lab.ForTest(b, lab.Options{Inside: 2, Rules: lab.Masquerade + lab.DropPolicy})
			must(l.NFT("insert rule inet filter forward ct status dnat accept"))
			if n.rules != "" {
				must(l.NFT(n.rules))
			}
			if n.ip != "" {
				batch := filepath.Join(b.TempDir(), "batch")
				must(os.WriteFile(batch, []byte(n.ip), 0o600))
				_, err := l.Gateway.Output("ip", "-batch", batch)
				must(err)
			}
			peer, err := l.Outside.Socket(lab.PeerA, 5060)
			must(err)
			defer peer.Close()
			answer, err := l.Outside.Socket(lab.PeerA, 5070)
			must(err)
			defer answer.Close()
			d, err := l.StartDaemon(stage.Exe(), "--subnet", lab.InsideNet.String(), "--outside", "wan0", "--learn=false",
				"--lifetime", "1h", "--max-permissions-per-host=0")
			must(err)
			if n.permissions > 0 {
				fill(b, l, d, n.permissions)
			}
			for b.Loop() {
				changes := 0
				stop := everySecond(n.perSecond, func(i int) error {
					changes++
					return n.change(l, i)
				})
				start, share, took := waits(b, l, d, peer, answer, neighboursTime)
				bare := bareTransactions(b, l)
				must(stop())
				fmt.Printf("%-56s %5.1f %% of a CPU, %v until %v after the start, %d changes; %s\n%56s bare transactions: %s\n",
					n.name, share, start, settling, changes, distribution(took), "", distribution(bare))
				b.ReportMetric(share, "%CPU")
			}
			must(d.Stop())
		})
	}
}

// waits lets an inside host contact a peer again and again, each time from a fresh port. It
// returns the CPU time that the daemon took before, while it settled, its share of a CPU meanwhile, in
// percent, and for each contact how long the first answer from another port took.
func waits(b *testing.B, l *lab.Lab, d *lab.Daemon, peer, answer *lab.Socket, lasting time.Duration) (start time.Duration, share float64, took []time.Duration) {
	b.Helper()
	time.Sleep(settling)
	start = cpuTime(b, d.PID())
	began := time.Now()
	for port := uint16(62_000); time.Since(began) < lasting; port++ {
		in, err := l.Inside(1).Socket(l.Inside(1).Addr, port)
		if err != nil {
			b.Fatal(err)
		}
		t, err := stage.FirstAnswer(in, peer, answer)
		if err != nil {
			b.Fatal(err)
		}
		in.Close()
		took = append(took, t)
		time.Sleep(100 * time.Millisecond)
	}
	cpu := cpuTime(b, d.PID()) - start
	return start, 100 * cpu.Seconds() / time.Since(began).Seconds(), took
}

// bareTransactions adds elements to a set that nothing else uses, and returns how long the
// kernel took for each: the least time that any program waits to make a permission. The
// daemon sees them as changes by others, so they must not count in its share.
func bareTransactions(b *testing.B, l *lab.Lab) (took []time.Duration) {
	b.Helper()
	if err := l.NFT("table ip bare { set s { type inet_service; flags timeout; }; }"); err != nil {
		b.Fatal(err)
	}
	c, err := nfnl.Dial(l.Gateway.FD())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	var e nfnl.Encoder
	for port := range uint16(100) {
		e.Reset()
		seq := c.NextSeq(3)
		e.BeginTransaction(unix.NFNL_SUBSYS_NFTABLES, seq)
		e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_REQUEST|unix.NLM_F_CREATE, seq+1, unix.AF_INET)
		e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, "bare")
		e.Str(unix.NFTA_SET_ELEM_LIST_SET, "s")
		list := e.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		element := e.Nest(unix.NFTA_LIST_ELEM)
		key := e.Nest(unix.NFTA_SET_ELEM_KEY)
		e.BE16(unix.NFTA_DATA_VALUE, port)
		e.EndNest(key)
		e.EndNest(element)
		e.EndNest(list)
		e.End()
		e.EndTransaction(unix.NFNL_SUBSYS_NFTABLES, seq+2)
		var refused error
		began := time.Now()
		err := c.Exchange(&e, func(_ uint32, err error) { refused = err }, nil)
		if err = errors.Join(err, refused); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
		time.Sleep(100 * time.Millisecond)
	}
	return took
}

func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func distribution(took []time.Duration) string {
	slices.Sort(took)
	us := func(q float64) float64 { return float64(quantile(took, q)) / 1e3 }
	return fmt.Sprintf("n=%d  p10 %.1f  p50 %.1f  p90 %.1f  p99 %.1f  p99.9 %.1f  max %.1f us",
		len(took), us(0.1), us(0.5), us(0.9), us(0.99), us(0.999), us(1))
}

// cpuTime returns the CPU time of a process from proc(5).
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	var ticks int
	for _, f := range fields[11:13] {
		n, err := strconv.Atoi(string(f))
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100 // USER_HZ
}

// fill makes n permissions of the first inside host, and waits until they stand and their
// flows have ended, so that the end of flows is not measured.
func fill(b *testing.B, l *lab.Lab, d *lab.Daemon, n int) {
	b.Helper()
	const ports = 500
	f, err := l.NewFlood(n, true)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for i := range n {
		f.Aim(i, netip.AddrPortFrom(l.Inside(0).Addr, uint16(30_000+i%ports)), netip.AddrPortFrom(stage.Peer(i/ports), 9))
	}
	standing, flows := 0, n
	for end := time.Now().Add(4 * time.Minute); standing < n || flows > n/100; {
		if time.Now().After(end) {
			b.Fatalf("%d of %d permissions stand, with %d flows", standing, n, flows)
		}
		for at := 0; at < n && standing < n; at += 2000 {
			if err := f.Send(at, min(at+2000, n)); err != nil {
				b.Fatal(err)
			}
		}
		st, err := control.Dial(d.Socket).Status(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		standing, flows = st.Permissions.Standing, st.Flows
		time.Sleep(100 * time.Millisecond)
	}
}
