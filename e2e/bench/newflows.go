package main

import (
	"net/netip"
	"time"

	"github.com/conenatd/conenatd/internal/lab"
)

// The cells of table b.
const (
	knownFlow    = "to a known peer"
	newFlow      = "to a new peer"
	excludedFlow = "to an excluded port"
	tcpFlow      = "TCP"
)

// newFlows is table b: the first packets of flows from inside.
func newFlows(o *options) ([]*table, error) {
	t := &table{
		key: "b", title: "New flows from inside",
		about: "Flows a second against plain masquerade with nobody listening, from the CPU time of the sender. " +
			"Each flow has an inside port and a peer of its own; those to a known peer have a permission already. " +
			"The excluded port is 53; TCP is SYN to port 443. Flows come in bursts of " + count(o.flows) +
			" (of " + count(fewFlows) + " with expect, which has room for few). conenatd is started anew for each quad.",
		used: newFlow,
		goals: []wanted{
			{newFlow, "nft, lean and quiet", stock, goal{bound: 0.70}},
			{newFlow, "auto, lean and quiet", stock, goal{bound: 0.70}},
			{newFlow, "auto + mapping, lean and quiet", stock, goal{bound: 0.62}},
			{newFlow, "nft, lean and quiet", handAlone, goal{bound: 0.90}},
			{newFlow, "auto, lean and quiet", handAlone, goal{bound: 0.90}},
			{newFlow, "expect", stockReader, goal{bound: 0.95}},
			{newFlow, "nft by event", stockReader, goal{bound: 0.95}},
			{excludedFlow, "nft, lean and quiet", stock, goal{bound: 0.95}},
			{tcpFlow, "nft, lean and quiet", stock, goal{bound: 0.95}},
			{excludedFlow, "auto, lean and quiet", stock, goal{bound: 0.95}},
			{tcpFlow, "auto, lean and quiet", stock, goal{bound: 0.95}},
		},
	}
	gateways, done, err := o.gateways(named(
		stock, stockAgain, stockSilent, stockReader, stockE, handAlone, handReader, handIsLean,
		"expect", "expect, dead", "nft by event", "nft by event, dead", "nft", "nft, lean and quiet", "nft, dead",
		"auto", "auto, lean and quiet", "auto, dead", "auto + mapping", "auto + mapping, lean and quiet", "auto + mapping, dead",
	), func(g *gateway) error {
		g.limit = o.flows
		if g.standing > 0 {
			g.limit = min(o.flows, fewFlows)
		}
		return nil
	})
	defer done()
	if err != nil {
		return nil, err
	}
	known := func(g *gateway, i, port int) (netip.AddrPort, netip.AddrPort) {
		return newFlowFrom(i), netip.AddrPortFrom(stranger(knownPeers+i), uint16(port))
	}
	r := o.race([]cell{
		flowCell(knownFlow, lab.Shape{}, func(g *gateway, i int) (netip.AddrPort, netip.AddrPort) {
			return known(g, i%knownFlows, 2000+g.turns%1000*20+i/knownFlows)
		}, func(g *gateway) error { // the peers become known
			f, err := g.NewFlood(knownFlows, true)
			if err != nil {
				return err
			}
			defer func() { _ = f.Close() }()
			for i := range knownFlows {
				from, to := known(g, i, 1000)
				f.Aim(i, from, to)
			}
			return inOrder(func() error { return f.Send(0, knownFlows) }, g.settle, func() error { return arrived(g.Outside, knownFlows) })
		}),
		flowCell(newFlow, lab.Shape{}, toNewPeers(5060), nil),
		flowCell(excludedFlow, lab.Shape{}, toNewPeers(53), nil),
		flowCell(tcpFlow, lab.Shape{TCP: true}, toNewPeers(443), nil),
	})
	r.begin, r.end, r.clear = (*gateway).start, (*gateway).stop, (*gateway).forget
	return []*table{t}, t.measure(r, gateways)
}

const (
	// knownFlows is how many permissions the flows to known peers have.
	knownFlows = 500
	// fewFlows is what the table of expectations has room for in both turns of a quad.
	fewFlows = 1000
)

// forget removes flows, and what rules by hand have learned.
func (g *gateway) forget() error {
	g.fresh = 0
	if g.rules == hand || g.rules == handLean {
		if err := g.NFT("flush map ip hand permissions"); err != nil {
			return err
		}
	}
	if g.tables != "" {
		if err := g.NFT("delete table inet conenat; delete table ip conenat;\n" + g.tables); err != nil {
			return err
		}
	}
	return g.Flush()
}

// An aim returns the endpoints of new flow i.
type aim func(g *gateway, i int) (from, to netip.AddrPort)

// newFlowFrom returns the inside endpoint of new flow i.
func newFlowFrom(i int) netip.AddrPort { return netip.AddrPortFrom(insideHost, uint16(10_000+i)) }

// toNewPeers aims each flow at a peer that was not used before, at this port.
func toNewPeers(port uint16) aim {
	return func(g *gateway, i int) (netip.AddrPort, netip.AddrPort) {
		return newFlowFrom(i), netip.AddrPortFrom(stranger(newPeers+g.fresh+i), port)
	}
}

// flowCell measures the first packets of flows. before is called before each turn.
func flowCell(name string, shape lab.Shape, to aim, before func(g *gateway) error) cell {
	type size struct {
		g *gateway
		n int
	}
	floods := map[size]*lab.Flood{}
	return cell{
		name:    name,
		packets: func(g *gateway) int { return g.limit },
		run: func(g *gateway) (cost time.Duration, err error) {
			if before != nil {
				if err := before(g); err != nil {
					return 0, err
				}
			}
			f := floods[size{g, g.limit}]
			if f == nil {
				if f, err = g.flood(shape, g.limit, true); err != nil {
					return 0, err
				}
				floods[size{g, g.limit}] = f
			}
			for i := range f.Len() {
				from, to := to(g, i)
				f.Aim(i, from, to)
			}
			g.fresh += f.Len()
			if cost, err = timed(1, f); err != nil {
				return 0, err
			}
			return cost, arrived(g.Outside, f.Len())
		},
	}
}
