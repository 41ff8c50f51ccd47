package rules_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// mapping asks for mappings and nothing else.
var mapping = rules.Desired{
	OutsideLinks: []string{"wan0"},
	Mapping: &rules.MappingConfig{
		Subnets:  []netip.Prefix{lab.InsideNet},
		Exempt:   []netip.Prefix{netip.PrefixFrom(lab.PeerC, 32)},
		Pools:    pool(50000, 59999),
		Lifetime: 5 * time.Minute,
		Size:     1000,
		Served:   []uint16{53},
	},
}

// pool is a pool for all hosts.
func pool(first, last uint16) []rules.Pool {
	return []rules.Pool{{Subnets: []netip.Prefix{lab.InsideNet}, Ports: cone.PortRanges{{First: first, Last: last}}}}
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

// contact makes in send to peer and the peer answer, and returns the outside endpoint.
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

func randomly(how string) string {
	return `table ip nat { chain postrouting { type nat hook postrouting priority srcnat; oifname "wan0" masquerade ` + how + `; }; }`
}

// mappings returns the mappings that exist.
func (m *mapper) mappings() map[elements.Mapping]time.Duration {
	m.t.Helper()
	all := map[elements.Mapping]time.Duration{}
	check(m.t, m.kept().List(func(p elements.Mapping, left time.Duration) { all[p] = left }))
	return all
}

func (m *mapper) kept() *elements.Mappings { return m.tables.NewMappings(mapping.Mapping) }

// holds checks that exactly these mappings exist.
func (m *mapper) holds(want ...elements.Mapping) {
	m.t.Helper()
	hasJust(m.t, m.mappings(), want)
}

func mapped(in *lab.Socket, ext netip.AddrPort) elements.Mapping {
	return elements.Mapping{Link: "wan0", Int: cone.EndpointFrom(in.Addr()), Ext: cone.EndpointFrom(ext)}
}
