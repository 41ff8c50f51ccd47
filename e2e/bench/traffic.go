package main

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// The endpoints of most flows. A masquerade keeps the port.
var (
	insideHost  = netip.MustParseAddr("10.47.11.109")
	outsideAddr = netip.MustParseAddr("198.51.100.1")
)

// Strangers with numbers from these on are peers of different kinds, so that the flows of one
// measurement never meet those of another.
const (
	filledPeers = 0       // those of the permissions of a filled gateway
	streamPeers = 1 << 18 // those that established flows lead to
	knownPeers  = 2 << 18
	newPeers    = 1 << 20 // and up: one for each new flow
)

// filledPort is the inside port of the permissions of a filled gateway.
const filledPort = 5060

// timed sends the packets of floods a number of times, alternating between the floods, and
// returns the CPU time for one packet.
func timed(times int, floods ...*lab.Flood) (time.Duration, error) {
	began, err := ownThread.now()
	if err != nil {
		return 0, err
	}
	packets := 0
	for range times {
		for _, f := range floods {
			if err := f.Send(0, f.Len()); err != nil {
				return 0, err
			}
			packets += f.Len()
		}
	}
	ended, err := ownThread.now()
	return (ended - began) / time.Duration(packets), err
}

// arrived checks that as many packets have come to a host since the last call.
func arrived(h *lab.Host, want int) error {
	n, err := came(h)
	if err == nil && n != want {
		err = fmt.Errorf("%w: %d of %d came", errStray, n, want)
	}
	return err
}

// filled prepares a gateway with a number of permissions. An arm whose conenatd is dead is
// filled while it lives; one that is alive is paused.
func filled(size int) func(*gateway) error {
	return func(g *gateway) error {
		if g.args == nil {
			if g.rules == static {
				return nil
			}
			return g.fill(size)
		}
		alive := *g
		alive.dead = false
		if err := inOrder(alive.start, func() error { return alive.fill(size) }); err != nil {
			return errors.Join(err, alive.stop())
		}
		g.daemon = alive.daemon
		if g.dead {
			return g.kill()
		}
		return g.pause()
	}
}

// fill makes n permissions of one inside port, each with a peer of its own, by flows that
// last no longer than the call.
func (g *gateway) fill(n int) error {
	if g.standing > 0 {
		n = min(n, g.standing)
	}
	if err := g.open(n); err != nil {
		return err
	}
	if g.daemon != nil {
		err := g.until(fmt.Sprintf("%d permissions stand", n), 2*time.Minute, func(st control.Status) bool {
			return st.Permissions.Standing >= n
		})
		if err != nil {
			return err
		}
	}
	return inOrder(g.Flush, g.settle, func() error {
		_, err := came(g.Outside)
		return err
	})
}

// open begins n flows of one inside port, each to a peer of its own.
func (g *gateway) open(n int) error {
	const atOnce = 2000
	f, err := g.NewFlood(min(n, atOnce), true)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	for at := 0; at < n; at += f.Len() {
		last := min(f.Len(), n-at)
		for i := range last {
			f.Aim(i, netip.AddrPortFrom(insideHost, filledPort), netip.AddrPortFrom(stranger(filledPeers+at+i), filledPort))
		}
		if err := inOrder(func() error { return f.Send(0, last) }, g.settle); err != nil {
			return err
		}
	}
	return nil
}
