package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/conenatd/conenatd/internal/lab"
)

// established is table a: packets of flows that exist, with different numbers of permissions.
func established(o *options) ([]*table, error) {
	t := &table{
		key: "a", title: "Packets of established flows",
		about: "Packets a second against plain masquerade, from the CPU time of the sender. " +
			"Two-way: as many packets from the peer as from inside; one-way: nobody answers. Lengths are of the IP packet in bytes. " +
			strconv.Itoa(streams) + " flows are sent in turns, or one if there is one permission.",
	}
	for _, size := range o.sizes {
		if err := establishedAt(o, t, size); err != nil {
			return nil, err
		}
	}
	return []*table{t}, nil
}

const (
	// streams is how many flows are measured, so that they are more than a cache line or two.
	streams = 256
	// streamPackets is how many packets a turn sends of each kind.
	streamPackets = 8192
	twoWayPort    = 20_000 // and up: inside ports
	oneWayPort    = 30_000
)

func establishedAt(o *options, t *table, size int) error {
	names := []string{"nft", "nft by event", "auto", "auto + mapping", "nft, dead", "auto, dead"}
	if size <= expectations {
		names = append(names, "expect", "expect, dead")
	}
	gateways, done, err := o.gateways(named(append([]string{stock, stockAgain, handAlone}, names...)...), filled(size))
	defer done()
	if err != nil {
		return err
	}
	n := min(streams, size)
	var cells []cell
	for _, length := range []int{64, 1400} {
		for _, kind := range []string{twoWay, oneWay} {
			cells = append(cells, streamCell(streamColumn(kind, length, size), n, length, kind == twoWay))
		}
	}
	for _, c := range cells {
		bound := 0.97
		if strings.HasPrefix(c.name, oneWay) {
			bound = 0.96
		}
		t.goals = append(t.goals, wanted{c.name, "nft", stock, goal{bound: bound}}, wanted{c.name, "auto", stock, goal{bound: bound}})
	}
	r := o.race(cells)
	r.begin, r.end = (*gateway).resume, (*gateway).pause
	return t.measure(r, gateways)
}

// The kinds of established flows.
const (
	twoWay = "two-way"
	oneWay = "one-way"
)

func streamColumn(kind string, length, size int) string {
	return fmt.Sprintf("%s, %d bytes, %s", kind, length, count(size))
}

// streamCell measures later packets of n flows.
func streamCell(name string, n, length int, answered bool) cell {
	times := streamPackets / n
	if answered {
		times /= 2
	}
	type way struct{ out, in *lab.Flood }
	ways := map[*gateway]way{}
	prepare := func(g *gateway) (w way, err error) {
		if w, there := ways[g]; there {
			return w, nil
		}
		if w.out, err = g.flood(lab.Shape{Length: length}, n, true); err != nil {
			return w, err
		}
		if w.in, err = g.flood(lab.Shape{Length: length}, n, false); err != nil {
			return w, err
		}
		port := uint16(oneWayPort)
		if answered {
			port = twoWayPort
		}
		for i := range uint16(n) {
			peer := netip.AddrPortFrom(stranger(streamPeers+int(i)), 5060)
			w.out.Aim(int(i), netip.AddrPortFrom(insideHost, port+i), peer)
			w.in.Aim(int(i), peer, netip.AddrPortFrom(outsideAddr, port+i))
		}
		ways[g] = w
		return w, nil
	}
	return cell{
		name:    name,
		packets: func(*gateway) int { return streamPackets },
		run: func(g *gateway) (cost time.Duration, err error) {
			w, err := prepare(g)
			if err != nil {
				return 0, err
			}
			measured := []*lab.Flood{w.out}
			if answered {
				measured = append(measured, w.in)
			}
			// The flows begin, or are refreshed.
			for _, f := range measured {
				if err := inOrder(func() error { return f.Send(0, n) }, g.settle); err != nil {
					return 0, err
				}
			}
			if cost, err = timed(times, measured...); err != nil {
				return 0, err
			}
			err = arrived(g.Outside, n*(times+1))
			if answered && err == nil {
				err = arrived(g.Inside(0), n*(times+1))
			}
			return cost, err
		},
	}
}
