package rules_test

import (
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// standard is the daemon's default.
var standard = rules.Desired{
	OutsideLinks: []string{"wan0"}, Subnets: []netip.Prefix{lab.InsideNet}, Guard: true, Spoofed: true,
	Map: &rules.MapConfig{
		Size: 1 << 20, Lifetime: time.Hour, MaxChildren: 256, Learn: true, LearnRate: 200,
		Subnets:          []netip.Prefix{lab.InsideNet},
		ExcludePeerPorts: []uint16{53, 123, 443},
	},
}

var (
	benchExt = netip.MustParseAddrPort("198.51.100.1:5060")
	benchInt = netip.MustParseAddrPort("10.47.11.109:5060")
)

// stranger returns the address of one of 4 million peers (RFC 6598).
func stranger(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{100, 64 | byte(i>>16)&63, byte(i >> 8), byte(i)})
}

func strangers(first, n int) (ps []cone.Permission) {
	for i := range n {
		ps = append(ps, permission(benchExt, benchInt, stranger(first+i)))
	}
	return ps
}

// An arm is one of the set-ups that are measured side by side.
type arm struct {
	name string
	*flood
	// begin prepares a round, over checks that all went well.
	begin func(round int)
	over  func(sent int) bool

	took time.Duration
	cost []float64 // ns a packet, for each round
}

// newArm makes a lab for an arm, without conntrack events: a listener in any network namespace
// of the machine would cost packets here.
func newArm(tb testing.TB, name string, o lab.Options, packets int) *arm {
	tb.Helper()
	a := &arm{name: name, flood: newFlood(tb, lab.ForTest(tb, o), packets)}
	must(tb, a.Gateway.SetSysctl("net.netfilter.nf_conntrack_events", "0"))
	a.begin = func(int) {}
	return a
}

// carry makes conenatd's tables carry the arm's packets.
func (a *arm) carry(tb testing.TB, d rules.Desired) (*rules.Tables, *elements.Map) {
	tb.Helper()
	t, err := rules.Open(rules.Config{NetNS: a.Gateway.FD()})
	must(tb, err)
	tb.Cleanup(func() { must(tb, t.Close()) })
	_, err = t.Set(d)
	must(tb, err)
	if d.Map == nil {
		return t, nil
	}
	return t, t.NewMap(d.Map)
}

func grantAll(tb testing.TB, m *elements.Map, ps []cone.Permission) {
	tb.Helper()
	m.Grant(ps, func(i int, r cone.Reason, err error) { tb.Fatal(ps[i], r, err) })
}

// race measures the arms in turns, a part of their packets at a time, for some rounds. The
// order within a round changes. It returns how many rounds were void because packets got
// lost.
func race(tb testing.TB, arms []*arm, rounds, parts int) (void int) {
	tb.Helper()
	runtime.GC()
	for r := range rounds {
		for _, a := range arms {
			a.begin(r)
			a.took = 0
		}
		for p := range parts {
			for k := range arms {
				a := arms[(k+p+r)%len(arms)]
				n := a.Len()
				a.took += a.send(tb, p*n/parts, (p+1)*n/parts)
			}
		}
		good := true
		for _, a := range arms {
			good = a.over(a.Len()) && good
			must(tb, a.Flush())
		}
		if !good {
			void++
			continue
		}
		for _, a := range arms {
			a.cost = append(a.cost, float64(a.took.Nanoseconds())/float64(a.Len()))
		}
	}
	if void > rounds/4 {
		tb.Fatalf("packets went astray in %d of %d rounds", void, rounds)
	}
	return void
}

// ratios returns the cost of each round relative to the same round of base.
func (a *arm) ratios(base *arm) (all []float64) {
	for i := range a.cost {
		all = append(all, a.cost[i]/base.cost[i])
	}
	return all
}

// A spread is a median with its quartiles.
type spread struct{ median, low, high float64 }

func spreadOf(all []float64) spread {
	s := slices.Sorted(slices.Values(all))
	return spread{s[len(s)/2], s[len(s)/4], s[len(s)*3/4]}
}

// report prints the result of a race: each arm relative to the first.
func report(b *testing.B, title string, arms []*arm, void int) {
	b.Helper()
	fmt.Printf("%s (%d rounds, %d void)\n", title, len(arms[0].cost)+void, void)
	for _, a := range arms {
		c, r := spreadOf(a.cost), spreadOf(a.ratios(arms[0]))
		fmt.Printf("  %-42s %6.0f ns (%.0f to %.0f)   ratio %.3f (%.3f to %.3f)\n",
			a.name, c.median, c.low, c.high, r.median, r.low, r.high)
	}
}

const (
	peers     = 1000 // each with a permission
	ports     = 8    // of each peer
	packets   = peers * ports
	flowParts = 16
)

// spreadOut sends from one port of each peer, then from the next port of each.
func spreadOut(i int) (peer, port int) { return i % peers, i / peers }

// BenchmarkUnsolicitedPacket measures a packet from a peer without permission to a port of
// the gateway without a socket. The baseline is a gateway without conenatd. A few peers
// have permissions.
func BenchmarkUnsolicitedPacket(b *testing.B) {
	for _, test := range []struct{ name, rules string }{
		{"input accepts", lab.Masquerade},
		{"input drops", lab.Masquerade + lab.DropPolicy},
	} {
		b.Run(test.name, func(b *testing.B) {
			onOneCPU(b)
			arms := []*arm{
				newArm(b, "stock", lab.Options{Rules: test.rules}, packets),
				newArm(b, "stock again, for the noise", lab.Options{Rules: test.rules}, packets),
				newArm(b, "conenatd", lab.Options{Rules: test.rules}, packets),
			}
			_, m := arms[2].carry(b, standard)
			grantAll(b, m, strangers(1<<20, peers))
			for _, a := range arms {
				a.over = func(int) bool { return a.came(b) == 0 }
				for i := range packets {
					peer, port := spreadOut(i)
					a.Aim(i, netip.AddrPortFrom(stranger(peer), uint16(20000+port)), benchExt)
				}
			}
			for b.Loop() {
				report(b, "unsolicited packet, "+test.name, arms, race(b, arms, 20, flowParts))
			}
			b.ReportMetric(spreadOf(arms[2].ratios(arms[0])).median, "conenatd/stock")
		})
	}
}

// BenchmarkGrowthForStrangers shows, as the exponent of a power law, how the cost of a packet
// that no permission admits grows with the number of permissions of the same port.
func BenchmarkGrowthForStrangers(b *testing.B) {
	const most, burst = 200_000, 200
	onOneCPU(b)
	var arms []*arm
	for _, size := range []int{1, 1000, most} {
		a := newArm(b, fmt.Sprintf("%d permissions", size), lab.Options{}, burst)
		_, m := a.carry(b, standard)
		grantAll(b, m, strangers(0, size))
		a.begin = func(round int) {
			for i := range burst {
				a.Aim(i, netip.AddrPortFrom(stranger(most+round*burst+i), uint16(20000+round%100*burst+i)), benchExt)
			}
		}
		a.over = func(int) bool { return a.came(b) == 0 }
		arms = append(arms, a)
	}
	for b.Loop() {
		report(b, "packet of a stranger", arms, race(b, arms, 200, 1))
	}
	growth := spreadOf(arms[2].ratios(arms[0]))
	for _, r := range []*float64{&growth.median, &growth.low, &growth.high} {
		*r = math.Log(*r) / math.Log(most)
	}
	fmt.Printf("  exponent of growth from 1 to %d: %.3f (%.3f to %.3f)\n", most, growth.median, growth.low, growth.high)
	b.ReportMetric(growth.median, "exponent")
}

// BenchmarkFloodOfAPermittedPeer shows what a permitted peer costs that sends from 20,000 new ports
// a second, when it has max_children flows: CPU time of its packets as a part of a CPU, first
// through the map, then through an expectation. The baseline is a peer without a permission.
func BenchmarkFloodOfAPermittedPeer(b *testing.B) {
	const ports, rate, steps = 60_000, 20_000, 600
	for _, carrier := range []string{"no permission", "map", "expectation"} {
		b.Run(carrier, func(b *testing.B) {
			onOneCPU(b)
			a := newArm(b, carrier, lab.Options{Rules: lab.Masquerade}, ports)
			d := standard
			switch carrier {
			case "expectation":
				d = permit(b, a.Lab, benchExt.String(), benchInt.String(), lab.PeerA)
				d.MaxChildren, d.Guard = standard.Map.MaxChildren, true
			}
			_, m := a.carry(b, d)
			if carrier == "map" {
				grantAll(b, m, []cone.Permission{permission(benchExt, benchInt, lab.PeerA)})
			}
			for i := range ports {
				a.Aim(i, netip.AddrPortFrom(lab.PeerA, uint16(1025+i)), benchExt)
			}
			for b.Loop() {
				began, took := time.Now(), time.Duration(0)
				for i := range steps {
					for time.Since(began) < time.Duration(i)*ports/steps*time.Second/rate {
						time.Sleep(time.Millisecond)
					}
					took += a.send(b, i*ports/steps, (i+1)*ports/steps)
				}
				lasted := time.Since(began)
				fmt.Printf("%s: %d packets in %v, %d came, %.1f us each, %.1f %% of a CPU at %d a second\n", carrier, ports,
					lasted.Round(time.Millisecond), a.came(b), float64(took.Microseconds())/ports, 100*took.Seconds()/ports*rate, rate)
			}
		})
	}
}

// BenchmarkEventDriven shows how many permissions per second the daemon can add to the map,
// delete and refresh, in batches as it sends them, while the map holds many. The unit
// "permissions/s" is for grants.
func BenchmarkEventDriven(b *testing.B) {
	const many, some = 200_000, 20_000
	a := newArm(b, "", lab.Options{}, 1)
	_, m := a.carry(b, standard)
	all := strangers(0, many)
	rate := func(n int, f func()) float64 {
		began := time.Now()
		f()
		return float64(n) / time.Since(began).Seconds()
	}
	for b.Loop() {
		filling := rate(many, func() { grantAll(b, m, all) })
		var grants, renewals, revokes, single []float64
		for i := range 10 {
			part := all[i*some:][:some]
			revokes = append(revokes, rate(some, func() { must(b, m.Revoke(part)) }))
			grants = append(grants, rate(some, func() { grantAll(b, m, part) }))
			renewals = append(renewals, rate(some, func() { m.Renew(part, func(i int) { b.Fatal("lost", i) }) }))
			must(b, m.Revoke(part))
			single = append(single, rate(some, func() {
				for i := range part {
					grantAll(b, m, part[i:i+1])
				}
			}))
		}
		fmt.Printf("event-driven, permissions a second\n  %-42s %7.0f\n", fmt.Sprintf("grant %d into an empty map", many), filling)
		for name, all := range map[string][]float64{"grant": grants, "grant, one at a time,": single, "renew": renewals, "revoke": revokes} {
			s := spreadOf(all)
			fmt.Printf("  %-42s %7.0f (%.0f to %.0f)\n", fmt.Sprintf("%s %d of %d", name, some, many), s.median, s.low, s.high)
		}
		b.ReportMetric(spreadOf(grants).median, "permissions/s")
		must(b, m.Revoke(all))
	}
}

// BenchmarkLargeSets shows the cost of checking tables that are right already, with a
// country's prefixes, or almost all ports, excluded.
func BenchmarkLargeSets(b *testing.B) {
	for name, exclude := range map[string]func(m *rules.MapConfig){
		"nothing": func(*rules.MapConfig) {},
		"20,000 prefixes": func(m *rules.MapConfig) {
			for i := range 20_000 {
				a := netip.AddrFrom4([4]byte{byte(100 + i>>15), byte(i >> 7), byte(i << 1)})
				m.ExcludePeers = append(m.ExcludePeers, netip.PrefixFrom(a, 24))
			}
		},
		"60,000 ports": func(m *rules.MapConfig) {
			for p := range 60_000 {
				m.ExcludePorts = append(m.ExcludePorts, uint16(1+p))
			}
		},
		"30,000 single ports": func(m *rules.MapConfig) {
			for p := range 30_000 {
				m.ExcludePorts = append(m.ExcludePorts, uint16(1+2*p))
			}
		},
	} {
		b.Run(name, func(b *testing.B) {
			l := lab.ForTest(b, lab.Options{})
			d, m := standard, *standard.Map
			exclude(&m)
			d.Map = &m
			table := open(b, l)
			began := time.Now()
			set(b, table, d)
			b.ReportMetric(time.Since(began).Seconds(), "s/first")
			for b.Loop() {
				if changed, err := table.Set(d); changed || err != nil {
					b.Fatal(changed, err)
				}
			}
		})
	}
}
