package main

import (
	"github.com/conenatd/conenatd/internal/lab"
)

// offload takes answered UDP flows out of the packet path.
const offload = lab.Masquerade + `table inet fast {
	flowtable ft { hook ingress priority 0; devices = { wan0, lan0, lan0p0 }; }
	chain forward {
		type filter hook forward priority filter;
		ct state established meta l4proto udp flow add @ft
	}
}
`

// flowtables is table g. Debian's kernels have flowtables; in a guest the ratios show which
// packets meet rules at all, and no more.
func flowtables(o *options) ([]*table, error) {
	t := &table{
		key: flowtableKey, title: "Beside a flowtable",
		about: "Packets a second against plain masquerade, from the CPU time of the sender, 64 bytes long, of " +
			count(streams) + " flows. A flowtable takes answered flows out of the packet path.",
	}
	arms := named(stock, stockAgain, "nft", "auto", "auto + mapping")
	fast := append(named("nft", "auto", "auto + mapping"), arm{name: "stock"})
	for i := range fast {
		fast[i].name, fast[i].rules = fast[i].name+", a flowtable", offload
	}
	gateways, done, err := o.gateways(append(arms, fast...), filled(1))
	defer done()
	if err != nil {
		return nil, err
	}
	r := o.race([]cell{streamCell(twoWay, streams, 64, true), streamCell(oneWay, streams, 64, false)})
	r.begin, r.end = (*gateway).resume, (*gateway).pause
	return []*table{t}, t.measure(r, gateways)
}
