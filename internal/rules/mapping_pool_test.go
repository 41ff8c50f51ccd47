package rules_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

func TestAPoolPortIsOddWhereTheOwnPortIs(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	peer := m.peer(lab.PeerA, 3074)
	m.maps(m.host(0, 3075), m.ext(3075), peer)
	if ext := m.contact(m.host(1, 3075), peer); !inPool(ext) || ext.Port()%2 != 1 {
		t.Errorf("the second host got %v", ext)
	}
}

// Most of the first tries hit a port that is owned.
func TestMostOfASmallPoolIsUsed(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 9}, withMapping(func(_ *rules.Desired, c *rules.MappingConfig) {
		c.Pools = pool(50000, 50031) // 16 of them are even
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

// One port of the pool is even. A host that finds no port is treated as without mappings:
// no packet is lost, whoever has the port.
func TestAPoolThatIsUsedUpLeavesNewcomersToTheRules(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 4}, withMapping(func(_ *rules.Desired, c *rules.MappingConfig) {
		c.Pools = pool(50000, 50001)
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

// A host can occupy ports of the pool by sending from them. No choice of the ports to try
// can prevent that.
func TestAPoolPortBelongsToWhoSendsFromIt(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 3}, withMapping(func(_ *rules.Desired, c *rules.MappingConfig) {
		c.Pools = pool(50000, 50001)
	}))
	peers := m.peers()
	m.maps(m.host(0, 50000), m.ext(50000), peers...)
	m.maps(m.host(1, 3074), m.ext(3074), peers...)
	m.contact(m.host(2, 3074), peers[0])
	if c := count(t, m.tables); c.Moved != 0 || c.PoolUsedUp != 1 {
		t.Errorf("%+v", c)
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

// For a port of the pool the kernel would not look for another port by itself.
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
	// The outside address of host three is not known yet, so its first flow is left to the
	// rules.
	three := m.host(3, 3074)
	m.maps(three, ext2(3074), m.peer(lab.PeerB, 9))
	ext := m.contact(three, peers[1])
	if !inPool(ext) || ext.Addr() != ext2(0).Addr() {
		t.Errorf("got %v", ext)
	}
	m.maps(three, ext, peers[2])
}

// Whatever uses the outside ports, and in whatever order: each packet arrives. An inside
// endpoint has one outside endpoint, unless something else uses that towards the peer. No
// two inside endpoints have the same one.
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
