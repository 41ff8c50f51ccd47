package rules_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

func TestGrantAdmitsThePeerFromAnyPortAndNobodyElse(t *testing.T) {
	g := newGate(t, lab.Options{}, granting)
	in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
	p := g.contact(in, peer)
	g.lost(in, g.peer(lab.PeerA, 5070), p.Ext, peer)
	g.holds()

	g.grant(p)
	g.holds(p)
	g.arrives(in, g.peer(lab.PeerA, 5071), p.Ext)
	g.lost(in, g.peer(lab.PeerB, 5070), p.Ext, peer)
	if c := count(t, g.tables); c.Admitted != 1 {
		t.Errorf("%+v", c)
	}

	check(t, g.m.Revoke([]cone.Permission{p, p}))
	g.holds()
	g.lost(in, g.peer(lab.PeerA, 5072), p.Ext, peer)
}

// Fails when one of the user's chains comes after ours.
func TestUsersForwardWins(t *testing.T) {
	for _, priority := range []string{"dstnat", "-90", "500", "2147483645"} {
		t.Run(priority, func(t *testing.T) {
			g := newGate(t, lab.Options{Inside: 2, Rules: lab.Masquerade + `table ip user { chain c {
				type nat hook prerouting priority ` + priority + `; iifname "wan0" udp dport 5060 dnat to 10.47.11.110; }; }`}, granting)
			in := g.inside(5060)
			other := listen(t, g.Inside(1), g.Inside(1).Addr, 5060)
			p := g.contact(in, g.peer(lab.PeerA, 5060))
			g.grant(p)
			g.arrives(other, g.peer(lab.PeerA, 5070), p.Ext)
		})
	}
}

func TestPortThatTheGatewayServesStaysItsOwn(t *testing.T) {
	g := newGate(t, lab.Options{}, granting)
	in := g.inside(5060)
	p := g.contact(in, g.peer(lab.PeerA, 5060))
	g.grant(p)
	for _, addr := range []netip.Addr{g.Gateway.Addr, netip.IPv4Unspecified()} {
		server, err := g.Gateway.Socket(addr, 5060)
		if err != nil {
			t.Fatal(err)
		}
		g.arrives(server, g.peer(lab.PeerA, 0), p.Ext)
		check(t, server.Close())
	}
	g.arrives(in, g.peer(lab.PeerA, 0), p.Ext)
}

// In a group one contact permits all peers, in an open subnet everybody. The kernel and the
// daemon grant the same. Excluded peers stay out.
func TestPermissionsForManyPeers(t *testing.T) {
	group := netip.MustParsePrefix("203.0.113.4/31") // PeerA is its second address
	stranger := netip.MustParseAddr("203.0.113.99")
	for _, test := range []struct {
		name    string
		open    bool
		mark    uint32
		in, out []netip.Addr
	}{
		{"a group", false, 0, []netip.Addr{lab.PeerA, lab.PeerA.Prev()}, []netip.Addr{lab.PeerA.Next(), lab.PeerC}},
		{"a group, marked", false, 7, []netip.Addr{lab.PeerA, lab.PeerA.Prev()}, []netip.Addr{lab.PeerC}},
		{"everybody", true, 0, []netip.Addr{lab.PeerA, lab.PeerC, stranger}, []netip.Addr{lab.PeerB}},
		{"everybody, marked", true, 7, []netip.Addr{lab.PeerA, lab.PeerC, stranger}, []netip.Addr{lab.PeerB}},
	} {
		for _, learn := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, learn %v", test.name, learn), func(t *testing.T) {
				d, m := learning, *learning.Map
				m.Learn, m.PeerGroups = learn, []netip.Prefix{group, netip.MustParsePrefix("100.64.0.0/24")}
				if test.open {
					m.OpenSubnets = m.Subnets
				}
				d.Map = &m
				g := newGate(t, lab.Options{Rules: lab.Masquerade + fmt.Sprintf(`table ip marks { chain c {
					type filter hook forward priority 0; ct mark set %d; }; }`, test.mark)}, d)
				in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
				p := g.contact(in, peer)
				p.Mark, p.HostBits = test.mark, 1
				if test.open {
					p.HostBits = 32
				}
				p.Peer = p.Peer.WithoutLow(p.HostBits)
				if !learn {
					g.grant(p)
				}
				g.holds(p)
				for _, a := range test.in {
					g.arrives(in, g.peer(a, 5070), p.Ext)
				}
				for _, a := range test.out { // PeerB is excluded
					g.lost(in, g.peer(a, 5071), p.Ext, peer)
				}
				g.contact(in, g.peer(lab.PeerA, 5072)) // it is in the map already
				g.holds(p)
				g.m.Renew([]cone.Permission{p}, func(int) { t.Error("lost") })
				check(t, g.m.Missing([]cone.Permission{p}, func(int) { t.Error("missing") }))
				check(t, g.m.Deny([]cone.Permission{p}, cone.ReasonForwarded))
				g.holds()
				g.contact(in, g.peer(lab.PeerA, 5073))
				g.holds()
			})
		}
	}
}

func TestMissingIsWhatDoesNotStand(t *testing.T) {
	g := newGate(t, lab.Options{}, granting)
	ps := strangers(0, 600) // three batches
	g.grant(ps...)
	const gone, moved = 300, 599
	check(t, g.m.Revoke(ps[gone:gone+1]))
	another := ps[moved]
	another.Int.Port++
	g.grant(another)
	var got []int
	check(t, g.m.Missing(ps, func(i int) { got = append(got, i) }))
	if !slices.Equal(got, []int{gone, moved}) {
		t.Errorf("missing are %v, want %d and %d", got, gone, moved)
	}
}

func TestChildrenOfTheMapAreCapped(t *testing.T) {
	capped := func(learn bool) rules.Desired {
		d, m := learning, *learning.Map
		m.Learn, m.MaxChildren = learn, 10
		d.Map = &m
		return d
	}
	for _, learn := range []bool{true, false} {
		for _, mark := range []uint32{0, 7} {
			t.Run(fmt.Sprintf("learn %v, mark %d", learn, mark), func(t *testing.T) {
				g := newGate(t, lab.Options{Rules: lab.Masquerade + fmt.Sprintf(`table ip marks { chain c {
					type filter hook forward priority 0; ct mark set %d; }; }`, mark)}, capped(learn))
				in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
				p := g.contact(in, peer)
				p.Mark = mark
				if !learn {
					g.grant(p)
				}
				g.holds(p)
				send(t, g.Lab, lab.PeerA, 40, p.Ext.Netip())
				got := 0
				eventually(t, func() bool { got += receive(t, in); return got >= 10 })
				c := count(t, g.tables)
				if got != 10 || c.Admitted != 10 || c.GuardDrops != 30 {
					t.Errorf("%d came in; %+v", got, c)
				}

				// Another cap applies at once.
				d := capped(learn)
				d.Map.MaxChildren = 100
				_, err := g.tables.Set(d)
				check(t, err)
				before := got
				send(t, g.Lab, lab.PeerA, 40, p.Ext.Netip())
				eventually(t, func() bool { got += receive(t, in); return got == before+40 })
			})
		}
	}
}

func TestGrantReplacesAnothersPermission(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	ext := netip.MustParseAddrPort("198.51.100.1:5060")
	p := permission(ext, netip.MustParseAddrPort("10.47.11.109:5060"), lab.PeerA)
	q := permission(ext, netip.MustParseAddrPort("10.47.11.110:5060"), lab.PeerA)
	r := permission(ext, netip.MustParseAddrPort("10.47.11.111:5060"), lab.PeerC)
	g.grant(p, r)
	g.grant(p)
	g.holds(p, r)
	g.grant(r, q)
	g.holds(q, r)
}

func TestRenewRenewsTheTimeoutAndTellsWhatIsLost(t *testing.T) {
	g := newGate(t, lab.Options{}, granting)
	ext := netip.MustParseAddrPort("198.51.100.1:5060")
	in := netip.MustParseAddrPort("10.47.11.109:5060")
	p, gone, q := permission(ext, in, lab.PeerA), permission(ext, in, lab.PeerB), permission(ext, in, lab.PeerC)
	g.m.SetLifetime(time.Minute)
	g.grant(p, q)
	g.m.SetLifetime(time.Hour)
	var lost []int
	g.m.Renew([]cone.Permission{p, gone, q}, func(i int) { lost = append(lost, i) })
	if len(lost) != 1 || lost[0] != 1 {
		t.Errorf("lost %v, want [1]", lost)
	}
	for p, left := range g.list() {
		if left < 50*time.Minute {
			t.Errorf("%v has %v left", p, left)
		}
	}
	g.holds(p, q)
}

func TestFullMapRefusesAndGoesOn(t *testing.T) {
	d, m := granting, *granting.Map
	m.Size = 10
	d.Map = &m
	g := newGate(t, lab.Options{}, d)
	var ps []cone.Permission
	for i := range 15 {
		ps = append(ps, permission(netip.AddrPortFrom(g.Gateway.Addr, uint16(5000+i)), netip.MustParseAddrPort("10.47.11.109:5060"), lab.PeerA))
	}
	refused := 0
	g.m.Grant(ps, func(i int, r cone.Reason, err error) {
		refused++
		if r != cone.ReasonTableFull || err == nil {
			t.Error(i, r, err)
		}
	})
	if refused != 5 {
		t.Errorf("%d refused, want 5", refused)
	}
	g.holds(ps[:10]...)
	g.m.Renew(ps[:10], func(i int) { t.Error("lost", i) }) // a full map can be refreshed
	check(t, g.m.Revoke(ps))
	g.grant(ps[10:]...)
	g.holds(ps[10:]...)
}

func TestManyBatches(t *testing.T) {
	g := newGate(t, lab.Options{}, granting)
	var ps []cone.Permission
	for i := range 1000 {
		ps = append(ps, permission(netip.AddrPortFrom(g.Gateway.Addr, uint16(5000+i)), netip.MustParseAddrPort("10.47.11.109:5060"), lab.PeerA))
	}
	g.grant(ps...)
	g.holds(ps...)
	check(t, g.m.Revoke(ps))
	g.holds()
}

func TestTableThatIsGoneRefusesNothing(t *testing.T) {
	g := newGate(t, lab.Options{}, granting)
	p := permission(netip.MustParseAddrPort("198.51.100.1:5060"), netip.MustParseAddrPort("10.47.11.109:5060"), lab.PeerA)
	if g.m.Broken() {
		t.Error("broken from the beginning")
	}
	check(t, g.tables.Remove())
	g.grant(p)
	if !g.m.Broken() || g.m.Broken() {
		t.Error("that the table is gone must be told once")
	}
	g.holds()
	check(t, g.m.Revoke([]cone.Permission{p}))
	lost := 0
	g.m.Renew([]cone.Permission{p}, func(int) { lost++ })
	if lost != 1 {
		t.Error("not lost")
	}
}

func TestSettingsChangeWithoutTouchingPermissions(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
	p := g.contact(in, peer)
	m := *learning.Map
	m.Lifetime, m.LearnRate, m.Subnets, m.ExcludePeers, m.ExcludePorts = time.Hour, 7, nil, nil, []uint16{1, 2}
	for _, d := range []rules.Desired{{OutsideLinks: []string{"wan0"}, Map: &m}, granting, learning} {
		set(t, g.tables, d)
		g.holds(p)
	}
	// Another process takes it over.
	check(t, g.tables.Close())
	g.tables = open(t, g.Lab)
	set(t, g.tables, learning)
	g.holds(p)
	// Without a map there is no table for it.
	set(t, g.tables, guard)
	g.holds()
}

func TestChangedTellsWhoseTransactionItWas(t *testing.T) {
	g := newGate(t, lab.Options{}, granting)
	p := permission(netip.MustParseAddrPort("198.51.100.1:5060"), netip.MustParseAddrPort("10.47.11.109:5060"), lab.PeerA)
	other := permission(netip.MustParseAddrPort("198.51.100.1:5061"), netip.MustParseAddrPort("10.47.11.109:5061"), lab.PeerA)
	_, err := g.tables.Changed()
	check(t, err)
	for _, step := range []struct {
		name string
		do   func()
		want bool
	}{
		{"nothing", func() {}, false},
		{"a grant", func() { g.grant(p) }, false},
		{"a grant of what stands", func() { g.grant(p) }, false},
		{"a revocation", func() { check(t, g.m.Revoke([]cone.Permission{p})) }, false},
		{"two of what is gone", func() { check(t, g.m.Revoke([]cone.Permission{p, other})) }, false},
		{"the same", func() { set(t, g.tables, granting) }, false},
		{"somebody's table", func() { check(t, g.NFT("table ip other { }")) }, true},
		{"before a grant", func() { check(t, g.NFT("delete table ip other")); g.grant(p) }, true},
		{"before grants of what stands", func() {
			check(t, g.NFT("table ip other { }"))
			for range 3 {
				g.grant(p)
			}
		}, true},
		{"after a grant", func() { g.grant(other); check(t, g.NFT("delete table ip other")) }, true},
		{"between grants", func() {
			check(t, g.m.Revoke([]cone.Permission{p, other}))
			g.grant(p)
			check(t, g.NFT("table ip other { }"))
			g.grant(other)
			g.grant(other)
		}, true},
		{"grants", func() { g.grant(p); check(t, g.m.Revoke([]cone.Permission{p})); g.grant(p) }, false},
		{"packets", func() { g.contact(g.inside(5060), g.peer(lab.PeerA, 5060)) }, false},
	} {
		step.do()
		got, err := g.tables.Changed()
		check(t, err)
		if got != step.want {
			t.Errorf("%s: %v, want %v", step.name, got, step.want)
		}
	}
}

// The inside host sees the peer's own address, even if the user's rules translate incoming
// packets. Packets that the user's own rules forward are translated as before.
//
// Fails without the chain keep_source.
func TestChildrenKeepTheirSource(t *testing.T) {
	for name, rule := range map[string]string{
		"masquerade of everything":     `masquerade`,
		"masquerade of what is DNATed": `oifname "lan0" ct status dnat masquerade fully-random`,
		"snat to the inside":           `oifname "lan0" snat to 10.47.11.1; oifname "wan0" masquerade`,
	} {
		for _, open := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, open %v", name, open), func(t *testing.T) {
				d, m := learning, *learning.Map
				if open {
					m.OpenSubnets = m.Subnets
				}
				d.Map = &m
				g := newGate(t, lab.Options{Rules: `table ip user {
					chain post { type nat hook postrouting priority srcnat; ` + rule + `; oifname "wan0" masquerade; }
					chain pre { type nat hook prerouting priority dstnat; iifname "wan0" udp dport 7000 dnat to 10.47.11.109; }
				}`}, d)
				in, forwarded := g.inside(5060), g.inside(7000)
				p := g.contact(in, g.peer(lab.PeerA, 5060))
				for _, port := range []uint16{5070, 5071} {
					g.arrives(in, g.peer(lab.PeerA, port), p.Ext)
				}
				for _, child := range entries(t, g.Lab, "-p", "udp", "--orig-port-dst", "5060", "--orig-src", lab.PeerA.String()) {
					if !strings.Contains(child, "src=10.47.11.109 dst="+lab.PeerA.String()) {
						t.Errorf("the child is %q", child)
					}
				}
				ext := p.Ext
				ext.Port = 7000
				g.arrives(forwarded, g.peer(lab.PeerA, 5072), ext)
				if flow := entries(t, g.Lab, "-p", "udp", "--sport", "5072"); len(flow) != 1 || !strings.Contains(flow[0], "src=10.47.11.109 dst=10.47.11.1 ") {
					t.Errorf("the user's own forward is %q", flow)
				}
				if n := count(t, g.tables).Admitted; n != 2 {
					t.Errorf("%d were admitted", n)
				}
			})
		}
	}
}
