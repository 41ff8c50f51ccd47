package rules_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// carriers let a permission of benchExt and benchInt for PeerA stand, with a cap on children.
var carriers = map[string]func(t *testing.T, l *lab.Lab, most int){
	"map":                   func(t *testing.T, l *lab.Lab, most int) { byMap(t, l, most, 0) },
	"map, a group of peers": func(t *testing.T, l *lab.Lab, most int) { byMap(t, l, most, 4) },
	"map, everybody":        func(t *testing.T, l *lab.Lab, most int) { byMap(t, l, most, 32) },
	"map, a zone of one direction": func(t *testing.T, l *lab.Lab, most int) {
		check(t, l.NFT(`table ip zones { chain pre { type filter hook prerouting priority raw; iifname wan0 ct original zone set 5; }; }`))
		byMap(t, l, most, 0, benchExt.Addr())
	},
	"expectation":                   func(t *testing.T, l *lab.Lab, most int) { byExpectation(t, l, most, 0) },
	"expectation, a group of peers": func(t *testing.T, l *lab.Lab, most int) { byExpectation(t, l, most, 4) },
}

func byMap(t *testing.T, l *lab.Lab, most int, hostBits uint8, zoned ...netip.Addr) *elements.Map {
	t.Helper()
	d, m := learning, *learning.Map
	m.MaxChildren = most
	switch hostBits {
	case 0:
	case 32:
		m.OpenSubnets = m.Subnets
	default:
		m.PeerGroups = []netip.Prefix{netip.PrefixFrom(lab.PeerA, 32-int(hostBits)).Masked()}
	}
	d.Map, d.Helpers, d.ZonedAddrs = &m, nil, zoned
	tables := open(t, l)
	set(t, tables, d)
	granted := tables.NewMap(d.Map)
	granted.Grant([]cone.Permission{groupPermission(hostBits)}, func(_ int, r cone.Reason, err error) { t.Fatal(r, err) })
	return granted
}

func byExpectation(t *testing.T, l *lab.Lab, most int, hostBits uint8) {
	t.Helper()
	b, err := expect.Open(expect.Config{NetNS: l.Gateway.FD(), Lifetime: time.Hour})
	check(t, err)
	t.Cleanup(func() { check(t, b.Close()) })
	b.Grant([]cone.Permission{groupPermission(hostBits)}, func(_ int, r cone.Reason, err error) { t.Fatal(r, err) })
	set(t, open(t, l), rules.Desired{OutsideLinks: []string{"wan0"}, Subnets: both, Guard: true, Helpers: b.OnAnchors(), MaxChildren: most})
}

func groupPermission(hostBits uint8) cone.Permission {
	p := permission(benchExt, benchInt, lab.PeerA)
	p.HostBits, p.Peer = hostBits, p.Peer.WithoutLow(hostBits)
	return p
}

// A limit means the same for each carrier: live flows of one peer to one outside endpoint. It binds
// in the kernel, and a flow that ends makes room.
//
// Fails when only the first packets in a time are counted: meanwhile there is room for more of
// them, and a group of peers has more room.
func TestLimitIsOfLiveFlows(t *testing.T) {
	for name, permit := range carriers {
		t.Run(name, func(t *testing.T) {
			const most, ports = 2000, 20_000
			l := lab.ForTest(t, lab.Options{})
			permit(t, l, most)
			f := newFlood(t, l, ports)
			for i := range ports {
				f.Aim(i, netip.AddrPortFrom(lab.PeerA, uint16(20_000+i)), benchExt)
			}
			check(t, f.Send(0, ports))
			if n := f.came(t); n != most {
				t.Errorf("%d of %d came in, want %d", n, ports, most)
			}
			output(t, l, "conntrack", "-D", "-p", "udp", "-s", lab.PeerA.String())
			eventually(t, func() bool { check(t, f.Send(0, 1)); return f.came(t) == 1 })
		})
	}
}

// Fails when a flow that the inside host opened counts as one of the peer's.
func TestOwnFlowsAreNoChildren(t *testing.T) {
	for name, permit := range carriers {
		t.Run(name, func(t *testing.T) {
			const most = 10
			l := lab.ForTest(t, lab.Options{})
			permit(t, l, most)
			inside := listen(t, l.Inside(0), benchInt.Addr(), benchInt.Port())
			for i := range 20 * most { // a group may have 16 times as many
				peer := listen(t, l.Outside, lab.PeerA, uint16(20_000+i))
				ext, err := inside.Contact(peer)
				check(t, err)
				if ext != benchExt {
					t.Fatalf("the host's packet comes from %v", ext)
				}
				check(t, lab.Arrives(inside, lab.Packet{From: peer, To: ext, Payload: "answer"}))
			}
			send(t, l, lab.PeerA, most, benchExt)
			got := 0
			eventually(t, func() bool { got += receive(t, inside); return got == most })
		})
	}
}
