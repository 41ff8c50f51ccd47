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
	n, err := g.tables.Learned()
	check(t, err)
	if c := count(t, g.tables); c.Learned != 1 || n != 1 {
		t.Errorf("%+v, and Learned returns %d", c, n)
	}
}

// Each packet would give a permission except for one property.
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
			// The rules have seen the packet, because a later packet gives a permission.
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
	newSpoofer(t, g.Lab).send(5060)
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
	// Packets of a known one-way flow do not use up the rate.
	limited := count(t, g.tables).LearnLimited
	for range 100 {
		check(t, other.Send(netip.AddrPortFrom(lab.PeerA, 7000), "again"))
	}
	if c := count(t, g.tables); c.LearnLimited != limited {
		t.Errorf("%+v", c)
	}
}

// The counters are behind the test of the conntrack state.
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

// A host that keeps sending without an answer leaves tokens to its children. Fails if each
// packet of an unanswered flow looks up its permission.
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

// A host that opens flow after flow to one peer leaves tokens to its children.
// Fails if a new flow of the host takes one.
func TestNewFlowsLeaveRoomForChildren(t *testing.T) {
	for name, groups := range map[string][]netip.Prefix{"peer": nil, "group": {netip.MustParsePrefix("203.0.113.0/28")}} {
		t.Run(name, func(t *testing.T) {
			d, m := learning, *learning.Map
			m.MaxChildren, m.PeerGroups, m.LearnRate = 10, groups, 10_000
			d.Map = &m
			g := newGate(t, lab.Options{}, d)
			in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
			p := g.contact(in, peer)
			for i := range 400 { // a group may have 160 children
				check(t, in.Send(netip.AddrPortFrom(lab.PeerA, uint16(20_000+i)), "another flow"))
			}
			send(t, g.Lab, lab.PeerA, 10, p.Ext.Netip())
			got := 0
			eventually(t, func() bool { got += receive(t, in); return got == 10 })
		})
	}
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

// Fails when what a limit refuses uses the room of denials, or if it is an error that more hosts
// than there is room for have reached a limit.
func TestThereIsRoomForWhatIsForbidden(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	in, peer := g.inside(5060), g.peer(lab.PeerA, 5060)
	p := g.contact(in, peer)
	var scan []cone.Permission
	for i := range 70_000 {
		ext := netip.AddrPortFrom(g.Gateway.Addr, uint16(10_000+i/250))
		host := netip.AddrFrom4([4]byte{10, 48, byte(i >> 8), byte(i)})
		scan = append(scan, permission(ext, netip.AddrPortFrom(host, 9), stranger(i%250)))
	}
	check(t, g.m.Deny(scan, cone.ReasonHostLimit))
	check(t, g.m.Deny([]cone.Permission{p}, cone.ReasonForwarded))
	g.contact(in, peer)
	g.holds()
	if err := g.m.Deny(scan, cone.ReasonForwarded); !errors.Is(err, elements.ErrNoRoom) {
		t.Errorf("error %v, want %v", err, elements.ErrNoRoom)
	}
}

// A host that has reached a limit teaches the kernel nothing, other hosts do, and what the daemon
// grants to that host stands.
//
// Fails without the set of these hosts, when it takes more than one transaction to deny all that
// the host asks for, and when a host that has room again still teaches nothing.
func TestHostAtItsLimitTeachesNothing(t *testing.T) {
	g := newGate(t, lab.Options{Inside: 2}, learning)
	full, other := g.inside(5060), listen(t, g.Inside(1), g.Inside(1).Addr, 5060)
	p := g.contact(full, g.peer(lab.PeerA, 5060))
	check(t, g.m.Deny([]cone.Permission{p}, cone.ReasonHostLimit))
	g.holds()
	before := g.generation()
	q := g.contact(full, g.peer(lab.PeerA, 5062))
	check(t, g.m.Deny([]cone.Permission{p, q}, cone.ReasonHostLimit))
	if now := g.generation(); now != before {
		t.Errorf("generation %d, before %d", now, before)
	}
	g.holds()
	r := g.contact(other, g.peer(lab.PeerC, 5060))
	g.holds(r)
	g.m = g.tables.NewMap(learning.Map) // of the next daemon
	check(t, g.m.AdoptDenied())
	g.grant(q)
	g.holds(r, q)
	s := g.contact(full, g.peer(netip.MustParseAddr("203.0.113.50"), 5060)) // there is room, so the kernel learns again
	g.holds(r, q, s)
}

// Each transaction makes others list the ruleset anew. Fails when address, port and mark of a
// permission end one by one, or when what is not there is deleted.
func TestRevocationIsOneTransaction(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	ps := strangers(0, 100)
	for i := range ps {
		ps[i].Mark = uint32(i % 2)
	}
	g.grant(ps...)
	for _, want := range []uint32{1, 0} {
		before := g.generation()
		check(t, g.m.Revoke(append(ps[:60:60], ps...)))
		if n := g.generation() - before; n != want {
			t.Errorf("%d transactions, want %d", n, want)
		}
		g.holds()
	}
	marks, err := g.Gateway.Output("nft", "list", "map", "ip", "conenat", "marks")
	if check(t, err); strings.Contains(marks, "elements") {
		t.Errorf("left: %s", marks)
	}
}

// Each transaction makes a listing of the whole ruleset start anew, so a host with many peers must
// not cause one for each. Fails when a grant changes what the kernel has learned, and when it
// does not change what is missing, or what another endpoint has.
func TestGrantLeavesWhatTheKernelLearned(t *testing.T) {
	g := newGate(t, lab.Options{}, learning)
	in := g.inside(5060)
	p, q := g.contact(in, g.peer(lab.PeerA, 5060)), g.contact(in, g.peer(lab.PeerC, 5060))
	grant := func(changed bool, ps ...cone.Permission) {
		t.Helper()
		before := g.generation()
		g.grant(ps...)
		if now := g.generation(); changed != (now != before) {
			t.Errorf("generation %d, before %d", now, before)
		}
		g.holds(p, q)
	}
	grant(false, p, q)
	check(t, g.m.Revoke([]cone.Permission{q}))
	grant(true, p, q)
	p.Int.Port++
	grant(true, p, q)
}

// If the map is full, the kernel does not learn, and the flow continues. When permissions
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

// A source is trusted if the packet came by the link that is the way back. Other packets
// with an inside host's source pass, but earn nothing and cause no event. Packets by the
// right link still earn a permission.
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

// The same for IPv6: the first packet of a flow decides. A spoofed packet in a flow that
// the host itself began takes nothing from that flow. After a spoofed flow has ended,
// packets of the host are trusted.
//
// Fails without the chain way_back of family inet, and when that chain tests later packets.
func TestIPv6SourceByAnotherLinkIsUnsure(t *testing.T) {
	g := newGate(t, lab.Options{Guest: true, IPv6: true}, learning)
	host := g.Inside(0).Addr6
	_, err := g.Guest.Output("ip", "addr", "add", host.String()+"/128", "dev", "lo", "nodad")
	check(t, err)
	peer := netip.AddrPortFrom(lab.Peer6A, 5060)
	at := listen(t, g.Outside, peer.Addr(), peer.Port())
	sends := func(h *lab.Host, port uint16, payload string) {
		t.Helper()
		s := listen(t, h, host, port)
		defer s.Close()
		check(t, s.Send(peer, payload))
		_, err := at.Expect(payload)
		check(t, err)
	}
	flow := elements.Direction{Src: cone.EndpointFrom(netip.AddrPortFrom(host, 5060)), Dst: cone.EndpointFrom(peer)}
	unsure := func(want ...elements.Direction) {
		t.Helper()
		var got []elements.Direction
		check(t, g.tables.NewUnsure().List(func(d elements.Direction) { got = append(got, d) }))
		if !slices.Equal(got, want) {
			t.Errorf("unsure of %v, want %v", got, want)
		}
	}
	sends(g.Guest, 5060, "faked")
	unsure(flow)
	sends(g.Inside(0), 5061, "the host's own")
	sends(g.Guest, 5061, "faked in the host's own flow")
	unsure(flow)
	gone := elements.Direction{Src: flow.Dst, Dst: flow.Src}
	g.tables.NewUnsure().Renew([]elements.Direction{gone, flow})
	unsure(flow)
	check(t, g.Flush())
	sends(g.Inside(0), 5060, "the host again")
	unsure()
}

// A host of the LAN may come by a link that VRRP put on top of the link that leads back to
// it. A spoofer on such a link of the other side earns nothing.
//
// Fails without Desired.Segments.
func TestSourceByALinkUponTheWayBackIsLearned(t *testing.T) {
	d := learning
	d.Segments = map[string][]string{"lan0": {"vrrp1"}}
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
	// lan0 is a bridge. A packet that it passed to iptables does not pass the hooks again
	// on the link on top of it.
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

// Of the later packets of an unanswered flow only a few meet all rules of the chain: these
// learn its permission again after it has expired.
//
// Fails without the second rule of the chain, and when it lets no packet pass.
func TestMostPacketsWithoutAnAnswerEndEarly(t *testing.T) {
	text, err := rules.Text("conenat", learning)
	check(t, err)
	const rule = `		ct status confirmed numgen random mod 64 != 0 accept comment "of later packets without an answer, most end here"` + "\n"
	before, after, found := strings.Cut(text, rule)
	if !found {
		t.Fatalf("no such rule in\n%s", text)
	}
	l := lab.ForTest(t, lab.Options{})
	check(t, l.NFT(before+rule+"\t\tcounter comment \"behind it\"\n"+after+"add element ip conenat alive { udp }\n"))
	in := listen(t, l.Inside(0), l.Inside(0).Addr, 5060)
	flood := func(n int) {
		t.Helper()
		for range n {
			check(t, in.Send(netip.AddrPortFrom(lab.PeerA, 5060), "one way"))
		}
	}
	const packets = 4000
	flood(packets)
	_, count, _ := strings.Cut(output(t, l, "nft", "list", "chain", "ip", "conenat", "learn"), "counter packets ")
	var behind int
	if _, err := fmt.Sscan(count, &behind); err != nil || behind < 2 || behind > packets/16 {
		t.Errorf("%d of %d packets met the other rules (%v), want about %d", behind, packets, err, packets/64)
	}
	for _, s := range []string{"map ip conenat permissions", "map ip conenat permission_ports", "set ip conenat repeaters"} {
		output(t, l, "nft", append([]string{"flush"}, strings.Fields(s)...)...) // as if they had expired
	}
	for range 100 {
		flood(200)
		if list := output(t, l, "nft", "list", "map", "ip", "conenat", "permissions"); strings.Contains(list, lab.PeerA.String()) {
			return
		}
	}
	t.Error("no packet teaches the permission again")
}
