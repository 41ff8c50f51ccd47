package main

import (
	"net/netip"
	"time"

	"github.com/conenatd/conenatd/internal/lab"
)

// childBound is a first packet of 1.10 times the cost of one by a static rule.
const childBound = 1 / 1.10

// children is table c: the first packets of children, in gateways where nobody listens, and
// where conenatd or another program listens.
func children(o *options) ([]*table, error) {
	about := "First packets from a peer's other ports, which a permission admits, against one static DNAT rule that " +
		"admits the same packets; 0.909 is 1.10 times its cost. Flows come in bursts of " + count(o.flows) +
		", each from another peer, as far as there are enough. "
	alone := &table{key: "c", title: "First packet of a child, nobody listens", about: about + "Nobody listens: conenatd was killed."}
	beside := &table{
		key: "c2", title: "First packet of a child, beside a listener",
		about: about + "A program listens in each of the gateways: conenatd, or one that only reads.",
	}
	for _, size := range o.sizes {
		if err := o.childrenAt(alone, size, staticAlone, staticAgain, handAlone, "nft, dead", "auto, dead"); err != nil {
			return nil, err
		}
		arms := []string{staticReader, staticNoise, handReader, "nft", "nft by event", "auto", "auto + mapping"}
		if size <= expectations {
			arms = append(arms, "expect")
		}
		if err := o.childrenAt(beside, size, arms...); err != nil {
			return nil, err
		}
	}
	return []*table{alone, beside}, nil
}

func (o *options) childrenAt(t *table, size int, arms ...string) error {
	gateways, done, err := o.gateways(named(arms...), filled(size))
	defer done()
	if err != nil {
		return err
	}
	column := childColumn(size)
	for _, a := range arms[3:] {
		t.goals = append(t.goals, wanted{column, a, arms[0], goal{bound: childBound}})
	}
	r := o.race([]cell{childCell(column, size, o.flows)})
	// Programs that listen without conenatd are started for each turn.
	r.begin = func(g *gateway) error { return inOrder(g.hear, g.resume) }
	r.end = func(g *gateway) error { return inOrder(g.pause, g.deaf) }
	r.clear = func(g *gateway) error {
		g.fresh = 0
		return inOrder(g.resume, g.Flush, g.pause)
	}
	return t.measure(r, gateways)
}

func childColumn(size int) string { return count(size) + " permissions" }

// childCell measures first packets of n children from the peers of a filled gateway.
func childCell(name string, size, n int) cell {
	floods := map[*gateway]*lab.Flood{}
	return cell{
		name:    name,
		packets: func(*gateway) int { return n },
		run: func(g *gateway) (cost time.Duration, err error) {
			f := floods[g]
			if f == nil {
				if f, err = g.flood(lab.Shape{}, n, false); err != nil {
					return 0, err
				}
				floods[g] = f
			}
			for i := range n {
				const stride = 7919 // a prime: no permission lies beside the one before
				peer, port := (g.fresh+i)*stride%size, 10_000+(g.fresh+i)/size
				f.Aim(i, netip.AddrPortFrom(stranger(filledPeers+peer), uint16(port)), netip.AddrPortFrom(outsideAddr, filledPort))
			}
			g.fresh += n
			if cost, err = timed(1, f); err != nil {
				return 0, err
			}
			return cost, arrived(g.Inside(0), n)
		},
	}
}
