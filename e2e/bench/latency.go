package main

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
)

const (
	probes     = 50 // of each turn and load
	probeSlots = 3 * time.Millisecond
)

// loads are new flows a second.
var loads = []int{0, 5000, 20_000, 50_000}

// dropsUnsolicited keeps an answer that comes before its permission from becoming a flow of the
// gateway, which would lock out the peer: the minimal loop does not repair that.
const dropsUnsolicited = `table inet filter { chain input {
	type filter hook input priority filter; iifname "wan0" ct state new drop; }; }
`

// latency is table d: how long a permission takes.
func latency(o *options) ([]*table, error) {
	t := &table{
		key: "d", title: "Latency of a permission", inverse: true,
		about: "From the arrival of a flow's first packet at the peer to the arrival of the first answer from another port, " +
			"while the peer sends answers without pause. Ratios are of the medians of " + fmt.Sprint(2*probes) +
			" flows a quad against the minimal loop (e2e/bench/minimal.go), which reads all events, makes one expectation for each flow of the peer, " +
			"and does nothing else: less is better. The load is new flows to " + count(knownFlows) + " known peers.",
	}
	arms := named(minimal, minimalAgain, "expect", "nft by event", "nft", "auto")
	for i := range arms {
		arms[i].rules = lab.Masquerade + dropsUnsolicited
	}
	gateways, done, err := o.gateways(arms, func(g *gateway) error {
		return inOrder(g.start, g.pause)
	})
	defer done()
	if err != nil {
		return nil, err
	}
	took := make(map[*gateway]map[string][]float64) // us, by column
	var cells []cell
	for _, load := range loads {
		column := "idle"
		if load > 0 {
			column = "at " + count(load) + " new flows/s"
		}
		cells = append(cells, cell{
			name:    column,
			packets: func(*gateway) int { return probes },
			run: func(g *gateway) (time.Duration, error) {
				all, err := g.probe(load)
				if err != nil {
					return 0, err
				}
				if took[g] == nil {
					took[g] = make(map[string][]float64)
				}
				took[g][column] = append(took[g][column], all...)
				return time.Duration(1e3 * intervalOf(all).Median), nil
			},
		})
		for _, arm := range []string{"expect", "nft by event"} {
			t.goals = append(t.goals, wanted{column, arm, minimal, goal{bound: 1.5, atMost: true}})
		}
	}
	r := o.race(cells)
	r.begin, r.end = (*gateway).resume, (*gateway).pause
	r.clear = func(g *gateway) error {
		if g.minimal {
			return nil // to flush the flows would end its anchor
		}
		return inOrder(g.resume, g.Flush, g.settle, func() error {
			_, err := g.Gateway.Output(g.exe, "flush", "--control-socket", g.daemon.Socket)
			return err
		}, g.pause)
	}
	if err := t.measure(r, gateways); err != nil {
		return nil, err
	}
	t.notes = append(t.notes, distributions(gateways, cells, took, o.mark()))
	return []*table{t}, nil
}

// distributions writes the quantiles of all probes, and compares p99 with its goals.
func distributions(gateways []*gateway, cells []cell, took map[*gateway]map[string][]float64, mark string) string {
	var b strings.Builder
	b.WriteString("All flows together; those of one turn are not independent, so the interval of p99 is a little too narrow.\n\n")
	line(&b, []string{"us", "flows", "p10", "p50", "p90", "p99", "max", "wanted p99", "verdict"})
	line(&b, slices.Repeat([]string{"---"}, 9))
	bounds := map[string]float64{cells[0].name: 300, cells[2].name: 2000}
	for _, g := range gateways {
		for _, c := range cells {
			all := took[g][c.name]
			row := []string{g.name + ", " + c.name + mark, fmt.Sprint(len(all))}
			for _, q := range []float64{0.1, 0.5, 0.9} {
				row = append(row, fmt.Sprintf("%.0f", quantile(all, q).Median))
			}
			p99 := quantile(all, 0.99)
			row = append(row, fmt.Sprintf("%.0f (%.0f to %.0f)", p99.Median, p99.Low, p99.High), fmt.Sprintf("%.0f", slices.Max(all)))
			if bound := bounds[c.name]; bound > 0 && !g.minimal {
				v := (goal{bound: bound, atMost: true}).judge(p99, interval{1, 1, 1, true})
				if mark != "" {
					v = "none: disturbed"
				}
				row = append(row, fmt.Sprintf("<= %.0f", bound), string(v))
			} else {
				row = append(row, "", "")
			}
			line(&b, row)
		}
	}
	return b.String()
}

// quantile returns a quantile of samples and its confidence interval from order statistics,
// with the normal approximation of the binomial distribution.
func quantile(samples []float64, q float64) interval {
	s := slices.Sorted(slices.Values(samples))
	n := float64(len(s))
	at := func(rank float64) float64 { return s[min(max(int(rank), 0), len(s)-1)] }
	half := 1.96 * math.Sqrt(n*q*(1-q))
	return interval{at(n * q), at(n*q - half), at(math.Ceil(n*q + half)), n*min(q, 1-q) >= 5}
}

// A prober sends from sockets of its own, all from the calling thread, so that it measures no
// time slices of the scheduler.
type prober struct {
	*gateway
	inside       []int
	peer, answer int

	load   *lab.Flood
	perSec float64
	began  time.Time
	sent   int
}

// probe measures how long permissions take beside a load of new flows a second, in us.
func (g *gateway) probe(load int) (took []float64, err error) {
	p := &prober{gateway: g, peer: -1, answer: -1, perSec: float64(load)}
	defer func() { err = errors.Join(err, p.close()) }()
	if err := p.open(); err != nil {
		return nil, err
	}
	p.began = time.Now()
	for i, fd := range p.inside {
		for time.Since(p.began) < time.Duration(i)*probeSlots {
			if err := p.pump(); err != nil {
				return nil, err
			}
		}
		t, err := p.once(fd)
		if err != nil {
			return nil, err
		}
		took = append(took, float64(t.Nanoseconds())/1e3)
	}
	return took, nil
}

func udpSocket(at netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}); err != nil {
		return -1, errors.Join(fmt.Errorf("bind %v: %w", at, err), unix.Close(fd))
	}
	return fd, nil
}

// open opens the sockets and makes the peers of the load known.
func (p *prober) open() error {
	err := p.Inside(0).Do(func() error {
		for range probes {
			const first, ports = 20_000, 40_000
			fd, err := udpSocket(netip.AddrPortFrom(insideHost, uint16(first+p.probed%ports)))
			if err != nil {
				return err
			}
			p.probed++
			p.inside = append(p.inside, fd)
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = p.Outside.Do(func() (err error) {
		if p.peer, err = udpSocket(netip.AddrPortFrom(lab.PeerA, 5060)); err != nil {
			return err
		}
		p.answer, err = udpSocket(netip.AddrPortFrom(lab.PeerA, 5070))
		return err
	})
	if err != nil {
		return err
	}
	if p.load, err = p.NewFlood(knownFlows, true); err != nil {
		return err
	}
	if p.perSec == 0 {
		return nil
	}
	for i := range knownFlows {
		p.aim(i)
	}
	return inOrder(func() error { return p.load.Send(0, knownFlows) }, p.settle)
}

func (p *prober) close() (err error) {
	for _, fd := range append(p.inside, p.peer, p.answer) {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
		}
	}
	if p.load != nil {
		err = errors.Join(err, p.load.Close())
	}
	return err
}

// aim makes packet i of the load the first of a flow.
func (p *prober) aim(i int) {
	const first, ports = 1024, 60_000
	p.load.Aim(i, netip.AddrPortFrom(insideHost, uint16(10_000+i)), netip.AddrPortFrom(stranger(knownPeers+i), uint16(first+p.fresh/knownFlows%ports)))
	p.fresh++
}

// pump sends what is due of the load.
func (p *prober) pump() error {
	const most = 64 // what is missed beyond it stays missed, so that the load comes evenly
	due := int(p.perSec*time.Since(p.began).Seconds()) - p.sent
	p.sent += max(0, due-most)
	for range min(due, most) {
		i := p.fresh % knownFlows
		p.aim(i)
		if err := p.load.Send(i, i+1); err != nil {
			return err
		}
		p.sent++
	}
	return nil
}

// once lets an inside socket contact the peer, and returns how long the first answer from the
// peer's other port took to get through.
func (p *prober) once(fd int) (time.Duration, error) {
	var buf [64]byte
	hello, back := []byte("hello"), []byte("answer")
	if err := unix.Sendto(fd, hello, 0, &unix.SockaddrInet4{Port: 5060, Addr: lab.PeerA.As4()}); err != nil {
		return 0, err
	}
	var ext unix.Sockaddr
	for end := time.Now().Add(time.Second); ext == nil; {
		_, from, err := unix.Recvfrom(p.peer, buf[:], 0)
		switch {
		case err == nil:
			ext = from
		case !errors.Is(err, unix.EAGAIN):
			return 0, err
		case time.Now().After(end):
			return 0, fmt.Errorf("%w: the peer hears nothing", errStray)
		}
	}
	began := time.Now()
	for {
		if err := unix.Sendto(p.answer, back, 0, ext); err != nil {
			return 0, err
		}
		n, _, err := unix.Recvfrom(fd, buf[:], 0)
		took := time.Since(began)
		switch {
		case err == nil && n > 0:
			return took, nil
		case !errors.Is(err, unix.EAGAIN):
			return 0, err
		case took > time.Second:
			return 0, fmt.Errorf("%w: no answer gets through", errStray)
		}
		if err := p.pump(); err != nil {
			return 0, err
		}
	}
}
