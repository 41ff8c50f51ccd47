package rules_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// mapping keeps mappings and nothing else.
var mapping = rules.Desired{
	OutsideLinks: []string{"wan0"},
	Mapping: &rules.MappingConfig{
		Subnets:  []netip.Prefix{lab.InsideNet},
		Exempt:   []netip.Prefix{netip.PrefixFrom(lab.PeerC, 32)},
		Pool:     []rules.PortRange{{First: 50000, Last: 59999}},
		Lifetime: 5 * time.Minute,
		Size:     1000,
		Served:   []uint16{53},
	},
}

// withMapping returns mapping after a change.
func withMapping(change func(d *rules.Desired, m *rules.MappingConfig)) rules.Desired {
	d, m := mapping, *mapping.Mapping
	d.Mapping = &m
	change(&d, &m)
	return d
}

var hairpinning = withMapping(func(_ *rules.Desired, m *rules.MappingConfig) { m.Hairpin = []netip.Prefix{lab.InsideNet} })

// A mapper is a lab with mappings.
type mapper struct {
	*lab.Lab
	t      *testing.T
	tables *rules.Tables
}

func newMapper(t *testing.T, o lab.Options, d rules.Desired) *mapper {
	t.Helper()
	l := lab.ForTest(t, o)
	tables := open(t, l)
	set(t, tables, d)
	return &mapper{l, t, tables}
}

func (m *mapper) host(i int, port uint16) *lab.Socket {
	m.t.Helper()
	return listen(m.t, m.Inside(i), m.Inside(i).Addr, port)
}

func (m *mapper) peer(addr netip.Addr, port uint16) *lab.Socket {
	m.t.Helper()
	return listen(m.t, m.Outside, addr, port)
}

// peers are three remote endpoints, two of them of one address.
func (m *mapper) peers() []*lab.Socket {
	m.t.Helper()
	return []*lab.Socket{m.peer(lab.PeerA, 3074), m.peer(lab.PeerA, 4000), m.peer(lab.PeerB, 3074)}
}

// contact lets in send to peer and the peer answer, and returns the outside
// endpoint.
func (m *mapper) contact(in, peer *lab.Socket) netip.AddrPort {
	m.t.Helper()
	ext, err := in.Contact(peer)
	if err != nil {
		m.t.Fatal(err)
	}
	answer := fmt.Sprintf("answer of %v to %v", peer.Addr(), in.Addr())
	check(m.t, peer.Send(ext, answer))
	from, err := in.Expect(answer)
	check(m.t, err)
	if from != peer.Addr() {
		m.t.Errorf("the answer of %v comes from %v", peer.Addr(), from)
	}
	return ext
}

// maps checks that in has the outside endpoint ext towards all peers.
func (m *mapper) maps(in *lab.Socket, ext netip.AddrPort, peers ...*lab.Socket) {
	m.t.Helper()
	for _, peer := range peers {
		if got := m.contact(in, peer); got != ext {
			m.t.Errorf("%v is %v towards %v, want %v", in.Addr(), got, peer.Addr(), ext)
		}
	}
}

// forget deletes the conntrack entries of an inside endpoint.
func (m *mapper) forget(in *lab.Socket) {
	m.t.Helper()
	output(m.t, m.Lab, "conntrack", "-D", "-p", "udp", "-s", in.Addr().Addr().String(), "--sport", fmt.Sprint(in.Addr().Port()))
}

func (m *mapper) listSet(kind, name string) string {
	m.t.Helper()
	return output(m.t, m.Lab, "nft", "list", kind, "ip", "conenat", name)
}

func inPool(ext netip.AddrPort) bool { return ext.Port() >= 50000 && ext.Port() <= 59999 }

func (m *mapper) ext(port uint16) netip.AddrPort { return netip.AddrPortFrom(m.Gateway.Addr, port) }

func TestTwoHostsOnOneSourcePortHaveOneOutsidePortEach(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	peers := m.peers()
	one, two := m.host(0, 3074), m.host(1, 3074)
	m.maps(one, m.ext(3074), peers...)
	ext := m.contact(two, peers[0])
	if !inPool(ext) || ext.Addr() != m.Gateway.Addr || ext.Port()%2 != 0 {
		t.Errorf("the second host got %v, want an even port of the pool", ext)
	}
	m.maps(two, ext, peers...)
	m.maps(one, m.ext(3074), m.peer(lab.PeerB, 9))
	if c := count(t, m.tables); c.Moved != 1 || c.LeftToRules != 0 {
		t.Errorf("%+v", c)
	}
	// All have the first one's, as long as no other one is seen.
	if list := m.listSet("map", "addresses_wan0"); !strings.Contains(list, "0.0.0.0 : 198.51.100.1") || strings.Contains(list, "10.47.11.1") {
		t.Error(list)
	}
}

func TestAPoolPortIsOddWhereTheOwnPortIs(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	peer := m.peer(lab.PeerA, 3074)
	m.maps(m.host(0, 3075), m.ext(3075), peer)
	if ext := m.contact(m.host(1, 3075), peer); !inPool(ext) || ext.Port()%2 != 1 {
		t.Errorf("the second host got %v", ext)
	}
}

func TestTenHostsOnOneSourcePort(t *testing.T) {
	const hosts = 10
	m := newMapper(t, lab.Options{Inside: hosts}, mapping)
	peers := m.peers()
	var all [hosts]*lab.Socket
	exts, seen := [hosts]netip.AddrPort{}, map[netip.AddrPort]bool{}
	for i := range all {
		all[i] = m.host(i, 3074)
		exts[i] = m.contact(all[i], peers[i%3])
		if seen[exts[i]] {
			t.Errorf("%v is given twice", exts[i])
		}
		seen[exts[i]] = true
	}
	for i, in := range all {
		m.maps(in, exts[i], peers...)
	}
	if len(m.mappings()) != hosts {
		t.Errorf("mappings: %v", m.mappings())
	}
}

// Most of the first tries find a port that is owned.
func TestMostOfASmallPoolIsUsed(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 9}, withMapping(func(_ *rules.Desired, c *rules.MappingConfig) {
		c.Pool = []rules.PortRange{{First: 50000, Last: 50031}} // 16 of them are even
	}))
	peer, seen := m.peer(lab.PeerA, 3074), map[netip.AddrPort]bool{}
	for i := range 9 {
		in := m.host(i, 3074)
		ext := m.contact(in, peer)
		if seen[ext] || i > 0 && (ext.Port() < 50000 || ext.Port() > 50031) {
			t.Errorf("host %d got %v", i, ext)
		}
		seen[ext] = true
		m.maps(in, ext, peer)
	}
	if c := count(t, m.tables); c.Moved != 8 || c.PoolUsedUp != 0 {
		t.Errorf("%+v", c)
	}
}

// One port of the pool is even. Who finds none is where he would be without mappings:
// no packet is lost, whoever has the port that he asks for.
func TestAPoolThatIsUsedUpLeavesNewcomersToTheRules(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 4}, withMapping(func(_ *rules.Desired, c *rules.MappingConfig) {
		c.Pool = []rules.PortRange{{First: 50000, Last: 50001}}
	}))
	peers := m.peers()
	first := m.host(0, 3074)
	m.maps(first, m.ext(3074), peers...)
	m.maps(m.host(1, 3074), m.ext(50000), peers...)
	two, three := m.host(2, 3074), m.host(3, 3074)
	last := m.peer(lab.PeerB, 9)
	if ext := m.contact(two, last); ext != m.ext(3074) { // as the kernel shares ports
		t.Errorf("without a port of the pool: %v", ext)
	}
	for _, peer := range append(peers, last) {
		m.contact(three, peer)
		m.contact(two, peer)
	}
	m.maps(first, m.ext(3074), peers...)
	if c := count(t, m.tables); c.Moved != 1 || c.PoolUsedUp < 2 {
		t.Errorf("%+v", c)
	}
}

// So no choice of ports that are tried keeps a host that means harm from taking them.
func TestAPoolPortBelongsToWhoSendsFromIt(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 3}, withMapping(func(_ *rules.Desired, c *rules.MappingConfig) {
		c.Pool = []rules.PortRange{{First: 50000, Last: 50001}}
	}))
	peers := m.peers()
	m.maps(m.host(0, 50000), m.ext(50000), peers...)
	m.maps(m.host(1, 3074), m.ext(3074), peers...)
	m.contact(m.host(2, 3074), peers[0])
	if c := count(t, m.tables); c.Moved != 0 || c.PoolUsedUp != 1 {
		t.Errorf("%+v", c)
	}
}

// With conntrack alone the second host would get port 3074, and the first one's
// next flow might get any other.
func TestAMappingOutlivesItsFlows(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2, Rules: randomly("random")}, mapping)
	peers := m.peers()
	one := m.host(0, 3074)
	ext := m.contact(one, peers[0])
	for range 5 {
		m.forget(one)
		m.maps(one, ext, peers...)
	}
}

func TestAnOwnedPortIsNotGivenAwayWhenItsFlowsAreGone(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	peer := m.peer(lab.PeerA, 3074)
	one, two := m.host(0, 3074), m.host(1, 3074)
	m.maps(one, m.ext(3074), peer)
	m.forget(one)
	if ext := m.contact(two, peer); !inPool(ext) {
		t.Errorf("the second host got %v", ext)
	}
	m.maps(one, m.ext(3074), peer)
}

func randomly(how string) string {
	return `table ip nat { chain postrouting { type nat hook postrouting priority srcnat; oifname "wan0" masquerade ` + how + `; }; }`
}

func TestRandomPortsStayTheSame(t *testing.T) {
	for _, how := range []string{"random", "fully-random"} {
		t.Run(how, func(t *testing.T) {
			m := newMapper(t, lab.Options{Inside: 2, Rules: randomly(how)}, mapping)
			peers := m.peers()
			for i := range 2 {
				in := m.host(i, 3074)
				ext := m.contact(in, peers[0])
				m.maps(in, ext, peers...)
			}
		})
	}
}

// mappings returns what stands.
func (m *mapper) mappings() map[elements.Mapping]time.Duration {
	m.t.Helper()
	all := map[elements.Mapping]time.Duration{}
	check(m.t, m.kept().List(func(p elements.Mapping, left time.Duration) { all[p] = left }))
	return all
}

func (m *mapper) kept() *elements.Mappings { return m.tables.NewMappings(mapping.Mapping) }

// holds checks that just these mappings stand.
func (m *mapper) holds(want ...elements.Mapping) {
	m.t.Helper()
	got := m.mappings()
	for _, p := range want {
		if _, ok := got[p]; !ok {
			m.t.Errorf("lacks %v", p)
		}
	}
	if len(got) != len(want) {
		m.t.Errorf("holds %v, want %v", got, want)
	}
}

func mapped(in *lab.Socket, ext netip.AddrPort) elements.Mapping {
	return elements.Mapping{Link: "wan0", Int: cone.EndpointFrom(in.Addr()), Ext: cone.EndpointFrom(ext)}
}

// Both hosts share the port as they did before there were mappings. The flows are
// not answered yet, so the rules meet them.
func TestASecondHostNeitherTakesOverNorRefreshesAMapping(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, guard)
	peers := m.peers()
	one, two := m.host(0, 3074), m.host(1, 3074)
	again := func(in, peer *lab.Socket) {
		t.Helper()
		if ext, err := in.Contact(peer); ext != m.ext(3074) || err != nil {
			t.Error(ext, err)
		}
	}
	again(one, peers[0])
	again(two, peers[1])
	set(t, m.tables, mapping)
	again(one, peers[0])
	p := mapped(one, m.ext(3074))
	m.holds(p)
	before := m.mappings()[p]
	again(two, peers[1])
	m.holds(p)
	if after := m.mappings()[p]; after > before {
		t.Errorf("%v left, and %v after the second host sent", before, after)
	}
	// That flow has the port towards peers[1]: the first host must not be lost.
	if ext := m.contact(one, peers[1]); ext == m.ext(3074) {
		t.Error("two flows have one outside port towards one peer")
	}
	m.maps(one, m.ext(3074), peers[2])
	ext := m.contact(two, peers[2])
	if !inPool(ext) {
		t.Errorf("the second host got %v", ext)
	}
	m.maps(one, m.ext(3074), peers[0])
	m.holds(p, mapped(two, ext))
}

func TestOnlyOwnFlowsRefreshAMapping(t *testing.T) {
	m := newMapper(t, lab.Options{}, mapping)
	in := m.host(0, 3074)
	p := mapped(in, m.ext(3074))
	m.maps(in, m.ext(3074), m.peer(lab.PeerA, 3074))
	k := m.kept()
	k.SetLifetime(time.Minute)
	k.Keep([]elements.Mapping{p}, func(_ int, err error) { t.Error(err) })
	if left := m.mappings()[p]; left > time.Minute {
		t.Errorf("%v left of a minute", left)
	}
	m.maps(in, m.ext(3074), m.peer(lab.PeerB, 3074))
	if left := m.mappings()[p]; left < 4*time.Minute {
		t.Errorf("%v left after a new flow", left)
	}
	if list := m.listSet("set", "owned"); !strings.Contains(list, "expires 5m") && !strings.Contains(list, "expires 4m") {
		t.Error(list)
	}
}

func TestAPortThatTheGatewayServesGoesToThePool(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	peers := m.peers()
	m.maps(m.host(0, 3074), m.ext(3074), peers...) // the outside address is known now
	in := m.host(1, 53)
	ext := m.contact(in, peers[0])
	if !inPool(ext) || ext.Port()%2 != 1 {
		t.Errorf("got %v", ext)
	}
	m.maps(in, ext, peers...)
}

// The gateway's socket would lose its port, or the packet would be dropped.
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
	// The other way round the kernel gives the gateway another port.
	m.contact(own, peers[0])
	m.maps(in, m.ext(3074), peers[0])
}

// A host of a network without mappings is in the way as well.
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
	// The packet comes first, and nobody guards the gateway.
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
	// It comes to a mapping that stands.
	other := m.peer(netip.MustParseAddr("203.0.113.7"), 9)
	early(other)
	if ext := m.contact(in, other); ext == m.ext(3074) {
		t.Error("the outside port was free")
	}
	// The inside host is first: it is the answer.
	m.maps(in, m.ext(3074), peers[1])
	if c := count(t, m.tables); c.LeftToRules != 2 {
		t.Errorf("%+v", c)
	}
}

// In the pool the kernel would not look for another port by itself.
func TestAnEarlyPacketToAPoolPort(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	peers := m.peers()
	two := m.host(1, 3074)
	m.maps(m.host(0, 3074), m.ext(3074), peers[0])
	ext := m.contact(two, peers[0])
	check(t, peers[1].Send(ext, "early"))
	eventually(t, func() bool { return strings.Contains(m.listSet("set", "taken"), fmt.Sprint(ext.Port())) })
	if got := m.contact(two, peers[1]); got == ext {
		t.Error("the outside port was free")
	}
	m.maps(two, ext, peers[2])
}

// A child of a permission ends at the inside host, and the mapping goes on.
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

// Each packet would give a mapping but for one thing.
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
			// The rules have seen it: a packet that gives a mapping comes later.
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

// Nor does it get, or refresh, that of the host whose address it has.
func TestASpoofedSourceFromOutsideGetsNoMapping(t *testing.T) {
	m := newMapper(t, lab.Options{Rules: randomly("fully-random")}, mapping)
	for _, name := range []string{"all", "wan0"} {
		check(t, m.Gateway.SetSysctl("net.ipv4.conf."+name+".rp_filter", "0"))
	}
	for _, args := range []string{
		"addr add 10.47.11.109/32 dev lo",
		"route add table local unicast 192.0.2.99/32 via 198.51.100.1",
	} {
		if _, err := m.Outside.Output("ip", strings.Fields(args)...); err != nil {
			t.Fatal(err)
		}
	}
	check(t, m.NFT(`table ip see { chain c {
		type filter hook postrouting priority 299; iifname "wan0" oifname "wan0" ct status snat counter; }; }`))
	spoofer := listen(t, m.Outside, m.Inside(0).Addr, 5060)
	check(t, spoofer.Send(netip.MustParseAddrPort("192.0.2.99:5060"), "x"))
	eventually(t, func() bool {
		return strings.Contains(output(t, m.Lab, "nft", "list", "chain", "ip", "see", "c"), "packets 1 ")
	})
	m.holds()

	host, peer := m.host(0, 5061), m.peer(lab.PeerA, 5060)
	p := mapped(host, m.contact(host, peer))
	k := m.kept()
	k.SetLifetime(time.Minute)
	k.Keep([]elements.Mapping{p}, func(_ int, err error) { t.Error(err) })
	again := listen(t, m.Outside, m.Inside(0).Addr, 5061)
	check(t, again.Send(netip.MustParseAddrPort("192.0.2.99:5060"), "x"))
	eventually(t, func() bool {
		return strings.Contains(output(t, m.Lab, "nft", "list", "chain", "ip", "see", "c"), "packets 2 ")
	})
	m.holds(p)
	if left := m.mappings()[p]; left > time.Minute {
		t.Errorf("the spoofed packet refreshed it: %v left", left)
	}
	flow := output(t, m.Lab, "conntrack", "-L", "-p", "udp", "-d", "192.0.2.99", "--orig-port-src", "5061")
	if port := fmt.Sprintf("dport=%d ", p.Ext.Port); !strings.Contains(flow, "dst=198.51.100.1") || strings.Contains(flow, port) {
		t.Errorf("the spoofed packet left by the mapping to port %d: %s", p.Ext.Port, flow)
	}
}

// What host two sends takes the second uplink, or does not.
func TestTwoOutsideLinksDoNotMixAddresses(t *testing.T) {
	d := withMapping(func(d *rules.Desired, _ *rules.MappingConfig) { d.OutsideLinks = []string{"wan0", "wan1"} })
	m := newMapper(t, lab.Options{Inside: 2, Rules: `table ip nat { chain postrouting {
		type nat hook postrouting priority srcnat; oifname { "wan0", "wan1" } masquerade; }; }`}, d)
	const second = "198.51.100.129"
	for _, step := range []struct {
		at   *lab.Host
		args string
	}{
		{m.Gateway, fmt.Sprintf("link add wan1 type veth peer name wan1 netns /proc/%d/fd/%d", os.Getpid(), m.Outside.FD())},
		{m.Gateway, "address add " + second + "/32 dev wan1"},
		{m.Gateway, "link set wan1 up"},
		{m.Outside, "link set wan1 up"},
		{m.Outside, "route add " + second + "/32 dev wan1"},
		{m.Gateway, "route add " + lab.PeerB.String() + " via 198.51.100.254 dev wan1 onlink"},
	} {
		if _, err := step.at.Output("ip", strings.Fields(step.args)...); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { return strings.Contains(output(t, m.Lab, "ip", "-brief", "link", "show", "wan1"), " UP ") })
	a, b := []*lab.Socket{m.peer(lab.PeerA, 1), m.peer(lab.PeerA, 2)}, []*lab.Socket{m.peer(lab.PeerB, 1), m.peer(lab.PeerB, 2)}
	one, two := m.host(0, 3074), m.host(1, 3074)
	ext := netip.AddrPortFrom(netip.MustParseAddr(second), 3074)
	for range 2 {
		m.maps(one, m.ext(3074), a...)
		m.maps(one, ext, b...)
		m.forget(one)
	}
	for i, peers := range [][]*lab.Socket{a, b} {
		got := m.contact(two, peers[0])
		if !inPool(got) || got.Addr() != []netip.Addr{m.Gateway.Addr, ext.Addr()}[i] {
			t.Errorf("the second host got %v on link %d", got, i)
		}
		m.maps(two, got, peers...)
	}
	if all := m.mappings(); len(all) != 4 {
		t.Errorf("mappings: %v", all)
	}
}

// The pool must be on the address that the user's rules give to a host.
func TestAPoolPortIsOnTheHostsOwnOutsideAddress(t *testing.T) {
	const second = "198.51.100.2"
	m := newMapper(t, lab.Options{Inside: 4, Rules: `table ip nat { chain postrouting {
		type nat hook postrouting priority srcnat; ip saddr { 10.47.11.110, 10.47.11.112 } snat to ` + second + `; oifname "wan0" masquerade; }; }`}, mapping)
	output(t, m.Lab, "ip", "address", "add", second+"/24", "dev", "wan0")
	if _, err := m.Outside.Output("ip", "neigh", "add", second, "lladdr", "02:47:c6:33:64:01", "dev", "eth0", "nud", "permanent"); err != nil {
		t.Fatal(err)
	}
	ext2 := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(second), port) }
	peers := m.peers()
	m.maps(m.host(0, 3074), m.ext(3074), peers...)
	m.maps(m.host(1, 4000), ext2(4000), peers...)
	m.maps(m.host(1, 3074), ext2(3074), peers...) // nobody owns it on that address
	// Nobody knows yet what host three gets, so its first flow is left to the rules.
	three := m.host(3, 3074)
	m.maps(three, ext2(3074), m.peer(lab.PeerB, 9))
	ext := m.contact(three, peers[1])
	if !inPool(ext) || ext.Addr() != ext2(0).Addr() {
		t.Errorf("got %v", ext)
	}
	m.maps(three, ext, peers[2])
}

func TestFullMapOfMappingsLeavesFlowsToTheRules(t *testing.T) {
	m := newMapper(t, lab.Options{}, withMapping(func(_ *rules.Desired, c *rules.MappingConfig) { c.Size = 3 }))
	peers := m.peers()
	for port := uint16(5000); port < 5010; port++ {
		m.maps(m.host(0, port), m.ext(port), peers...)
	}
	if all := m.mappings(); len(all) != 3 {
		t.Errorf("mappings: %v", all)
	}
}

// hairpins checks that what from sends to the outside endpoint to arrives at in,
// from the outside endpoint as, and that an answer finds its way back.
func (m *mapper) hairpins(from *lab.Socket, to netip.AddrPort, in *lab.Socket, as netip.AddrPort) {
	m.t.Helper()
	payload := fmt.Sprintf("hairpin of %v to %v", from.Addr(), to)
	check(m.t, from.Send(to, payload))
	seen, err := in.Expect(payload)
	check(m.t, err)
	if seen != as {
		m.t.Errorf("%v sees %v as %v, want %v", in.Addr(), from.Addr(), seen, as)
	}
	check(m.t, in.Send(as, "answer to "+payload))
	seen, err = from.Expect("answer to " + payload)
	check(m.t, err)
	if seen != to {
		m.t.Errorf("the answer comes from %v, want %v", seen, to)
	}
}

func TestHairpinHasTheOutsideSource(t *testing.T) {
	for name, nat := range map[string]string{
		"by masquerade": lab.Masquerade, "to an address": lab.SNATTo(ext4), "behind a drop policy": lab.Masquerade + lab.DropPolicy,
	} {
		t.Run(name, func(t *testing.T) {
			m := newMapper(t, lab.Options{Inside: 3, Rules: nat}, hairpinning)
			peers := m.peers()
			one, two := m.host(0, 3074), m.host(1, 3074)
			m.maps(one, m.ext(3074), peers[0])
			ext := m.contact(two, peers[0])
			m.hairpins(one, ext, two, m.ext(3074))
			m.hairpins(two, m.ext(3074), one, ext)
			m.forget(one)
			m.hairpins(two, m.ext(3074), one, ext) // the other one opens it
			m.hairpins(one, ext, two, m.ext(3074))

			// One without a mapping gets one.
			three := m.host(2, 5000)
			m.hairpins(three, ext, two, m.ext(5000))
			m.maps(three, m.ext(5000), peers...)
			m.hairpins(two, m.ext(5000), three, ext)
			if c := count(t, m.tables); c.Hairpinned == 0 || c.LeftToRules != 0 {
				t.Errorf("%+v", c)
			}
		})
	}
}

func TestHairpinOfANewcomerWhosePortIsOwned(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 3}, hairpinning)
	peers := m.peers()
	one, two, three := m.host(0, 3074), m.host(1, 4000), m.host(2, 3074)
	m.maps(one, m.ext(3074), peers[0])
	m.maps(two, m.ext(4000), peers[0])
	check(t, three.Send(m.ext(4000), "newcomer"))
	ext, err := two.Expect("newcomer")
	check(t, err)
	if !inPool(ext) {
		t.Errorf("seen as %v", ext)
	}
	m.maps(three, ext, peers...)
	m.hairpins(one, ext, three, m.ext(3074))
}

func TestHairpinLeavesAlone(t *testing.T) {
	for _, test := range []struct {
		name string
		user string
		run  func(m *mapper, one, two *lab.Socket)
	}{
		{"what the gateway serves", "", func(m *mapper, one, _ *lab.Socket) {
			server := listen(m.t, m.Gateway, netip.IPv4Unspecified(), 3074)
			check(m.t, one.Send(m.ext(3074), "to the gateway"))
			from, err := server.Expect("to the gateway")
			check(m.t, err)
			if from != one.Addr() {
				m.t.Errorf("from %v", from)
			}
		}},
		{
			"forwards of the user's", `table ip user { chain c {
			type nat hook prerouting priority dstnat; ip daddr 198.51.100.1 udp dport 4000 dnat to 10.47.11.111; }; }`,
			func(m *mapper, one, _ *lab.Socket) {
				three := m.host(2, 4000)
				check(m.t, one.Send(m.ext(4000), "forwarded"))
				_, err := three.Expect("forwarded")
				check(m.t, err)
			},
		},
		{"other subnets", "", func(m *mapper, one, two *lab.Socket) {
			check(m.t, lab.Lost(two,
				lab.Packet{From: listen(m.t, m.Guest, m.Guest.Addr, 9), To: m.ext(4000), Payload: "guest"},
				lab.Packet{From: listen(m.t, m.Guest, m.Guest.Addr, 10), To: two.Addr(), Payload: "fence"}))
		}},
		{"a port that nobody owns", "", func(m *mapper, one, two *lab.Socket) {
			check(m.t, lab.Lost(two,
				lab.Packet{From: one, To: m.ext(4001), Payload: "nobody's"},
				lab.Packet{From: one, To: m.ext(4000), Payload: "fence"}))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newMapper(t, lab.Options{Inside: 3, Guest: true, Rules: lab.Masquerade + test.user}, hairpinning)
			one, two := m.host(0, 3074), m.host(1, 4000)
			m.maps(one, m.ext(3074), m.peer(lab.PeerA, 1))
			// Its answer would go by the user's forward: it needs none.
			ext, err := two.Contact(m.peer(lab.PeerA, 2))
			if err != nil || ext != m.ext(4000) {
				t.Fatal(ext, err)
			}
			test.run(m, one, two)
		})
	}
}

// The peer's packet to the gateway has made an entry that is in the way.
func TestAHairpinAfterAPacketToTheGatewayIsNotLost(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, hairpinning)
	one, two := m.host(0, 3074), m.host(1, 4000)
	peer := m.peer(lab.PeerA, 1)
	m.maps(two, m.ext(4000), peer)
	check(t, two.Send(m.ext(3074), "too early")) // nobody owns it yet
	eventually(t, func() bool { return strings.Contains(m.listSet("set", "taken"), "3074 . 10.47.11.110 . 4000") })
	m.maps(one, m.ext(3074), peer)
	check(t, one.Send(m.ext(4000), "hairpin"))
	if _, err := two.Expect("hairpin"); err != nil {
		t.Error(err)
	}
}

func TestSetOfMappingsChangesNothingTheSecondTime(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, hairpinning)
	in := m.host(0, 3074)
	p := mapped(in, m.contact(in, m.peer(lab.PeerA, 3074)))
	for _, d := range []rules.Desired{hairpinning, mapping, mapping, withMapping(func(d *rules.Desired, c *rules.MappingConfig) {
		c.Served, c.Exempt, c.Lifetime = []uint16{1, 2}, nil, time.Hour
		c.Pool = []rules.PortRange{{First: 50000, Last: 50999}}
		d.OutsideLinks = []string{"wan0", "ppp0"}
	})} {
		set(t, m.tables, d)
		before := ours(t, m.Lab)
		changed, err := m.tables.Set(d)
		if changed || err != nil {
			t.Errorf("changed %v, %v", changed, err)
		}
		if after := ours(t, m.Lab); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
		m.holds(p)
	}
	// Another process takes it over.
	check(t, m.tables.Close())
	m.tables = open(t, m.Lab)
	set(t, m.tables, hairpinning)
	m.holds(p)
	m.maps(in, m.ext(3074), m.peer(lab.PeerB, 1))
	// Beside the map of permissions, and without.
	both := learning
	both.Mapping = mapping.Mapping
	set(t, m.tables, both)
	m.holds(p)
	set(t, m.tables, learning)
	m.holds()
	set(t, m.tables, mapping)
	m.holds()
}

// Any nft lists the rules, and loads what it listed; e2e tries other versions.
func TestNFTListsMappings(t *testing.T) {
	several := withMapping(func(d *rules.Desired, c *rules.MappingConfig) {
		d.OutsideLinks = []string{"wan0", "wan-1.7", "p p@:%"}
		c.Subnets = []netip.Prefix{lab.InsideNet, netip.MustParsePrefix("10.47.8.0/23")}
		c.Exempt = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/25")}
		c.Hairpin = []netip.Prefix{netip.MustParsePrefix("10.47.8.0/22")}
		c.Pool = []rules.PortRange{{First: 50000, Last: 50031}, {First: 30001, Last: 30998}, {First: 2, Last: 3}}
	})
	for _, d := range []rules.Desired{mapping, hairpinning, several} {
		m := newMapper(t, lab.Options{Inside: 2}, d)
		peer := m.peer(lab.PeerA, 1)
		m.contact(m.host(0, 3074), peer)
		m.contact(m.host(1, 3074), peer)
		list := output(t, m.Lab, "nft", "list", "table", "ip", "conenat")
		for _, want := range []string{
			"type nat hook postrouting priority -199;",
			"ip saddr . udp sport map @kept_wan0", "map @moved_wan0", "update @taken { ct reply proto-dst",
			"rt ipsec missing", "ip daddr != 192.0.2.", "elements = { 53 }",
			`comment "its mapping"`, "counter left_to_rules",
		} {
			if !strings.Contains(list, want) {
				t.Errorf("not in the list: %s", want)
			}
		}
		if got := strings.Contains(list, "chain hairpinned"); got != (d.Mapping.Hairpin != nil) {
			t.Errorf("hairpin rules: %v", got)
		}
		if strings.Contains(list, "hook prerouting") && !strings.Contains(list, "priority 2147483647;") {
			t.Error("the user's forwards do not come before hairpinning")
		}
		// An owned table would end with nft.
		file, list := t.TempDir()+"/list", ownerFlags.ReplaceAllString(list, "")
		check(t, os.WriteFile(file, []byte(list), 0o600))
		if out, err := m.Outside.Output("nft", "-f", file); err != nil {
			t.Errorf("%s: %v", out, err)
		}
		again, err := m.Outside.Output("nft", "list", "table", "ip", "conenat")
		check(t, err)
		if lacks := lacking(list, again); len(lacks) > 0 {
			t.Errorf("the copy lacks %q", lacks)
		}
	}
}

var ownerFlags = regexp.MustCompile(`\tflags owner.*\n`)

// lacking returns the lines of list that are not in copied, but for elements.
func lacking(list, copied string) (lacks []string) {
	for line := range strings.Lines(list) {
		if !strings.Contains(copied, line) && !strings.Contains(line, " expires ") && !strings.HasPrefix(line, "table") &&
			!strings.Contains(line, "packets ") {
			lacks = append(lacks, line)
		}
	}
	return lacks
}

func TestKeepRefusesWhatAnotherMappingHas(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	one, two := m.host(0, 3074), m.host(1, 3074)
	p := mapped(one, m.ext(3074))
	q := mapped(one, m.ext(4000)) // it has another outside endpoint
	r := mapped(two, m.ext(3074)) // it has another owner
	s := mapped(two, m.ext(5000))
	k := m.kept()
	k.Keep([]elements.Mapping{p}, func(_ int, err error) { t.Error(err) })
	k.SetLifetime(time.Hour)
	for range 2 { // the second time they stand already
		var refused []int
		k.Keep([]elements.Mapping{q, p, r, s}, func(i int, err error) {
			refused = append(refused, i)
			if !errors.Is(err, elements.ErrOtherMapping) {
				t.Error(i, err)
			}
		})
		if fmt.Sprint(refused) != "[0 2]" {
			t.Errorf("refused %v", refused)
		}
		m.holds(p, s)
		for p, left := range m.mappings() {
			if left < 59*time.Minute {
				t.Errorf("%v has %v left", p, left)
			}
		}
	}
	// The rules take what was put there, port 5000 of host two, and its owner.
	peer := m.peer(lab.PeerA, 1)
	m.maps(two, m.ext(5000), peer)
	m.maps(m.host(0, 5001), m.ext(5001), peer) // the outside address is known now
	if ext := m.contact(m.host(0, 5000), peer); !inPool(ext) {
		t.Errorf("an owned port was given away: %v", ext)
	}

	check(t, k.Revoke([]elements.Mapping{p, s, p}))
	if all := m.mappings(); len(all) != 2 {
		t.Errorf("mappings: %v", all)
	}
	if list := m.listSet("set", "owned"); strings.Contains(list, "3074") || strings.Contains(list, "5000 timeout") {
		t.Error(list)
	}
}

func TestTakeKeepsAMappingFromBeingUsed(t *testing.T) {
	m := newMapper(t, lab.Options{}, mapping)
	peers := m.peers()
	in := m.host(0, 3074)
	m.maps(in, m.ext(3074), peers[0])
	taken := []elements.Taken{{Remote: cone.EndpointFrom(peers[1].Addr()), Port: 3074}}
	for range 2 {
		check(t, m.kept().Take(taken))
	}
	m.maps(in, m.ext(3074), peers[1:]...)
	if c := count(t, m.tables); c.LeftToRules != 1 {
		t.Errorf("%+v", c)
	}
}

// The address of the link changes.
func TestForgetEndsAllOfAnOutsideAddress(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	one, two, peer := m.host(0, 3074), m.host(1, 3074), m.peer(lab.PeerA, 1)
	m.contact(one, peer)
	m.contact(two, peer)
	k := m.kept()
	check(t, k.Forget(netip.MustParseAddr("198.51.100.3")))
	if all := m.mappings(); len(all) != 2 {
		t.Errorf("mappings: %v", all)
	}
	unanswered := m.peer(lab.PeerB, 1)
	send := func() {
		t.Helper()
		if _, err := one.Contact(unanswered); err != nil {
			t.Error(err)
		}
	}
	send()
	const second = "198.51.100.2"
	output(t, m.Lab, "ip", "address", "add", second+"/24", "dev", "wan0")
	output(t, m.Lab, "ip", "address", "del", m.Gateway.Addr.String()+"/24", "dev", "wan0")
	output(t, m.Lab, "ip", "address", "replace", second+"/24", "dev", "wan0")
	output(t, m.Lab, "ip", "route", "replace", "default", "via", "198.51.100.254")
	if _, err := m.Outside.Output("ip", "neigh", "add", second, "lladdr", "02:47:c6:33:64:01", "dev", "eth0", "nud", "permanent"); err != nil {
		t.Fatal(err)
	}
	check(t, k.Forget(m.Gateway.Addr))
	send() // by the flow that there is
	m.holds()
	check(t, k.Return(m.Gateway.Addr))
	send()
	m.holds(mapped(one, m.ext(3074)))
	check(t, k.Forget(m.Gateway.Addr))
	for _, set := range []string{"map addresses_wan0", "set translated_wan0", "set owned"} {
		kind, name, _ := strings.Cut(set, " ")
		if list := m.listSet(kind, name); strings.Contains(list, "elements") {
			t.Error(list)
		}
	}
	check(t, m.Flush())
	m.maps(one, netip.AddrPortFrom(netip.MustParseAddr(second), 3074), peer)
	if ext := m.contact(two, peer); ext.Addr().String() != second || !inPool(ext) {
		t.Errorf("the second host got %v", ext)
	}
	check(t, k.Forget(netip.Addr{}))
	m.holds()
}

func TestKeepAndTakeDoNotAllocate(t *testing.T) {
	m := newMapper(t, lab.Options{}, mapping)
	refused := func(i int, err error) { t.Fatal(i, err) }
	k := m.kept()
	for _, n := range []int{1, 256, 600} { // 600 is three batches
		var ms []elements.Mapping
		var flows []elements.Taken
		for i := range n {
			e := cone.EndpointFrom(netip.AddrPortFrom(m.Inside(0).Addr, uint16(1000+i)))
			ms = append(ms, elements.Mapping{Link: "wan0", Int: e, Ext: cone.EndpointFrom(m.ext(e.Port))})
			flows = append(flows, elements.Taken{Remote: e, Port: e.Port})
		}
		if got := testing.AllocsPerRun(20, func() {
			k.Keep(ms, refused)
			if err := errors.Join(k.Take(flows), k.Revoke(ms)); err != nil {
				t.Fatal(err)
			}
		}); got != 0 {
			t.Errorf("%v allocations for %d mappings", got, n)
		}
	}
}

// Whatever uses the outside ports, and in whatever order: each packet arrives, an
// inside endpoint has one outside endpoint, but where something else has it towards
// that peer, and no two have the same.
func TestNoPacketIsLostWhateverComes(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			how := []string{"", "random", "to :3000-6000", "fully-random"}[seed]
			m := newMapper(t, lab.Options{Inside: 3, Guest: true, Rules: `table ip nat { chain postrouting {
				type nat hook postrouting priority srcnat; oifname "wan0" meta l4proto udp masquerade ` + how + `; }; }`}, mapping)
			r := rand.New(rand.NewPCG(seed, 0))
			var inside, others, peers []*lab.Socket
			for _, port := range []uint16{3074, 5000} {
				for i := range 3 {
					inside = append(inside, m.host(i, port))
				}
				others = append(others, listen(t, m.Gateway, m.Gateway.Addr, port), listen(t, m.Guest, m.Guest.Addr, port))
				peers = append(peers, m.peer(lab.PeerA, port), m.peer(lab.PeerB, port))
			}
			any := func(s []*lab.Socket) *lab.Socket { return s[r.IntN(len(s))] }
			n := 0
			reaches := func(from, to *lab.Socket, addr netip.AddrPort) (seen netip.AddrPort) {
				t.Helper()
				n++
				payload := fmt.Sprintf("%d from %v to %v", n, from.Addr(), to.Addr())
				check(t, from.Send(addr, payload))
				for got := ""; got != payload; { // what came early may arrive too
					var err error
					if got, seen, err = to.Recv(5 * time.Second); err != nil {
						t.Fatal(payload, err)
					}
				}
				return seen
			}
			ports := []uint16{3074, 5000}
			exts, owners := map[*lab.Socket]netip.AddrPort{}, map[netip.AddrPort]*lab.Socket{}
			flows := map[[2]*lab.Socket]netip.AddrPort{} // that live, and are not as they should be
			astray := uint64(0)
			for range 400 {
				switch r.IntN(10) {
				case 0:
					check(t, any(peers).Send(m.ext(ports[r.IntN(len(ports))]), "early"))
				case 1:
					from, peer := any(others), any(peers)
					reaches(from, peer, peer.Addr())
				case 2:
					check(t, m.Flush())
					clear(flows)
				default:
					in, peer := any(inside), any(peers)
					ext := reaches(in, peer, peer.Addr())
					switch known, ok := exts[in]; {
					case !ok && owners[ext] == nil:
						exts[in], owners[ext] = ext, in
						ports = append(ports, ext.Port())
					case ext != known && ext != flows[[2]*lab.Socket{in, peer}]:
						flows[[2]*lab.Socket{in, peer}] = ext
						astray++
					}
					if r.IntN(2) == 0 {
						reaches(peer, in, ext)
					}
				}
			}
			c := count(t, m.tables)
			if astray > c.LeftToRules+1 { // the first one that is moved may be
				t.Errorf("%d flows did not go by their mappings; %+v", astray, c)
			}
			for p := range m.mappings() {
				in := owners[p.Ext.Netip()]
				if in == nil || cone.EndpointFrom(in.Addr()) != p.Int {
					t.Errorf("%v is not what peers saw", p)
				}
			}
			if len(m.mappings()) != len(inside) {
				t.Errorf("%v", m.mappings())
			}
			t.Logf("%d flows left to the rules, %d astray", c.LeftToRules, astray)
		})
	}
}

// Ports of TCP are others.
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

// Between the subnets of Hairpin, with mappings or without.
func TestHairpinOfASubnetWithoutMappings(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2, Guest: true}, withMapping(func(_ *rules.Desired, c *rules.MappingConfig) {
		c.Hairpin = []netip.Prefix{lab.InsideNet, lab.GuestNet}
	}))
	peer := m.peer(lab.PeerA, 1)
	in, guest := m.host(0, 3074), listen(t, m.Guest, m.Guest.Addr, 5000)
	m.maps(in, m.ext(3074), peer)
	m.hairpins(guest, m.ext(3074), in, m.ext(5000))
	m.holds(mapped(in, m.ext(3074)))
	// The guest's flow has port 5000 towards the inside host, whoever owns it.
	other := m.host(1, 5000)
	m.maps(other, m.ext(5000), peer)
	check(t, other.Send(m.ext(3074), "from the owner"))
	for got := ""; got != "from the owner"; {
		var err error
		if got, _, err = in.Recv(5 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
}

// A newcomer gets the same port of the pool each time, unless something has it.
func TestAPoolPortThatIsInUseIsPassedOver(t *testing.T) {
	newcomer := func(d rules.Desired, before func(m *mapper, peer *lab.Socket)) netip.AddrPort {
		m := newMapper(t, lab.Options{Inside: 2}, d)
		peer := m.peer(lab.PeerA, 1)
		m.maps(m.host(0, 3074), m.ext(3074), peer)
		before(m, peer)
		in := m.host(1, 3074)
		ext := m.contact(in, peer)
		if !inPool(ext) || ext.Port()%2 != 0 {
			t.Errorf("got %v", ext)
		}
		m.maps(in, ext, m.peer(lab.PeerB, 1))
		return ext
	}
	nothing := func(*mapper, *lab.Socket) {}
	first := newcomer(mapping, nothing)
	if again := newcomer(mapping, nothing); again != first {
		t.Errorf("%v at first, then %v", first, again)
	}
	if got := newcomer(withMapping(func(_ *rules.Desired, c *rules.MappingConfig) { c.Served = []uint16{first.Port()} }), nothing); got == first {
		t.Error("the gateway serves it")
	}
	if got := newcomer(mapping, func(m *mapper, peer *lab.Socket) {
		check(t, m.kept().Take([]elements.Taken{{Remote: cone.EndpointFrom(peer.Addr()), Port: first.Port()}}))
	}); got == first {
		t.Error("it is taken towards the peer")
	}
	if got := newcomer(mapping, func(m *mapper, _ *lab.Socket) {
		p := elements.Mapping{Link: "wan0", Int: cone.EndpointFrom(netip.MustParseAddrPort("10.47.11.200:1")), Ext: cone.EndpointFrom(first)}
		m.kept().Keep([]elements.Mapping{p}, func(_ int, err error) { t.Error(err) })
	}); got == first {
		t.Error("another one has it")
	}
}

// An inside host may send from port 0; conntrack takes that for none.
func TestPortZeroGetsNoMapping(t *testing.T) {
	m := newMapper(t, lab.Options{}, mapping)
	udp(t, m.Inside(0), netip.AddrPortFrom(m.Inside(0).Addr, 0), netip.AddrPortFrom(lab.PeerA, 5060))
	eventually(t, func() bool { return len(entries(t, m.Lab, "-p", "udp", "-d", lab.PeerA.String())) == 1 })
	m.holds()
}

func TestAHairpinFromPortZeroGetsNoMapping(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, hairpinning)
	one, peer := m.host(0, 5060), m.peer(lab.PeerA, 5060)
	ext := m.contact(one, peer)
	udp(t, m.Inside(1), netip.AddrPortFrom(m.Inside(1).Addr, 0), ext)
	eventually(t, func() bool { return len(entries(t, m.Lab, "-p", "udp", "-s", m.Inside(1).Addr.String())) == 1 })
	m.holds(mapped(one, ext))
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

// The user leads what his hosts send elsewhere. That is no hairpin.
func TestARedirectedFlowHasItsMapping(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2, Rules: lab.Masquerade + `table ip f { chain c {
		type nat hook prerouting priority dstnat; iifname "lan0" udp dport 9999 dnat to 203.0.113.6:3074; }; }`}, hairpinning)
	peers := m.peers()
	m.maps(m.host(0, 3074), m.ext(3074), peers[0])
	in := m.host(1, 3074)
	ext := m.contact(in, peers[0])
	m.forget(in) // or the kernel would look at that flow
	check(t, in.Send(netip.AddrPortFrom(lab.PeerA, 9999), "redirected"))
	if from, err := peers[2].Expect("redirected"); err != nil || from != ext || !inPool(ext) {
		t.Errorf("it leaves as %v, want %v (%v)", from, ext, err)
	}
}

// A packet from outside in another zone takes no port of the default one's.
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

// The user forwards a port that a mapping has, and the peer comes in by that.
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

// The second host's flow cannot have its mapping, and gets the first one's port.
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

// A daemon that starts knows mappings from flows, and the kernel has seen none.
func TestTeachTellsOnWhichAddressTheirPoolIs(t *testing.T) {
	for name, tc := range map[string]struct {
		more  []string // further outside addresses of the link
		teach bool
		moved bool
	}{
		"not taught":        {nil, false, false},
		"one address":       {nil, true, true},
		"several addresses": {[]string{"198.51.100.77"}, true, false}, // which one is the newcomer's?
	} {
		t.Run(name, func(t *testing.T) {
			m := newMapper(t, lab.Options{Inside: 2}, mapping)
			one, two := m.Inside(0).Addr, m.host(1, 3074)
			ms := []elements.Mapping{{
				Link: "wan0", Int: cone.EndpointFrom(netip.AddrPortFrom(one, 3074)), Ext: cone.EndpointFrom(m.ext(3074)),
			}}
			m.kept().Keep(ms, func(_ int, err error) { t.Fatal(err) })
			for _, a := range tc.more {
				ms = append(ms, elements.Mapping{
					Link: "wan0", Int: cone.EndpointFrom(netip.AddrPortFrom(one, 3075)),
					Ext: cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr(a), 3075)),
				})
			}
			if tc.teach {
				check(t, m.kept().Teach(ms))
				check(t, m.kept().Teach(ms)) // again, it changes nothing
			}
			if list := m.listSet("set", "translated_wan0"); strings.Contains(list, "198.51.100.1") != tc.teach {
				t.Error(list)
			}
			if ext := m.contact(two, m.peer(lab.PeerA, 3074)); inPool(ext) != tc.moved {
				t.Errorf("the newcomer leaves as %v", ext)
			}
		})
	}
}

// A flow that is older than its mapping may have another outside endpoint. It makes
// nobody the owner of that.
func TestAnOlderFlowOwnsNothing(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	one, two, peer := m.host(0, 3074), m.host(1, 3074), m.peer(lab.PeerA, 1)
	m.maps(one, m.ext(3074), peer)
	old, err := two.Contact(peer) // not answered: each packet of it meets the rules
	check(t, err)
	check(t, m.kept().Forget(m.Gateway.Addr))
	check(t, m.kept().Return(m.Gateway.Addr))
	ext := netip.AddrPortFrom(netip.MustParseAddr("198.51.100.77"), old.Port())
	m.kept().Add([]elements.Mapping{mapped(two, ext)}, func(_ int, err error) { t.Error(err) })
	if again, err := two.Contact(peer); again != old || err != nil {
		t.Error(again, err)
	}
	m.holds(mapped(two, ext))
	if list := m.listSet("set", "owned"); strings.Contains(list, m.Gateway.Addr.String()+" .") {
		t.Error(list)
	}
}

func TestRivalsAreChainsBeforeOurs(t *testing.T) {
	m := newMapper(t, lab.Options{Rules: lab.Masquerade + `
		table ip first { chain c { type nat hook postrouting priority -199; }; chain later { type nat hook postrouting priority -198; }
			chain other { type nat hook prerouting priority -199; }; chain filter { type filter hook postrouting priority -199; }; }
		table ip older { chain made_by_conenatd { }; chain map_source { type nat hook postrouting priority -199; }; }
		table inet both { chain c { type nat hook postrouting priority -199; }; }`}, mapping)
	got, err := m.tables.Rivals()
	check(t, err)
	if fmt.Sprint(got) != "[inet both c ip first c]" {
		t.Errorf("got %q", got)
	}
}
