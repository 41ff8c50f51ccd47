package rules_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// Otherwise the gateway's socket would lose its port, or the packet would be dropped.
func TestAFlowOfTheGatewayIsInNobodysWay(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	peers := m.peers()
	in, own := m.host(0, 3074), listen(t, m.Gateway, m.Gateway.Addr, 3074)
	m.maps(in, m.ext(3074), peers[0])
	if ext := m.contact(own, peers[1]); ext != own.Addr() {
		t.Errorf("the gateway's socket is seen as %v", ext)
	}
	if ext := m.contact(in, peers[1]); ext == own.Addr() {
		t.Error("two flows have one outside port towards one peer")
	}
	m.maps(own, own.Addr(), peers[1])
	m.maps(in, m.ext(3074), peers[2])
	if c := count(t, m.tables); c.LeftToRules != 1 {
		t.Errorf("%+v", c)
	}
	// In the other order the kernel gives the gateway another port.
	m.contact(own, peers[0])
	m.maps(in, m.ext(3074), peers[0])
}

// A host of a network without mappings may also use the port.
func TestAFlowOfAnotherSubnetIsInNobodysWay(t *testing.T) {
	m := newMapper(t, lab.Options{Guest: true}, mapping)
	peers := m.peers()
	in, guest := m.host(0, 3074), listen(t, m.Guest, m.Guest.Addr, 3074)
	m.maps(in, m.ext(3074), peers[0])
	m.maps(guest, m.ext(3074), peers[1])
	if ext := m.contact(in, peers[1]); ext == m.ext(3074) {
		t.Error("two flows have one outside port towards one peer")
	}
	m.maps(in, m.ext(3074), peers[2])
	m.holds(mapped(in, m.ext(3074)))
}

func TestAnEarlyPacketIsNoEnd(t *testing.T) {
	m := newMapper(t, lab.Options{}, mapping)
	in := m.host(0, 3074)
	peers := m.peers()
	// The packet comes before the flow, and there is no guard.
	early := func(peer *lab.Socket) {
		t.Helper()
		check(t, peer.Send(m.ext(3074), "early"))
		eventually(t, func() bool { return strings.Contains(m.listSet("set", "taken"), peer.Addr().Addr().String()) })
	}
	early(peers[2])
	m.maps(in, m.ext(3074), peers[0])
	if ext := m.contact(in, peers[2]); ext == m.ext(3074) {
		t.Error("the outside port was free")
	}
	// The packet comes to an existing mapping.
	other := m.peer(netip.MustParseAddr("203.0.113.7"), 9)
	early(other)
	if ext := m.contact(in, other); ext == m.ext(3074) {
		t.Error("the outside port was free")
	}
	// The inside host sends first, so the packet is its answer.
	m.maps(in, m.ext(3074), peers[1])
	if c := count(t, m.tables); c.LeftToRules != 2 {
		t.Errorf("%+v", c)
	}
}

// A child of a permission ends at the inside host, and the mapping stays.
func TestAChildIsInNobodysWay(t *testing.T) {
	d := withMapping(func(d *rules.Desired, _ *rules.MappingConfig) { d.Map = learning.Map })
	m := newMapper(t, lab.Options{}, d)
	in := m.host(0, 3074)
	m.maps(in, m.ext(3074), m.peer(lab.PeerA, 3074))
	child := m.peer(lab.PeerA, 5000)
	check(t, lab.Arrives(in, lab.Packet{From: child, To: m.ext(3074), Payload: "child"}))
	m.maps(in, m.ext(3074), child, m.peer(lab.PeerA, 5001))
}

func TestExemptDestinationsAreTheUsersRules(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2, Rules: `table ip nat { chain postrouting { type nat hook postrouting priority srcnat;
		ip daddr 192.0.2.77 accept; oifname "wan0" masquerade; }; }`}, mapping)
	output(t, m.Lab, "ip", "route") // the peers' way back
	if _, err := m.Outside.Output("ip", "route", "add", "10.47.11.0/24", "via", m.Gateway.Addr.String()); err != nil {
		t.Fatal(err)
	}
	one, two := m.host(0, 3074), m.host(1, 3074)
	exempt, peer := m.peer(lab.PeerC, 3074), m.peer(lab.PeerA, 3074)
	m.maps(one, one.Addr(), exempt)
	m.holds()
	m.maps(one, m.ext(3074), peer)
	m.forget(one)
	m.maps(one, one.Addr(), exempt)
	m.maps(two, two.Addr(), exempt)
	m.holds(mapped(one, m.ext(3074)))
}

// Each packet would give a mapping except for one property.
func TestNothingElseGetsAMapping(t *testing.T) {
	for _, test := range []struct {
		name  string
		rules string
		send  func(m *mapper)
	}{
		{"from a subnet that is not enabled", lab.Masquerade, func(m *mapper) {
			m.contact(listen(m.t, m.Guest, m.Guest.Addr, 5060), m.peer(lab.PeerA, 5060))
		}},
		{"without translation", lab.DropPolicy, func(m *mapper) {
			check(m.t, m.host(0, 5060).Send(netip.AddrPortFrom(lab.PeerA, 5060), "x"))
		}},
		{"to an exempt destination", lab.Masquerade, func(m *mapper) { m.contact(m.host(0, 5060), m.peer(lab.PeerC, 5060)) }},
		{"from the gateway", lab.Masquerade, func(m *mapper) {
			m.contact(listen(m.t, m.Gateway, m.Gateway.Addr, 5060), m.peer(lab.PeerA, 5060))
		}},
		{"in another zone", lab.Masquerade + "table ip zones { chain c { type filter hook prerouting priority -300; udp sport 5060 ct zone set 7; }; }", func(m *mapper) {
			check(m.t, m.host(0, 5060).Send(netip.AddrPortFrom(lab.PeerA, 5060), "x"))
		}},
		{"to the gateway", lab.Masquerade, func(m *mapper) {
			check(m.t, m.host(0, 5060).Send(netip.AddrPortFrom(m.Gateway.Addr, 5060), "x"))
		}},
		{"from an outside port that the gateway serves", lab.MasqueradeRange(53, 53), func(m *mapper) {
			if ext := m.contact(m.host(0, 5060), m.peer(lab.PeerA, 5060)); ext != m.ext(53) {
				m.t.Errorf("got %v", ext)
			}
		}},
		{"between translated inside hosts", `table ip nat { chain c { type nat hook postrouting priority srcnat; masquerade; }; }`, func(m *mapper) {
			m.contact(m.host(0, 5060), listen(m.t, m.Guest, m.Guest.Addr, 5060))
		}},
		{"between inside hosts", lab.Masquerade, func(m *mapper) {
			m.contact(m.host(0, 5060), listen(m.t, m.Guest, m.Guest.Addr, 5060))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newMapper(t, lab.Options{Guest: true, Rules: test.rules}, mapping)
			test.send(m)
			// The rules have seen the packet, because a later packet gives a mapping.
			check(t, m.NFT(`table ip nat2 { chain c { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }; }`))
			last := m.host(0, 6000)
			ext := m.contact(last, m.peer(lab.PeerA, 6000))
			if ext.Port() == 53 {
				m.holds()
				return
			}
			m.holds(mapped(last, ext))
		})
	}
}

// The spoofer neither gets nor refreshes the mapping of the host whose address it uses.
func TestASpoofedSourceFromOutsideGetsNoMapping(t *testing.T) {
	m := newMapper(t, lab.Options{Rules: randomly("fully-random")}, mapping)
	s := newSpoofer(t, m.Lab)
	s.send(5060)
	m.holds()

	host, peer := m.host(0, 5061), m.peer(lab.PeerA, 5060)
	p := mapped(host, m.contact(host, peer))
	k := m.kept()
	k.SetLifetime(time.Minute)
	k.Keep([]elements.Mapping{p}, func(_ int, err error) { t.Error(err) })
	s.send(5061)
	m.holds(p)
	if left := m.mappings()[p]; left > time.Minute {
		t.Errorf("the spoofed packet refreshed it: %v left", left)
	}
	flow := output(t, m.Lab, "conntrack", "-L", "-p", "udp", "-d", "192.0.2.99", "--orig-port-src", "5061")
	if port := fmt.Sprintf("dport=%d ", p.Ext.Port); !strings.Contains(flow, "dst=198.51.100.1") || strings.Contains(flow, port) {
		t.Errorf("the spoofed packet left by the mapping to port %d: %s", p.Ext.Port, flow)
	}
}

// TCP has its own ports.
func TestTCPIsTheUsersRules(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, hairpinning)
	one, two, peer := m.host(0, 3074), m.host(1, 3074), m.peer(lab.PeerA, 3074)
	m.maps(one, m.ext(3074), peer)
	ext := m.contact(two, peer)
	var server net.Listener
	check(t, m.Outside.Do(func() (err error) {
		server, err = net.Listen("tcp", "203.0.113.5:80")
		return err
	}))
	defer server.Close()
	for _, port := range []int{3074, 5555} {
		check(t, m.Inside(1).Do(func() error {
			from := net.Dialer{LocalAddr: &net.TCPAddr{IP: m.Inside(1).Addr.AsSlice(), Port: port}, Timeout: 5 * time.Second}
			c, err := from.Dial("tcp", server.Addr().String())
			if err != nil {
				return err
			}
			return c.Close()
		}))
		c, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got := c.RemoteAddr().String(); got != m.ext(uint16(port)).String() {
			t.Errorf("seen as %s", got)
		}
		check(t, c.Close())
	}
	m.holds(mapped(one, m.ext(3074)), mapped(two, ext))
}

// An inside host may send from port 0, which conntrack treats as no port.
func TestPortZeroGetsNoMapping(t *testing.T) {
	m := newMapper(t, lab.Options{}, mapping)
	udp(t, m.Inside(0), netip.AddrPortFrom(m.Inside(0).Addr, 0), netip.AddrPortFrom(lab.PeerA, 5060))
	eventually(t, func() bool { return len(entries(t, m.Lab, "-p", "udp", "-d", lab.PeerA.String())) == 1 })
	m.holds()
}

func TestFlowsOfOtherZonesAreLeftToTheRules(t *testing.T) {
	m := newMapper(t, lab.Options{Rules: randomly("fully-random") + `
		table ip zones { chain c { type filter hook prerouting priority -300; udp dport 7777 ct zone set 7; }; }`}, mapping)
	in := m.host(0, 3074)
	ext := m.contact(in, m.peer(lab.PeerA, 1))
	for i := range 2 { // one may have that port by chance
		got, err := in.Contact(m.peer(netip.AddrFrom4([4]byte{203, 0, 113, byte(50 + i)}), 7777))
		check(t, err)
		if got != ext {
			m.holds(mapped(in, ext))
			return
		}
	}
	t.Errorf("%v went by its mapping", in.Addr())
}

// A packet from outside in another zone occupies no port of the default zone.
func TestArrivalsOfOtherZonesTakeNothing(t *testing.T) {
	m := newMapper(t, lab.Options{Rules: lab.Masquerade + `
		table ip zones { chain c { type filter hook prerouting priority -300; iifname "wan0" ct zone set 7; }; }
		table ip f { chain c { type nat hook prerouting priority dstnat; udp dport 7777 dnat to 10.47.11.109; }; }`}, mapping)
	in, peer := m.host(0, 7777), m.peer(lab.PeerA, 1)
	check(t, peer.Send(m.ext(7777), "x"))
	if _, err := in.Expect("x"); err != nil {
		t.Fatal(err)
	}
	if list := m.listSet("set", "taken"); strings.Contains(list, "elements") {
		t.Error(list)
	}
}

// The user forwards a port that a mapping has, and the peer uses that forward.
func TestAForwardOfTheUsersIsInNobodysWay(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	one, two, peers := m.host(0, 4000), m.host(1, 9), m.peers()
	m.maps(one, m.ext(4000), peers[0])
	check(t, m.NFT(`table ip user { chain c {
		type nat hook prerouting priority dstnat; iifname "wan0" udp dport 4000 dnat to 10.47.11.110:9; }; }`))
	check(t, lab.Arrives(two, lab.Packet{From: peers[1], To: m.ext(4000), Payload: "forwarded"}))
	if ext := m.contact(one, peers[1]); ext == m.ext(4000) {
		t.Error("two flows have one outside port towards one peer")
	}
	m.maps(one, m.ext(4000), peers[0])
}

// The second host's flow cannot use its mapping, and gets the port of the first host.
func TestAFlowLeftToTheRulesIsInNobodysWay(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	one, two, peers := m.host(0, 3074), m.host(1, 3074), m.peers()
	m.maps(one, m.ext(3074), peers[0])
	ext := m.contact(two, peers[0])
	check(t, m.kept().Take([]elements.Taken{{Remote: cone.EndpointFrom(peers[1].Addr()), Port: ext.Port()}}))
	m.contact(listen(t, m.Gateway, m.Gateway.Addr, ext.Port()), peers[1])
	if got := m.contact(two, peers[1]); got != m.ext(3074) {
		t.Fatalf("got %v", got)
	}
	if got := m.contact(one, peers[1]); got == m.ext(3074) {
		t.Error("two flows have one outside port towards one peer")
	}
	m.maps(one, m.ext(3074), peers[2])
	m.maps(two, ext, peers[2])
}
