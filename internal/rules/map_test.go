package rules_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
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

// contact lets in send to peer and returns the permission that this gives.
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

// holds checks that the map holds just ps.
func (g *gate) holds(ps ...cone.Permission) {
	g.t.Helper()
	found := g.list()
	for _, p := range ps {
		if _, ok := found[p]; !ok {
			g.t.Errorf("the map lacks %v", p)
		}
	}
	if len(found) != len(ps) {
		g.t.Errorf("the map holds %v, want %v", found, ps)
	}
}

func (g *gate) arrives(to, from *lab.Socket, ext cone.Endpoint) {
	g.t.Helper()
	check(g.t, lab.Arrives(to, lab.Packet{From: from, To: ext.Netip(), Payload: fmt.Sprint("from ", from.Addr())}))
}

// lost checks that from does not reach in, while the fence does.
func (g *gate) lost(to, from *lab.Socket, ext cone.Endpoint, fence *lab.Socket) {
	g.t.Helper()
	check(g.t, lab.Lost(to,
		lab.Packet{From: from, To: ext.Netip(), Payload: fmt.Sprint("from ", from.Addr())},
		lab.Packet{From: fence, To: ext.Netip(), Payload: "fence"}))
}

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

func TestKernelLearnsFromTheFirstPacket(t *testing.T) {
	g := newGate(t, lab.Options{Inside: 2}, learning)
	in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
	p := g.contact(in, peer)
	g.holds(p)
	if left := g.list()[p]; left > 5*time.Minute || left < 4*time.Minute {
		t.Errorf("%v left of 5m", left)
	}
	g.arrives(in, g.peer(lab.PeerA, 5070), p.Ext)
	g.lost(in, g.peer(lab.PeerB, 5070), p.Ext, peer)
	if c := count(t, g.tables); c.Learned != 1 {
		t.Errorf("%+v", c)
	}
}

// Policy routing by connmarks sends the answers of a child out by the link that
// it came in by.
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

// Each packet would give a permission but for one thing.
func TestKernelLearnsNothingElse(t *testing.T) {
	for _, test := range []struct {
		name  string
		rules string
		send  func(g *gate)
	}{
		{"from a subnet that is not enabled", lab.Masquerade, func(g *gate) {
			in := listen(g.t, g.Guest, g.Guest.Addr, 5060)
			g.contact(in, g.peer(lab.PeerA, 5060))
		}},
		{"to an excluded peer", lab.Masquerade, func(g *gate) { g.contact(g.inside(5060), g.peer(lab.PeerB, 5060)) }},
		{"to an excluded port", lab.Masquerade, func(g *gate) { g.contact(g.inside(5060), g.peer(lab.PeerA, 53)) }},
		{"from an excluded outside port", lab.Masquerade, func(g *gate) { g.contact(g.inside(5066), g.peer(lab.PeerA, 5060)) }},
		{"without translation", lab.DropPolicy, func(g *gate) {
			check(g.t, g.inside(5060).Send(netip.AddrPortFrom(lab.PeerA, 5060), "x"))
		}},
		{"in another zone", lab.Masquerade + "table ip zones { chain c { type filter hook prerouting priority -300; ct zone set 7; }; }", func(g *gate) {
			check(g.t, g.inside(5060).Send(netip.AddrPortFrom(lab.PeerA, 5060), "x"))
		}},
		{"to a multicast address", lab.Masquerade, func(g *gate) {
			check(g.t, g.inside(5060).Send(netip.MustParseAddrPort("239.1.2.3:5060"), "x"))
		}},
		{"to the gateway", lab.Masquerade, func(g *gate) {
			check(g.t, g.inside(5060).Send(netip.AddrPortFrom(g.Gateway.Addr, 5060), "x"))
		}},
		{"from the gateway", lab.Masquerade, func(g *gate) {
			check(g.t, listen(g.t, g.Gateway, g.Gateway.Addr, 5060).Send(netip.AddrPortFrom(lab.PeerA, 5060), "x"))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := newGate(t, lab.Options{Guest: true, Rules: test.rules}, learning)
			test.send(g)
			// The rules have seen it: a packet that gives a permission comes later.
			check(t, g.NFT(`table ip nat2 { chain c { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }; }`))
			p := g.contact(g.inside(6000), g.peer(lab.PeerC, 6000))
			if strings.Contains(test.rules, "zone") {
				g.holds()
				return
			}
			g.holds(p)
		})
	}
}

// The source is an inside host's, the packet comes from outside.
func TestSpoofedSourceFromOutsideTeachesNothing(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	for _, name := range []string{"all", "wan0"} {
		check(t, g.Gateway.SetSysctl("net.ipv4.conf."+name+".rp_filter", "0"))
	}
	// One outside address lies behind the gateway for those who spoof.
	for _, args := range []string{
		"addr add 10.47.11.109/32 dev lo",
		"route add table local unicast 192.0.2.99/32 via 198.51.100.1",
	} {
		if _, err := g.Outside.Output("ip", strings.Fields(args)...); err != nil {
			t.Fatal(err)
		}
	}
	check(t, g.NFT(`table ip see { chain c {
		type filter hook postrouting priority 299; iifname "wan0" oifname "wan0" ct status snat counter; }; }`))
	spoofer := listen(t, g.Outside, g.Inside(0).Addr, 5060)
	check(t, spoofer.Send(netip.MustParseAddrPort("192.0.2.99:5060"), "x"))
	eventually(t, func() bool {
		return strings.Contains(output(t, g.Lab, "nft", "list", "chain", "ip", "see", "c"), "packets 1 ")
	})
	g.holds()
}

func TestSecondHostNeitherTakesOverNorRefreshes(t *testing.T) {
	g := newGate(t, lab.Options{Inside: 2}, learning)
	a := g.inside(5060)
	b := listen(t, g.Inside(1), g.Inside(1).Addr, 5060)
	p := g.contact(a, g.peer(lab.PeerA, 5060))
	before := g.list()[p]
	q := g.contact(b, g.peer(lab.PeerA, 5070)) // another port of the peer: the kernel shares the outside port
	if q.Ext != p.Ext {
		t.Fatalf("%v is not shared: %v", p.Ext, q.Ext)
	}
	g.holds(p)
	if after := g.list()[p]; after > before {
		t.Errorf("%v left, and %v after the second host sent", before, after)
	}
	g.arrives(a, g.peer(lab.PeerA, 5080), p.Ext)
}

func TestLearningHasARateForEachInsideAddress(t *testing.T) {
	d, m := learning, *learning.Map
	m.LearnRate = 1 // and five at once
	d.Map = &m
	g := newGate(t, lab.Options{Inside: 2}, d)
	in := g.inside(5060)
	for i := range 250 {
		check(t, in.Send(netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), 9), "x"))
	}
	other := listen(t, g.Inside(1), g.Inside(1).Addr, 7000)
	p := g.contact(other, g.peer(lab.PeerA, 7000))
	found := g.list()
	if _, ok := found[p]; !ok {
		t.Error("the rate of one host keeps another from learning")
	}
	if n := len(found) - 1; n < 5 || n > 50 {
		t.Errorf("%d permissions learned of 250 at once, want about 5", n)
	}
	if c := count(t, g.tables); c.Learned+c.LearnLimited != 251 {
		t.Errorf("%+v", c)
	}
	// Packets of a one-way flow that is known cost nothing of the rate.
	limited := count(t, g.tables).LearnLimited
	for range 100 {
		check(t, other.Send(netip.AddrPortFrom(lab.PeerA, 7000), "again"))
	}
	if c := count(t, g.tables); c.LearnLimited != limited {
		t.Errorf("%+v", c)
	}
}

// Counters stand behind the look at the conntrack state.
func TestAnsweredFlowsDoNotReachTheRules(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
	p := g.contact(in, peer)
	child := g.peer(lab.PeerA, 5070)
	g.arrives(in, child, p.Ext)
	check(t, in.Send(child.Addr(), "answer"))
	_, err := child.Expect("answer")
	check(t, err)
	g.arrives(in, peer, p.Ext)
	before := count(t, g.tables)
	for i := range 100 {
		for _, s := range []*lab.Socket{peer, child} {
			check(t, in.Send(s.Addr(), fmt.Sprint("out ", i)))
			_, err := s.Expect(fmt.Sprint("out ", i))
			check(t, err)
			check(t, lab.Arrives(in, lab.Packet{From: s, To: p.Ext.Netip(), Payload: fmt.Sprint("in ", i)}))
		}
	}
	if after := count(t, g.tables); after != before {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

// Fails when a chain of the user's comes after ours.
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

// In a group one contact permits all, in an open subnet anybody, and that comes
// from the kernel or from the daemon alike. Whoever is excluded stays out.
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
				p.Mark, p.Wild = test.mark, 1
				if test.open {
					p.Wild = 32
				}
				p.Peer = p.Peer.WithoutLow(p.Wild)
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
				g.m.Refresh([]cone.Permission{p}, func(int) { t.Error("lost") })
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

// That a bucket fills again takes time, so a few more than ten may come in.
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
				began := time.Now()
				send(t, g.Lab, lab.PeerA, 40, p.Ext.Netip())
				more := 1 + int(time.Since(began)/(3*time.Second)) // 20 a minute
				got := 0
				eventually(t, func() bool { got += receive(t, in); return got >= 10 })
				c := count(t, g.tables)
				if got > 10+more || c.Admitted != uint64(got) || c.Admitted+c.GuardDrops != 40 {
					t.Errorf("%d came in; %+v", got, c)
				}

				// Another cap is in force from the next refresh on.
				g.m.Configure(0, nil)
				g.m.Refresh([]cone.Permission{p}, func(int) { t.Fatal("lost") })
				before := got
				send(t, g.Lab, lab.PeerA, 40, p.Ext.Netip())
				eventually(t, func() bool { got += receive(t, in); return got == before+40 })
			})
		}
	}
}

// A host that sends on and on without an answer leaves tokens to its children.
// Fails if each packet of an unanswered flow looks its permission up.
func TestOneWayTrafficLeavesRoomForChildren(t *testing.T) {
	d, m := learning, *learning.Map
	m.MaxChildren = 10
	d.Map = &m
	g := newGate(t, lab.Options{}, d)
	in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
	p := g.contact(in, peer)
	for i := range 200 {
		check(t, in.Send(peer.Addr(), fmt.Sprint("one way ", i)))
	}
	send(t, g.Lab, lab.PeerA, 10, p.Ext.Netip())
	got := 0
	eventually(t, func() bool { got += receive(t, in); return got >= 9 })
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

func TestRefreshRenewsTheTimeoutAndTellsWhatIsLost(t *testing.T) {
	g := newGate(t, lab.Options{}, granting)
	ext := netip.MustParseAddrPort("198.51.100.1:5060")
	in := netip.MustParseAddrPort("10.47.11.109:5060")
	p, gone, q := permission(ext, in, lab.PeerA), permission(ext, in, lab.PeerB), permission(ext, in, lab.PeerC)
	g.m.SetLifetime(time.Minute)
	g.grant(p, q)
	g.m.SetLifetime(time.Hour)
	var lost []int
	g.m.Refresh([]cone.Permission{p, gone, q}, func(i int) { lost = append(lost, i) })
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

func TestDeniedIsNotLearnedUntilGranted(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
	p := g.contact(in, peer)
	ps := []cone.Permission{p}
	check(t, g.m.Deny(ps, cone.ReasonForwarded))
	g.contact(in, g.peer(lab.PeerA, 5061)) // a new flow, for only its first packet teaches
	g.holds()
	check(t, g.m.Deny(ps, cone.ReasonForwarded)) // again
	g.grant(p)
	g.holds(p)
	check(t, g.m.Revoke(ps))
	g.contact(in, g.peer(lab.PeerA, 5062))
	g.holds(p)
}

// Fails when what is one too many may have all the room.
func TestThereIsRoomForWhatIsForbidden(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
	p := g.contact(in, peer)
	var scan []cone.Permission
	for i := range 70_000 {
		ext := netip.AddrPortFrom(g.Gateway.Addr, uint16(10_000+i/250))
		scan = append(scan, permission(ext, netip.MustParseAddrPort("10.47.11.109:9"), stranger(i%250)))
	}
	if err := g.m.Deny(scan, cone.ReasonHostLimit); !errors.Is(err, elements.ErrNoRoom) {
		t.Errorf("error %v, want %v", err, elements.ErrNoRoom)
	}
	check(t, g.m.Deny([]cone.Permission{p}, cone.ReasonForwarded))
	g.contact(in, g.peer(lab.PeerA, 5061))
	g.holds()
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
	g.m.Refresh(ps[:10], func(i int) { t.Error("lost", i) }) // a full map can be refreshed
	check(t, g.m.Revoke(ps))
	g.grant(ps[10:]...)
	g.holds(ps[10:]...)
}

// What the kernel has no room for it does not learn, and the flow goes on. When others
// end it learns again. Fails when the map has room for more than its size.
func TestFullMapLearnsNoMore(t *testing.T) {
	d, m := learning, *learning.Map
	m.Size = 10
	d.Map = &m
	g := newGate(t, lab.Options{}, d)
	in, fence := g.inside(5060), g.peer(lab.PeerC, 5060)
	contact := func(i byte) (cone.Permission, *lab.Socket) {
		addr := netip.AddrFrom4([4]byte{203, 0, 113, 50 + i})
		return g.contact(in, g.peer(addr, 5060)), g.peer(addr, 5070)
	}
	ps := []cone.Permission{g.contact(in, fence)}
	for i := range byte(m.Size - 1) {
		p, _ := contact(i)
		ps = append(ps, p)
	}
	for i := range byte(5) {
		p, media := contact(20 + i)
		g.lost(in, media, p.Ext, fence)
	}
	g.holds(ps...)
	check(t, g.m.Revoke(ps[1:3]))
	for i := range byte(2) {
		p, media := contact(30 + i)
		g.arrives(in, media, p.Ext)
		ps[1+i] = p
	}
	g.holds(ps...)
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
	g.m.Refresh([]cone.Permission{p}, func(int) { lost++ })
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

// A mark follows its permission: granted, changed, renewed, put back and revoked.
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
		g.m.Refresh([]cone.Permission{plain, q}, func(int) { t.Error("lost") })
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
	g.m.Refresh([]cone.Permission{plain, q}, func(int) { t.Error("lost") })
	g.holds(plain, q)

	check(t, g.m.Revoke([]cone.Permission{plain, q, q}))
	g.holds()
	if list := marks(); strings.Contains(list, "elements") {
		t.Error("the mark stands still:", list)
	}
}

// The inside host sees the peer's own address, whatever the user's rules do to what
// comes in. What they forward by themselves they translate as before.
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

// A source is believed where the way back is the link that a packet came by. What else
// has the source of an inside host passes, and earns nothing, nor does it make an event;
// what comes by the right link earns a permission all the same.
//
// Fails without the chain way_back.
func TestSourceByAnotherLinkTeachesNothing(t *testing.T) {
	g := newGate(t, lab.Options{Guest: true}, learning)
	for _, name := range []string{"all", "guest0"} {
		check(t, g.Gateway.SetSysctl("net.ipv4.conf."+name+".rp_filter", "0"))
	}
	_, err := g.Guest.Output("ip", "addr", "add", "10.47.11.109/32", "dev", "lo")
	check(t, err)
	spoofer := listen(t, g.Guest, g.Inside(0).Addr, 5060)
	for range 3 {
		check(t, spoofer.Send(netip.AddrPortFrom(lab.PeerA, 5060), "spoofed"))
	}
	eventually(t, func() bool { return len(entries(t, g.Lab, "-p", "udp", "--dport", "5060")) == 1 })
	var unsure []elements.Direction
	check(t, g.tables.NewUnsure().List(func(d elements.Direction) { unsure = append(unsure, d) }))
	want := elements.Direction{
		Src: cone.EndpointFrom(netip.AddrPortFrom(g.Inside(0).Addr, 5060)), Dst: cone.EndpointFrom(netip.AddrPortFrom(lab.PeerA, 5060)),
	}
	if !slices.Equal(unsure, []elements.Direction{want}) {
		t.Errorf("unsure of %v", unsure)
	}
	g.tables.NewUnsure().Renew(append(unsure, elements.Direction{Src: want.Dst, Dst: want.Src}))
	check(t, g.tables.NewUnsure().List(func(d elements.Direction) { unsure = append(unsure, d) }))
	if len(unsure) != 2 {
		t.Errorf("unsure of %v", unsure)
	}
	p := g.contact(g.inside(5061), g.peer(lab.PeerC, 5061))
	g.holds(p)
	if c := count(t, g.tables); c.Unsure != 1 || c.Learned != 1 {
		t.Errorf("%+v", c)
	}
	check(t, g.Flush()) // that flow has ended
	q := g.contact(g.inside(5060), g.peer(lab.PeerA, 5060))
	g.holds(p, q)
}

// A host of the LAN may come by a link that VRRP put upon the one that leads back to it.
// Whoever spoofs by such a link of the other side earns nothing.
//
// Fails without Desired.Uppers.
func TestSourceByALinkUponTheWayBackIsLearned(t *testing.T) {
	d := learning
	d.Uppers = map[string]string{"vrrp1": "lan0"}
	g := newGate(t, lab.Options{Guest: true}, d)
	for _, args := range []string{
		"link add vrrp1 link lan0 address 00:00:5e:00:01:01 type macvlan mode bridge", "addr add 10.47.11.254/32 dev vrrp1", "link set vrrp1 up",
	} {
		_, err := g.Gateway.Output("ip", strings.Fields(args)...)
		check(t, err)
	}
	for _, name := range []string{"all", "vrrp1", "lan0"} {
		check(t, g.Gateway.SetSysctl("net.ipv4.conf."+name+".rp_filter", "0"))
	}
	// lan0 is a bridge. What it gave to iptables passes no hook again on the link upon it.
	if err := g.Gateway.SetSysctl("net.bridge.bridge-nf-call-iptables", "0"); err != nil {
		t.Log(err)
	}
	_, err := g.Inside(0).Output("ip", "neigh", "replace", "10.47.11.1", "lladdr", "00:00:5e:00:01:01", "dev", "eth0")
	check(t, err)
	p := g.contact(g.inside(5060), g.peer(lab.PeerA, 5060))
	g.holds(p)
	if n := count(t, g.tables).Unsure; n != 0 {
		t.Errorf("unsure of %d", n)
	}
}
