package chaos

import (
	"errors"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

const (
	churnRate  = 5000 // new flows a second
	churnHosts = 10   // the first inside hosts
	churnPorts = 40_000

	// A port opens this many flows, each to another peer, and is used again after
	// all other ports have been: after half a minute.
	portFlows = 4

	churnTick = 10 * time.Millisecond
	atOnce    = 4 * churnRate / 100 // most flows in one tick, to catch up

	// One flow in oneOf is answered, laterOn flows later, when a permission stands
	// even if an event granted it: from the port asked, and by a child. The inside
	// host answers every other child.
	oneOf     = 10
	laterOn   = churnRate / 2
	childPort = 5070
)

// A churn makes new flows at a steady rate. Its peers are those of [stage.Peer].
type churn struct {
	s       *stage.Scene
	tick    *time.Ticker
	began   time.Time
	made    atomic.Int64 // flows
	out, in volley
}

// churning makes flows until stop, which returns how long that was.
func churning(s *stage.Scene) (c *churn, stop func() time.Duration) {
	s.T.Helper()
	c = &churn{s: s, tick: time.NewTicker(churnTick), began: time.Now()}
	s.T.Cleanup(c.tick.Stop)
	for v, out := range map[*volley]bool{&c.out: true, &c.in: false} {
		v.Flood = s.Flood(atOnce, out)
	}
	end := s.Steady(c.once)
	return c, func() time.Duration {
		end()
		return time.Since(c.began)
	}
}

// once waits for the tick and makes the flows that are due.
func (c *churn) once() error {
	<-c.tick.C
	made := int(c.made.Load())
	due := min(int(time.Since(c.began).Seconds()*churnRate)-made, atOnce)
	var errs []error
	for n := made; n < made+due; n++ {
		in, peer := c.flow(n)
		errs = append(errs, c.out.add(in, netip.AddrPortFrom(peer, 9)))
	}
	errs = append(errs, c.out.send())
	answered := func(f func(n int, in netip.AddrPort, peer netip.Addr)) {
		for n := max(made-laterOn, 0); n < made+due-laterOn; n++ {
			if n%oneOf == 0 {
				in, peer := c.flow(n)
				f(n/oneOf, in, peer)
			}
		}
	}
	answered(func(_ int, in netip.AddrPort, peer netip.Addr) {
		ext := netip.AddrPortFrom(c.s.Gateway.Addr, in.Port()) // no other flow has it towards this peer
		errs = append(errs, c.in.add(netip.AddrPortFrom(peer, 9), ext), c.in.add(netip.AddrPortFrom(peer, childPort), ext))
	})
	errs = append(errs, c.in.send())
	answered(func(n int, in netip.AddrPort, peer netip.Addr) {
		if n%2 == 0 {
			errs = append(errs, c.out.add(in, netip.AddrPortFrom(peer, childPort)))
		}
	})
	c.made.Add(int64(due))
	return errors.Join(append(errs, c.out.send())...)
}

// flow returns the endpoints of flow n. The first 20 million flows all differ.
func (c *churn) flow(n int) (in netip.AddrPort, peer netip.Addr) {
	port := n / portFlows
	round := port / churnPorts
	host := c.s.Inside(port % churnHosts)
	return netip.AddrPortFrom(host.Addr, uint16(firstPort+port%churnPorts)),
		stage.Peer((round*portFlows + n%portFlows) % stage.Peers)
}

// A volley collects packets of a flood that are sent together.
type volley struct {
	*lab.Flood
	n int
}

func (v *volley) add(from, to netip.AddrPort) error {
	v.Aim(v.n, from, to)
	if v.n++; v.n == v.Len() {
		return v.send()
	}
	return nil
}

func (v *volley) send() error {
	n := v.n
	v.n = 0
	return v.Send(0, n)
}
