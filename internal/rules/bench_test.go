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

var uncapped = func() rules.Desired {
	d, m := standard, *standard.Map
	m.MaxChildren = 0
	d.Map = &m
	return d
}()

// oneForward is the baseline for the cost of a permission.
const oneForward = lab.Masquerade + `table ip user { chain c {
	type nat hook prerouting priority dstnat; iifname "wan0" udp dport 5060 dnat to 10.47.11.109:5060; }; }`

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
	events listener // 0 where nobody listens
	// begin prepares a round, over checks that all went well.
	begin func(round int)
	over  func(sent int) bool

	took time.Duration
	cost []float64 // ns a packet, for each round
}

// newArm makes a lab for an arm. Without a listener there must be no events at all: a
// listener in any network namespace of the machine would cost packets here.
func newArm(tb testing.TB, name string, o lab.Options, packets int, listen bool) *arm {
	tb.Helper()
	l := lab.ForTest(tb, o)
	return newArmOf(tb, name, newFlood(tb, l, packets, false), listen)
}

func newArmOf(tb testing.TB, name string, f *flood, listen bool) *arm {
	tb.Helper()
	l := f.Lab
	a := &arm{name: name, flood: f}
	must(tb, l.Gateway.SetSysctl("net.netfilter.nf_conntrack_events", map[bool]string{true: "1", false: "0"}[listen]))
	if listen {
		a.events = listenForEvents(tb, l)
	}
	a.begin = func(int) {}
	a.over = func(sent int) bool { return a.came(tb) == sent }
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
			if a.events != 0 {
				good = a.events.empty() >= a.Len() && good
			}
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

// spreadOut sends from one port of each peer, then from the next port of each: the children
// of a permission are milliseconds apart. inARow sends from all ports of a peer, then goes
// to the next peer, as a port scan does.
func spreadOut(i int) (peer, port int) { return i % peers, i / peers }
func inARow(i int) (peer, port int)    { return i / ports, i % ports }

// BenchmarkFirstPacketOfAChild compares the first packet of a flow that the map admits with
// that of a flow that a static rule forwards. The packets are the same. Each round has its
// own peers.
func BenchmarkFirstPacketOfAChild(b *testing.B) {
	for _, test := range []struct {
		name   string
		order  func(i int) (peer, port int)
		listen bool
	}{
		{"children apart", spreadOut, true},
		{"children in a row", inARow, true},
		{"children apart, no events", spreadOut, false},
	} {
		b.Run(test.name, func(b *testing.B) {
			onOneCPU(b)
			forward := func(name string, d *rules.Desired) *arm {
				a := newArm(b, name, lab.Options{Rules: oneForward}, packets, test.listen)
				if d != nil {
					a.carry(b, *d)
				}
				return a
			}
			admit := func(name string, d rules.Desired) *arm {
				a := newArm(b, name, lab.Options{}, packets, test.listen)
				_, m := a.carry(b, d)
				a.begin = func(round int) {
					must(b, m.Revoke(strangers((round-1)*peers, peers)))
					grantAll(b, m, strangers(round*peers, peers))
				}
				return a
			}
			arms := []*arm{
				forward("one static rule, beside conenatd", &standard),
				forward("the same again, for the noise", &standard),
				admit("map", standard),
				admit("map, max_children = 0", uncapped),
				forward("one static rule, without conenatd", nil),
			}
			for _, a := range arms {
				begin := a.begin
				a.begin = func(round int) {
					begin(round)
					for i := range packets {
						peer, port := test.order(i)
						a.Aim(i, netip.AddrPortFrom(stranger(round*peers+peer), uint16(20000+port)), benchExt)
					}
				}
			}
			for b.Loop() {
				report(b, "first packet of a child, "+test.name, arms, race(b, arms, 20, flowParts))
			}
			b.ReportMetric(spreadOf(arms[2].ratios(arms[0])).median, "map/static")
			b.ReportMetric(spreadOf(arms[3].ratios(arms[0])).median, "uncapped/static")
		})
	}
}

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
				newArm(b, "stock", lab.Options{Rules: test.rules}, packets, false),
				newArm(b, "stock again, for the noise", lab.Options{Rules: test.rules}, packets, false),
				newArm(b, "conenatd", lab.Options{Rules: test.rules}, packets, false),
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

// BenchmarkPacketOfAnAnsweredFlow measures a later packet from the peer that the inside
// host talks to. The baseline is a gateway without conenatd.
func BenchmarkPacketOfAnAnsweredFlow(b *testing.B) {
	onOneCPU(b)
	arms := []*arm{
		newArm(b, "stock", lab.Options{}, packets, false),
		newArm(b, "stock again, for the noise", lab.Options{}, packets, false),
		newArm(b, "conenatd", lab.Options{}, packets, false),
	}
	arms[2].carry(b, standard)
	for _, a := range arms {
		in, err := a.Inside(0).Socket(a.Inside(0).Addr, 5060)
		must(b, err)
		peer, err := a.Outside.Socket(lab.PeerA, 5060)
		must(b, err)
		b.Cleanup(func() { must(b, in.Close()); must(b, peer.Close()) })
		a.begin = func(int) {
			ext, err := in.Contact(peer)
			must(b, err)
			for i := range packets {
				a.Aim(i, peer.Addr(), ext)
			}
		}
	}
	for b.Loop() {
		report(b, "packet of an answered flow", arms, race(b, arms, 20, flowParts))
	}
	b.ReportMetric(spreadOf(arms[2].ratios(arms[0])).median, "conenatd/stock")
}

// BenchmarkGrowth shows, as the exponent of a power law, how the cost of a child's first
// packet grows with the number of permissions in the map, and the cost of a stranger's
// packet to the same port, which is not admitted. The packets of a burst go to permissions
// from all over the map, or all to the single one.
func BenchmarkGrowth(b *testing.B) {
	const most, burst = 200_000, 200 // fewer than the cap
	for _, test := range []struct {
		name      string
		desired   rules.Desired
		strangers bool
	}{{"standard", standard, false}, {"max_children = 0", uncapped, false}, {"strangers", standard, true}} {
		b.Run(test.name, func(b *testing.B) {
			onOneCPU(b)
			var arms []*arm
			for _, size := range []int{1, 1000, most} {
				a := newArm(b, fmt.Sprintf("%d permissions", size), lab.Options{}, burst, false)
				_, m := a.carry(b, test.desired)
				if size > 1 {
					grantAll(b, m, strangers(0, size))
				}
				a.begin = func(round int) {
					if size == 1 {
						must(b, m.Revoke(strangers(round-1, 1)))
						grantAll(b, m, strangers(round, 1))
					}
					for i := range burst {
						const stride = 7919 // no permission lies beside the one before
						peer := round
						if size > 1 {
							peer = (round*burst + i) * stride % size
						}
						if test.strangers {
							peer += most
						}
						a.Aim(i, netip.AddrPortFrom(stranger(peer), uint16(20000+round%100*burst+i)), benchExt)
					}
				}
				if test.strangers {
					a.over = func(int) bool { return a.came(b) == 0 }
				}
				arms = append(arms, a)
			}
			for b.Loop() {
				report(b, "first packet of a child, "+test.name, arms, race(b, arms, 200, 1))
			}
			growth := spreadOf(arms[2].ratios(arms[0]))
			for _, r := range []*float64{&growth.median, &growth.low, &growth.high} {
				*r = math.Log(*r) / math.Log(most)
			}
			fmt.Printf("  exponent of growth from 1 to %d: %.3f (%.3f to %.3f)\n", most, growth.median, growth.low, growth.high)
			b.ReportMetric(growth.median, "exponent")
		})
	}
}

// BenchmarkEventDriven shows how many permissions per second the daemon can add to the map,
// delete and refresh, in batches as it sends them, while the map holds many. The unit
// "permissions/s" is for grants.
func BenchmarkEventDriven(b *testing.B) {
	const many, some = 200_000, 20_000
	a := newArm(b, "", lab.Options{}, 1, false)
	_, m := a.carry(b, standard)
	all := strangers(0, many)
	rate := func(n int, f func()) float64 {
		began := time.Now()
		f()
		return float64(n) / time.Since(began).Seconds()
	}
	for b.Loop() {
		filling := rate(many, func() { grantAll(b, m, all) })
		var grants, refreshes, revokes, single []float64
		for i := range 10 {
			part := all[i*some:][:some]
			revokes = append(revokes, rate(some, func() { must(b, m.Revoke(part)) }))
			grants = append(grants, rate(some, func() { grantAll(b, m, part) }))
			refreshes = append(refreshes, rate(some, func() { m.Refresh(part, func(i int) { b.Fatal("lost", i) }) }))
			must(b, m.Revoke(part))
			single = append(single, rate(some, func() {
				for i := range part {
					grantAll(b, m, part[i:i+1])
				}
			}))
		}
		fmt.Printf("event-driven, permissions a second\n  %-42s %7.0f\n", fmt.Sprintf("grant %d into an empty map", many), filling)
		for name, all := range map[string][]float64{"grant": grants, "grant, one at a time,": single, "refresh": refreshes, "revoke": revokes} {
			s := spreadOf(all)
			fmt.Printf("  %-42s %7.0f (%.0f to %.0f)\n", fmt.Sprintf("%s %d of %d", name, some, many), s.median, s.low, s.high)
		}
		b.ReportMetric(spreadOf(grants).median, "permissions/s")
		must(b, m.Revoke(all))
	}
}

// BenchmarkNewFlow measures the first packet that an inside host sends to a peer: with
// mappings to learn, with known mappings, and with permissions to learn, too. The baseline
// is a gateway without conenatd. Each packet has its own source port and peer.
func BenchmarkNewFlow(b *testing.B) {
	onOneCPU(b)
	const flows = 4000
	newArm := func(name string) *arm {
		return newArmOf(b, name, newFlood(b, lab.ForTest(b, lab.Options{}), flows, true), true)
	}
	stock, again := newArm("stock"), newArm("stock again, for the noise")
	arms := []*arm{stock, again}
	with := func(name string, d rules.Desired, forget bool) {
		a := newArm(name)
		t, _ := a.carry(b, d)
		if forget {
			m := t.NewMappings(d.Mapping)
			a.begin = func(int) { must(b, m.Forget(netip.Addr{})) }
		}
		arms = append(arms, a)
	}
	mapped := rules.MappingConfig{
		Subnets: []netip.Prefix{lab.InsideNet}, Pools: pool(61000, 65535), Lifetime: time.Hour, Size: 1 << 18,
	}
	learning := *standard.Map
	learning.LearnRate = 1 << 20
	bare := rules.Desired{OutsideLinks: []string{"wan0"}, Mapping: &mapped}
	full := bare
	full.Guard, full.Spoofed, full.Subnets, full.Map = true, true, mapped.Subnets, &learning
	with("mapping, newcomers", bare, true)
	with("mapping, known", bare, false)
	with("permissions alone", rules.Desired{OutsideLinks: bare.OutsideLinks, Subnets: standard.Subnets, Guard: true, Map: &learning}, false)
	with("mapping, known, and permissions", full, false)
	lean, hiding := learning, newArm("permissions alone, flows not reported")
	lean.Lean = true
	table, _ := hiding.carry(b, rules.Desired{OutsideLinks: bare.OutsideLinks, Subnets: standard.Subnets, Guard: true, Map: &lean})
	hiding.begin = func(int) { must(b, table.NewLean().On()) }
	hiding.events = 0 // it listens, and hears nothing
	arms = append(arms, hiding)
	for _, a := range arms {
		begin := a.begin
		a.begin = func(round int) {
			begin(round)
			for i := range flows {
				a.Aim(i, netip.AddrPortFrom(benchInt.Addr(), uint16(10000+i)), netip.AddrPortFrom(stranger(round*flows+i), 5060))
			}
		}
	}
	for b.Loop() {
		report(b, "first packet of a flow from inside", arms, race(b, arms, 20, flowParts))
	}
	b.ReportMetric(spreadOf(arms[3].ratios(stock)).median, "mapping/stock")
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
