package rules_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// Fails when a part of a permission does not reach the next daemon, or when a dropped key
// stays.
func TestWhatWasRevokedIsKnownToTheNextDaemon(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	tables := open(t, l)
	set(t, tables, rules.Desired{OutsideLinks: []string{"wan0"}})
	key := func(ext, peer string, zone uint16, hostBits uint8) cone.Key {
		return cone.Key{Ext: cone.EndpointFrom(netip.MustParseAddrPort(ext)), Peer: cone.AddrFrom(netip.MustParseAddr(peer)), Zone: zone, HostBits: hostBits}
	}
	keys := []cone.Key{
		key("198.51.100.1:5060", "203.0.113.5", 0, 0),
		key("198.51.100.1:5060", "203.0.113.0", 0, 8),
		key("198.51.100.1:5060", "203.0.113.5", 7, 0),
		key("[2001:db8:47:11::109]:5060", "2001:db8:1::5", 0, 0),
	}
	here := tables.NewRevoked()
	if here.Any() {
		t.Error("something is there at the start")
	}
	check(t, here.Add(keys))
	check(t, here.Add(keys)) // again
	list, err := l.Gateway.Output("nft", "list", "set", "inet", "conenat", "revoked")
	if check(t, err); strings.Count(list, "timeout") != len(keys)+1 { // and the flag
		t.Errorf("nft shows %s", list)
	}
	for left := keys; ; left = left[1:] {
		next := tables.NewRevoked()
		got, err := next.Adopt()
		if check(t, err); len(got) != len(left) || next.Any() != (len(left) > 0) {
			t.Fatalf("revoked: %v, want %v", got, left)
		}
		for _, k := range left {
			if !slices.Contains(got, k) || !next.Has(k) {
				t.Errorf("revoked: %v, and not %v", got, k)
			}
		}
		if len(left) == 0 {
			break
		}
		check(t, next.Drop(left[:1])) // which another one added
	}
	check(t, here.Drop(keys)) // they ended
	if here.Any() {
		t.Error("something is left")
	}
}

// Fails when a new Map does not lift a denial of an earlier one.
func TestDenialsOfAnEarlierDaemonAreLifted(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	in := g.inside(5060)
	p := g.contact(in, g.peer(lab.PeerA, 5060))
	check(t, g.m.Deny([]cone.Permission{p}, cone.ReasonRevoked))
	g.holds()
	g.m = g.tables.NewMap(learning.Map)
	check(t, g.m.AdoptDenied())
	g.grant(p)
	check(t, g.m.Revoke([]cone.Permission{p}))
	g.contact(in, g.peer(lab.PeerA, 5061))
	g.holds(p)
}
