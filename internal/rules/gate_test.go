package rules_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// learning has every part of the table.
var learning = rules.Desired{
	OutsideLinks: []string{"wan0"}, Subnets: both, Guard: true, Helpers: onAnchors, MaxChildren: 256,
	Map: &rules.MapConfig{
		Size: 1000, Lifetime: 5 * time.Minute, MaxChildren: 256, Learn: true, LearnRate: 100,
		Subnets:          []netip.Prefix{lab.InsideNet},
		ExcludePeers:     []netip.Prefix{netip.PrefixFrom(lab.PeerB, 32)},
		ExcludePeerPorts: []uint16{53},
		ExcludePorts:     []uint16{5066},
	},
}

// granting is the same without learning.
var granting = func() rules.Desired {
	d, m := learning, *learning.Map
	m.Learn = false
	d.Map = &m
	return d
}()

// A gate is a lab with our tables and a host inside.
type gate struct {
	*lab.Lab
	t      *testing.T
	tables *rules.Tables
	m      *elements.Map
}

func newGate(t *testing.T, o lab.Options, d rules.Desired) *gate {
	t.Helper()
	l := lab.ForTest(t, o)
	tables := open(t, l)
	set(t, tables, d)
	return &gate{l, t, tables, tables.NewMap(d.Map)}
}

func (g *gate) inside(port uint16) *lab.Socket {
	g.t.Helper()
	return listen(g.t, g.Inside(0), g.Inside(0).Addr, port)
}

func (g *gate) peer(addr netip.Addr, port uint16) *lab.Socket {
	g.t.Helper()
	return listen(g.t, g.Outside, addr, port)
}

// contact makes in send to peer and returns the permission that results.
func (g *gate) contact(in, peer *lab.Socket) cone.Permission {
	g.t.Helper()
	ext, err := in.Contact(peer)
	if err != nil {
		g.t.Fatal(err)
	}
	return permission(ext, in.Addr(), peer.Addr().Addr())
}

func permission(ext, in netip.AddrPort, peer netip.Addr) cone.Permission {
	return cone.Permission{
		Key: cone.Key{Ext: cone.EndpointFrom(ext), Peer: cone.AddrFrom(peer)}, Int: cone.EndpointFrom(in),
	}
}

// generation returns the generation of the ruleset, which each transaction increments.
func (g *gate) generation() uint32 {
	g.t.Helper()
	c, err := nfnl.Dial(g.Gateway.FD())
	check(g.t, err)
	defer c.Close()
	id, err := nfnl.Generation(c)
	check(g.t, err)
	return id
}

func (g *gate) grant(ps ...cone.Permission) {
	g.t.Helper()
	g.m.Grant(ps, func(i int, r cone.Reason, err error) { g.t.Fatal(ps[i], r, err) })
}

// list returns what is in the map.
func (g *gate) list() map[cone.Permission]time.Duration {
	g.t.Helper()
	found := map[cone.Permission]time.Duration{}
	check(g.t, g.m.List(func(p cone.Permission, left time.Duration) { found[p] = left }))
	return found
}

// holds checks that the map holds exactly ps.
func (g *gate) holds(ps ...cone.Permission) {
	g.t.Helper()
	hasJust(g.t, g.list(), ps)
}

// hasJust checks that found has exactly the wanted values, which must be distinct.
func hasJust[E comparable](t *testing.T, found map[E]time.Duration, want []E) {
	t.Helper()
	for _, e := range want {
		if _, ok := found[e]; !ok {
			t.Errorf("the kernel lacks %v", e)
		}
	}
	if len(found) != len(want) {
		t.Errorf("the kernel holds %v, want %v", found, want)
	}
}

func (g *gate) arrives(to, from *lab.Socket, ext cone.Endpoint) {
	g.t.Helper()
	check(g.t, lab.Arrives(to, lab.Packet{From: from, To: ext.Netip(), Payload: fmt.Sprint("from ", from.Addr())}))
}

// lost checks that a packet from from does not arrive, while the one from fence does.
func (g *gate) lost(to, from *lab.Socket, ext cone.Endpoint, fence *lab.Socket) {
	g.t.Helper()
	check(g.t, lab.Lost(to,
		lab.Packet{From: from, To: ext.Netip(), Payload: fmt.Sprint("from ", from.Addr())},
		lab.Packet{From: fence, To: ext.Netip(), Payload: "fence"}))
}
