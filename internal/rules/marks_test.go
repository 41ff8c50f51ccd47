package rules_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// Policy routing by connmarks sends the answers of a child out by the link by which it came
// in.
func TestChildrenInheritTheConnmark(t *testing.T) {
	const marks = `table ip marks { chain c { type filter hook prerouting priority mangle; iifname "lan0" ct mark set 42; }; }`
	for name, d := range map[string]rules.Desired{"learned": learning, "granted": granting} {
		t.Run(name, func(t *testing.T) {
			g := newGate(t, lab.Options{Rules: lab.Masquerade + marks}, d)
			in := g.inside(5060)
			p := g.contact(in, g.peer(lab.PeerA, 5060))
			p.Mark = 42
			if !d.Map.Learn {
				g.grant(p)
			}
			g.holds(p)
			g.arrives(in, g.peer(lab.PeerA, 5070), p.Ext)
			if child := entries(t, g.Lab, "-p", "udp", "--sport", "5070"); len(child) != 1 || !strings.Contains(child[0], "mark=42 ") {
				t.Errorf("the child is %q", child)
			}
		})
	}
}

// A mark that the user's rules gave to the child itself stays.
func TestPermissionWithoutMarkLeavesTheMarkOfTheChild(t *testing.T) {
	g := newGate(t, lab.Options{Rules: lab.Masquerade +
		`table ip marks { chain c { type filter hook prerouting priority mangle; iifname "wan0" ct state new ct mark set 7; }; }`}, learning)
	in := g.inside(5060)
	p := g.contact(in, g.peer(lab.PeerA, 5060))
	g.arrives(in, g.peer(lab.PeerA, 5070), p.Ext)
	if child := entries(t, g.Lab, "-p", "udp", "--sport", "5070"); len(child) != 1 || !strings.Contains(child[0], "mark=7 ") {
		t.Errorf("the child is %q", child)
	}
}

// A mark follows its permission: when it is granted, changed, renewed, restored and
// revoked.
func TestMarksStandAndGoWithTheirPermissions(t *testing.T) {
	g := newGate(t, lab.Options{}, granting)
	p := permission(netip.MustParseAddrPort("198.51.100.1:5060"), netip.MustParseAddrPort("10.47.11.109:5060"), lab.PeerA)
	plain := permission(netip.MustParseAddrPort("198.51.100.1:5061"), netip.MustParseAddrPort("10.47.11.109:5061"), lab.PeerA)
	marks := func() string { return output(t, g.Lab, "nft", "list", "map", "ip", "conenat", "marks") }
	g.m.SetLifetime(time.Minute)
	for _, mark := range []uint32{42, 42, 43} {
		p.Mark = mark
		g.grant(plain, p)
		g.holds(plain, p)
	}
	q := p
	q.Int.Port++
	q.Mark = 0
	g.grant(q)
	g.holds(plain, q)
	if list := marks(); strings.Contains(list, "elements") {
		t.Error("the mark of the former one stands:", list)
	}
	q.Mark = p.Mark
	g.grant(p)
	g.grant(q)
	g.holds(plain, q)

	g.m.SetLifetime(time.Hour)
	for _, mark := range []uint32{43, 44} {
		q.Mark = mark
		g.m.Renew([]cone.Permission{plain, q}, func(int) { t.Error("lost") })
		g.holds(plain, q)
		if list := marks(); !strings.Contains(list, "timeout 1h ") {
			t.Error("the mark was not renewed:", list)
		}
	}
	check(t, g.tables.Close()) // an owner alone may change it
	check(t, g.NFT("flush map ip conenat marks"))
	g.tables = open(t, g.Lab)
	set(t, g.tables, granting)
	g.m = g.tables.NewMap(granting.Map)
	g.m.Renew([]cone.Permission{plain, q}, func(int) { t.Error("lost") })
	g.holds(plain, q)

	check(t, g.m.Revoke([]cone.Permission{plain, q, q}))
	g.holds()
	if list := marks(); strings.Contains(list, "elements") {
		t.Error("the mark stands still:", list)
	}
}
