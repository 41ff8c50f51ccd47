package rules_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// hairpins checks that a packet from from to the outside endpoint to arrives at in, with
// the source as, and that an answer gets back.
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

			// A host without a mapping gets one.
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
			// Its answer uses the user's forward, so it needs no mapping.
			ext, err := two.Contact(m.peer(lab.PeerA, 2))
			if err != nil || ext != m.ext(4000) {
				t.Fatal(ext, err)
			}
			test.run(m, one, two)
		})
	}
}

// The peer's packet to the gateway has made a conflicting conntrack entry.
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

// Hairpinning works between the subnets of Hairpin, with and without mappings.
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

func TestAHairpinFromPortZeroGetsNoMapping(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, hairpinning)
	one, peer := m.host(0, 5060), m.peer(lab.PeerA, 5060)
	ext := m.contact(one, peer)
	udp(t, m.Inside(1), netip.AddrPortFrom(m.Inside(1).Addr, 0), ext)
	eventually(t, func() bool { return len(entries(t, m.Lab, "-p", "udp", "-s", m.Inside(1).Addr.String())) == 1 })
	m.holds(mapped(one, ext))
}
