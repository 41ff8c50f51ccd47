package engine

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/rulestest"
)

// real is the kernel, in a lab.
type real struct {
	*lab.Lab
	t      *testing.T
	tables *rules.Tables
	config *rules.MapConfig
}

func newReal(t *testing.T) machine {
	l := lab.ForTest(t, lab.Options{})
	c := &rules.MapConfig{Size: mapSize, Lifetime: lifetime, Subnets: []netip.Prefix{inside}}
	return &real{l, t, rulestest.Set(t, l, rules.Desired{OutsideLinks: []string{"wan0"}, Map: c}), c}
}

func (m *real) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *real) carriers(p cone.Policy) (k Kernel, adopted []Placed, revoked []cone.Key) {
	m.t.Helper()
	if p.Expected {
		x, err := expect.Open(expect.Config{NetNS: m.Gateway.FD(), Lifetime: p.Lifetime})
		m.must(err)
		m.t.Cleanup(func() { _ = x.Close() })
		for _, a := range x.Adopted() {
			adopted = append(adopted, Placed{a.Permission, a.By, a.Left})
		}
		k.Expectations = x
	}
	if p.Mapped {
		x := m.tables.NewMap(m.config)
		m.must(x.List(func(p cone.Permission, left time.Duration) { adopted = append(adopted, Placed{p, cone.ByMap, left}) }))
		m.must(x.AdoptDenied())
		k.Map = x
	}
	all := m.tables.NewRevoked()
	revoked, err := all.Adopt()
	m.must(err)
	k.Revoked = all
	flows, err := ctwatch.DialQueries(ctwatch.Config{NetNS: m.Gateway.FD()})
	m.must(err)
	sockets, err := gateway.DialSockets(m.Gateway.FD())
	m.must(err)
	m.t.Cleanup(func() {
		m.must(flows.Close())
		m.must(sockets.Close())
	})
	k.Flows, k.Sockets = flows, sockets
	return k, adopted, revoked
}

var (
	listedExpectation = regexp.MustCompile(`src=(\S+) dst=(\S+) sport=0 dport=(\d+) .*master-src=(\S+) `)
	listedElement     = regexp.MustCompile(`(\S+) \. (\S+) \. (\d+) [^:]*: ([0-9.]+)`)
)

// stands asks the tools that a user has.
func (m *real) stands() (all []string) {
	m.t.Helper()
	lines, err := m.Conntrack("expect")
	m.must(err)
	for _, l := range lines {
		if x := listedExpectation.FindStringSubmatch(l); x != nil {
			all = append(all, "expect "+x[1]+" "+x[2]+":"+x[3]+" "+x[4])
		}
	}
	elements, err := m.Gateway.Output("nft", "list", "map", "ip", "conenat", "permissions")
	m.must(err)
	for _, x := range listedElement.FindAllStringSubmatch(strings.ReplaceAll(elements, "elements = {", ""), -1) {
		all = append(all, "nft "+x[1]+" "+x[2]+":"+x[3]+" "+x[4])
	}
	return all
}

func (m *real) steal(p cone.Permission, by cone.Carriers) {
	m.t.Helper()
	if by == cone.ByExpectation { // the anchor takes it along
		_, err := m.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", p.Int.Addr.String(), "-d", p.Peer.String())
		m.must(err)
		return
	}
	m.must(m.tables.NewMap(m.config).Revoke([]cone.Permission{p}))
}

func (m *real) add(p cone.Permission) {
	m.t.Helper()
	c := *m.config
	c.Lifetime *= 10
	m.tables.NewMap(&c).Grant([]cone.Permission{p}, func(_ int, r cone.Reason, err error) { m.t.Fatal(r, err) })
}
