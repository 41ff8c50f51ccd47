package rules_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

// Fails when denials are not told apart, and when a new Map does not know of them.
func TestWhatWasRevokedIsKnownToTheNextDaemon(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	in := g.inside(5060)
	revoked := g.contact(in, g.peer(lab.PeerA, 5060))
	limited, forwarded := revoked, revoked
	limited.Peer, forwarded.Peer = strangers(0, 1)[0].Peer, strangers(1, 1)[0].Peer
	deny := func(p cone.Permission, why cone.Reason) {
		t.Helper()
		check(t, g.m.Deny([]cone.Permission{p}, why))
	}
	deny(limited, cone.ReasonHostLimit)
	deny(forwarded, cone.ReasonForwarded)
	deny(revoked, cone.ReasonHostLimit)
	deny(revoked, cone.ReasonRevoked) // and then by the user
	deny(revoked, cone.ReasonHostLimit)
	g.holds()

	next := g.tables.NewMap(learning.Map)
	keys, err := next.Revoked()
	if check(t, err); !slices.Equal(keys, []cone.Key{revoked.Key}) {
		t.Errorf("revoked: %v, want %v", keys, revoked.Key)
	}
	list, err := g.Gateway.Output("nft", "list", "set", "ip", "conenat", "denied")
	if check(t, err); strings.Count(list, `comment "revoked"`) != 1 {
		t.Errorf("nft shows %s", list)
	}
	// It lifts what it did not deny itself.
	g.m = next
	g.grant(revoked, limited)
	check(t, g.m.Revoke([]cone.Permission{revoked, limited}))
	g.contact(in, g.peer(lab.PeerA, 5061))
	g.holds(revoked)
	if keys, err := g.tables.NewMap(learning.Map).Revoked(); len(keys) > 0 {
		t.Errorf("revoked: %v, %v", keys, err)
	}
}
