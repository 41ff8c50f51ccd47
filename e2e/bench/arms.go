package main

import (
	"slices"

	"github.com/conenatd/conenatd/internal/lab"
)

// An arm is a kind of gateway.
type arm struct {
	name   string
	rules  string   // "" is plain masquerade
	args   []string // of conenatd; nil is a gateway without it
	dead   bool     // conenatd was killed after its start
	listen listening
	// minimal is the minimal loop in the place of conenatd.
	minimal bool
	// standing is how many permissions this arm can have at once; 0 is any number.
	standing int
}

// listening is who receives the conntrack events of a gateway without conenatd.
type listening int

const (
	nobody     listening = iota
	silent               // a socket that is never read
	reader               // a thread that reads each event, and does nothing with it
	conntrackE           // conntrack -E
)

// The permissions of ten lines of nft, as people write them by hand. The places of %s are for
// the statement that makes it lean.
const (
	handHead = lab.Masquerade + `table ip hand {
	map permissions {
		type ipv4_addr . inet_service . ipv4_addr : ipv4_addr . inet_service
		size 1048576; flags dynamic,timeout; timeout 1h;
	}
	chain admit {
		type nat hook prerouting priority dstnat;
		iifname "wan0" meta l4proto udp dnat ip to ip daddr . udp dport . ip saddr map @permissions
	}
	chain learn {
		type filter hook postrouting priority 290;
		oifname "wan0" meta l4proto udp ct state new ct status snat add @permissions { ct reply ip daddr . ct reply proto-dst . ct original ip daddr : ct original ip saddr . ct original proto-src }`
	hand     = handHead + "\n\t}\n}\n"
	handLean = handHead + " ct event set destroy\n\t}\n}\n"
)

// static is one port forward of the user's.
const static = lab.Masquerade + `table ip user { chain c {
	type nat hook prerouting priority dstnat; iifname "wan0" udp dport 5060 dnat to 10.47.11.109:5060; }; }
`

// expectations is how many permissions the expect backend can have in a namespace: the table
// of expectations of all namespaces is small.
const expectations = 48

// The arms by name.
const (
	stock       = "stock"
	stockAgain  = "stock again (A/A)"
	stockE      = "stock, conntrack -E listens"
	stockSilent = "stock, a listener that never reads"
	stockReader = "stock, a listener that reads"
	handAlone   = "hand"
	handReader  = "hand, a listener that reads"
	handIsLean  = "hand, lean, a listener that reads"

	minimal      = "minimal loop"
	minimalAgain = "minimal loop again (A/A)"

	staticAlone  = "static DNAT"
	staticAgain  = "static DNAT again (A/A)"
	staticReader = "static DNAT, a listener that reads"
	staticNoise  = "static DNAT, a listener that reads, again (A/A)"
)

var withoutConenatd = []arm{
	{name: stock},
	{name: stockAgain},
	{name: stockSilent, listen: silent},
	{name: stockReader, listen: reader},
	{name: stockE, listen: conntrackE},
	{name: handAlone, rules: hand},
	{name: handReader, rules: hand, listen: reader},
	{name: handIsLean, rules: handLean, listen: reader},
	{name: minimal, minimal: true},
	{name: minimalAgain, minimal: true},
	{name: staticAlone, rules: static},
	{name: staticAgain, rules: static},
	{name: staticReader, rules: static, listen: reader},
	{name: staticNoise, rules: static, listen: reader},
}

// modes are those of conenatd that have rules of their own.
var modes = []struct {
	name     string
	args     []string
	lean     bool // whether events = "lean" is possible
	standing int
}{
	{"expect", []string{"--backend=expect", "--max-children=0"}, false, expectations},
	{"nft", []string{"--backend=nft"}, true, 0},
	{"nft by event", []string{"--backend=nft", "--learn=false"}, false, 0},
	{"auto", []string{"--backend=auto"}, true, 0},
	{"auto + mapping", []string{"--backend=auto", "--mapping=endpoint_independent"}, true, 0},
}

// withConenatd returns an arm for each mode: alive, lean where that is possible, and dead.
func withConenatd() (all []arm) {
	always := []string{
		"--subnet=" + lab.InsideNet.String(), "--lifetime=1h", "--log-level=warn",
		"--learn-rate=100000", "--max-permissions-per-host=0", "--max-children=1000000",
	}
	for _, m := range modes {
		args := slices.Concat(always, m.args)
		all = append(all, arm{name: m.name, args: append(slices.Clone(args), "--events=all"), standing: m.standing})
		if m.lean {
			all = append(all, arm{name: m.name + ", lean and quiet", args: append(slices.Clone(args), "--events=lean")})
		}
		all = append(all, arm{name: m.name + ", dead", args: append(slices.Clone(args), "--events=all"), dead: true, standing: m.standing})
	}
	return all
}

// named returns arms by their names, in this order.
func named(names ...string) (arms []arm) {
	all := slices.Concat(withoutConenatd, withConenatd())
	for _, name := range names {
		i := slices.IndexFunc(all, func(a arm) bool { return a.name == name })
		if i < 0 {
			panic("no arm " + name)
		}
		arms = append(arms, all[i])
	}
	return arms
}

// lean reports whether the arm's conenatd hides flows.
func (a arm) lean() bool { return slices.Contains(a.args, "--events=lean") }
