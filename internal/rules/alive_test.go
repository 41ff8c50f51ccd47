package rules_test

import (
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// silence lets the time run out for which the kernel learns without a sign of life.
func silence(t *testing.T, l *lab.Lab, tables *rules.Tables) {
	t.Helper()
	check(t, tables.Close()) // nobody else may change tables that have an owner
	if list := output(t, l, "nft", "list", "set", "ip", "conenat", elements.AliveSet); !strings.Contains(list, "udp") {
		t.Errorf("new tables have no sign of life:\n%s", list)
	}
	check(t, l.NFT("flush set ip conenat "+elements.AliveSet))
}

// Fails when what a dead daemon left, or a saved copy of its tables, learns for ever.
func TestKernelLearnsNothingAfterLongSilence(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	peer := g.peer(lab.PeerA, 5060)
	p := g.contact(g.inside(5060), peer)
	g.holds(p)
	silence(t, g.Lab, g.tables)
	in := g.inside(5070)
	g.contact(in, peer)
	g.tables = open(t, g.Lab) // by the next daemon
	set(t, g.tables, learning)
	g.m = g.tables.NewMap(learning.Map)
	g.holds(p)
	check(t, g.tables.NewAlive().Keep(time.Hour))
	g.holds(p, g.contact(in, g.peer(lab.PeerA, 5061)))
}

// Mappings that exist go on, for the flows of their hosts. Others are left to the user's rules.
func TestKernelMapsNothingNewAfterLongSilence(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	one, two, other, peers := m.host(0, 3074), m.host(1, 3074), m.host(1, 4000), m.peers()
	m.maps(one, m.ext(3074), peers[0])
	silence(t, m.Lab, m.tables)
	if ext := m.contact(two, peers[1]); ext != m.ext(3074) {
		t.Errorf("a newcomer leaves as %v, not as the rules give", ext)
	}
	m.contact(other, peers[1])
	m.maps(one, m.ext(3074), peers[2])
	m.tables = open(t, m.Lab)
	set(t, m.tables, mapping)
	m.holds(mapped(one, m.ext(3074)))
	check(t, m.tables.NewAlive().Keep(time.Hour))
	m.contact(other, peers[2])
	m.holds(mapped(one, m.ext(3074)), mapped(other, m.ext(4000)))
}

// Each renewal is a transaction, which makes others list the ruleset anew.
func TestSignOfLifeIsRenewedWhenHalfIsLeft(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	alive := g.tables.NewAlive()
	for i, step := range []struct {
		last         time.Duration
		transactions uint32
	}{{time.Hour, 0}, {90 * time.Minute, 0}, {10 * time.Hour, 1}, {10 * time.Hour, 0}, {time.Hour, 0}, {24 * time.Hour, 1}} {
		before := g.generation()
		check(t, alive.Keep(step.last))
		if n := g.generation() - before; n != step.transactions {
			t.Errorf("step %d: %d transactions", i, n)
		}
	}
}
