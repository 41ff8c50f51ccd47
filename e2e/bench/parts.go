package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/lab"
)

// A part is something in the tables of backend nft that a gateway can do without for a
// measurement.
type part struct {
	name  string
	chain string   // loses all its rules
	hook  string   // a chain that is not there at all
	rules []string // each rule that contains one of them is not there
}

var allParts = part{name: "all rules"}

// partsOf are the parts that a packet from inside meets.
var partsOf = []part{
	allParts,
	{name: "before_conntrack without rules", chain: "before_conntrack"},
	{name: "no before_conntrack", hook: "before_conntrack"},
	{name: "no way_back", hook: "way_back"},
	{name: "no test of faked peers", rules: []string{"goto faked_peer"}},
	{name: "learn without rules", chain: "learn"},
	{name: "no learn", hook: "learn"},
	{name: "no before_conntrack, no learn", hook: "before_conntrack learn"},
	{name: "learn looks at each later packet", rules: []string{"numgen"}},
	{name: "no @unsure", rules: []string{"delete @unsure", "update @unsure"}},
	{name: "no look-up of what is denied", rules: []string{"@denied", "@full_hosts"}},
	{name: "no rate limit", rules: []string{"@learners"}},
	{name: "no @learned_flows", rules: []string{"@learned_flows"}},
}

// parts is table h: what each part of the rules costs, with nobody there.
func parts(o *options) ([]*table, error) {
	t := &table{
		key: "h", title: "Parts of the rules",
		about: "Packets a second against plain masquerade, from the CPU time of the sender, with the tables of backend nft " +
			"that `conenatd rules` prints and no daemon. An arm lacks what its name says. The difference to all rules is what " +
			"that costs. Two-way and one-way are later packets of " + count(streams) + " flows, 64 bytes long.",
	}
	arms := named(stock, stockAgain, handAlone)
	without := map[string]part{}
	for _, p := range partsOf {
		arms, without[p.name] = append(arms, arm{name: p.name}), p
	}
	gateways, done, err := o.gateways(arms, func(g *gateway) error {
		g.limit = o.flows
		p, there := without[g.name]
		if !there {
			return nil
		}
		tables, err := g.Gateway.Output(o.exe, "rules", "--subnet="+lab.InsideNet.String(), "--backend=nft", "--lifetime=1h", "--learn-rate=100000")
		if err != nil {
			return err
		}
		if g.tables, err = p.cut(tables); err != nil {
			return err
		}
		return g.NFT(g.tables)
	})
	defer done()
	if err != nil {
		return nil, err
	}
	r := o.race([]cell{
		streamCell(twoWay, streams, 64, true),
		streamCell(oneWay, streams, 64, false),
		flowCell(newFlow, lab.Shape{}, toNewPeers(5060), nil),
		flowCell(tcpFlow, lab.Shape{TCP: true}, toNewPeers(443), nil),
	})
	r.clear = (*gateway).forget
	return []*table{t}, t.measure(r, gateways)
}

// cut takes the part out of tables in nft's syntax, and lets the chain learn work without a
// daemon.
func (p part) cut(tables string) (string, error) {
	var kept []string
	chain, found := "", p.name == allParts.name
	for line := range strings.Lines(tables) {
		words := strings.Fields(line)
		switch {
		case len(words) == 3 && words[0] == "chain":
			chain = words[1]
		case len(words) == 1 && words[0] == "}":
			if slices.Contains(strings.Fields(p.hook), chain) {
				chain, found = "", true
				continue
			}
			chain = ""
		case chain == "" || words == nil || words[0] == "type":
		default:
			lacks := chain == p.chain || slices.ContainsFunc(p.rules, func(s string) bool { return strings.Contains(line, s) })
			if lacks {
				found = true
				continue
			}
		}
		if !slices.Contains(strings.Fields(p.hook), chain) || chain == "" {
			kept = append(kept, line)
		}
	}
	if !found {
		return "", fmt.Errorf("%s: the tables do not have it: change partsOf", p.name)
	}
	return strings.Join(kept, "") + "add element ip conenat alive { udp }\n", nil
}
