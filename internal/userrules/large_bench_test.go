package userrules_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// cpuTime is the CPU time of this process.
func cpuTime(b *testing.B) time.Duration {
	var t unix.Timespec
	check(b, unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t))
	return time.Duration(t.Nano())
}

// Services in a verdict map, as kube-proxy has them, and forwards behind rules that exempt sources.
func BenchmarkLargeRulesets(b *testing.B) {
	services := func(n int) string {
		var chains, elements strings.Builder
		for i := range n {
			fmt.Fprintf(&chains, "chain s%d { meta l4proto udp dnat to 10.244.%d.%d:53; }\n", i, i/250, 1+i%250)
			fmt.Fprintf(&elements, "10.96.%d.%d . udp . 53 : goto s%d,\n", i/250, 1+i%250, i)
		}
		return chains.String() + "map m { type ipv4_addr . inet_proto . inet_service : verdict; elements = { " + elements.String() +
			"}; }; @@ ip daddr . meta l4proto . th dport vmap @m; }"
	}
	exempted := func(n int) string {
		var s strings.Builder
		for i := range 60 {
			fmt.Fprintf(&s, "ip saddr 10.%d.0.0/16 ip daddr 198.51.100.%d udp dport %d-40000 accept\n", i, i, 1000+2*i)
		}
		for i := range n {
			fmt.Fprintf(&s, "iifname wan0 udp dport %d dnat to 10.47.%d.%d\n", 5000+i, i/250, 1+i%250)
		}
		return "@@ " + s.String() + "}"
	}
	spared := func(n int) string { // an accepting rule before each
		var s strings.Builder
		for i := range n {
			fmt.Fprintf(&s, "iifname wan0 udp dport %d accept\niifname wan0 udp dport %d dnat to 10.47.%d.%d\n", 30_001+2*i, 5000+i, i/250, 1+i%250)
		}
		return "@@ " + s.String() + "}"
	}
	links := []userrules.Link{{Index: 2, Name: "wan0"}}
	sides := userrules.Sides{Inside: []userrules.Link{{Index: 3, Name: "lan0"}}, Outside: links, Subnets: []netip.Prefix{lab.InsideNet}}
	for _, n := range []int{5000, 10_000} {
		for name, rules := range map[string]string{"services": services(n), "exempted": exempted(n), "spared": spared(n)} {
			l := lab.ForTest(b, lab.Options{Rules: inPrerouting(rules)})
			rs, err := newReader(b, l).Read()
			check(b, err)
			for question, ask := range map[string]func(){
				"forwards":   func() { rs.Forwards(links) },
				"diversions": func() { new(userrules.Diverter).Diversions(rs, sides) },
			} {
				b.Run(fmt.Sprint(name, "/", n, "/", question), func(b *testing.B) {
					began := cpuTime(b)
					for b.Loop() {
						ask()
					}
					b.ReportMetric(float64(cpuTime(b)-began)/1e6/float64(b.N), "ms-CPU/op")
				})
			}
		}
	}
}
