package expect_test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/lab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func perm(ext, in, peer string) cone.Permission {
	return cone.Permission{
		Key: cone.Key{
			Ext:  cone.EndpointFrom(netip.MustParseAddrPort(ext)),
			Peer: cone.AddrFrom(netip.MustParseAddr(peer)),
		},
		Int: cone.EndpointFrom(netip.MustParseAddrPort(in)),
	}
}

var seed = perm("198.51.100.1:5060", "10.47.11.109:5060", "203.0.113.5")

// A gate is a lab that reads the gateway's tables independently, with ti-mo's decoder and
// not with ours.
type gate struct {
	*lab.Lab
	t  testing.TB
	ct *conntrack.Conn
}

func newGate(t testing.TB, o lab.Options) *gate {
	t.Helper()
	l := lab.ForTest(t, o)
	ct, err := conntrack.Dial(&netlink.Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ct.Close() })
	return &gate{l, t, ct}
}

// open opens a Backend with this lifetime for both families.
func (g *gate) open(lifetime time.Duration) *expect.Backend {
	g.t.Helper()
	return g.openWith(expect.Config{Lifetime: lifetime, IPv6: true})
}

func (g *gate) openWith(cfg expect.Config) *expect.Backend {
	g.t.Helper()
	cfg.NetNS = g.Gateway.FD()
	b, err := expect.Open(cfg)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		if err := b.Close(); err != nil {
			g.t.Error(err)
		}
	})
	return b
}

// anchors returns all UDP conntrack entries with a port 0.
func (g *gate) anchors() (found []conntrack.Flow) {
	g.t.Helper()
	all, err := g.ct.Dump(nil)
	if err != nil {
		g.t.Fatal(err)
	}
	for _, f := range all {
		if p := f.TupleOrig.Proto; p.Protocol == unix.IPPROTO_UDP && (p.SourcePort == 0) != (p.DestinationPort == 0) {
			found = append(found, f)
		}
	}
	return found
}

// anchor returns the only anchor.
func (g *gate) anchor() conntrack.Flow {
	g.t.Helper()
	found := g.anchors()
	if len(found) != 1 {
		g.t.Fatalf("%d anchors, want 1", len(found))
	}
	return found[0]
}

func (g *gate) expectations() []conntrack.Expect {
	g.t.Helper()
	found, err := g.ct.DumpExpect()
	if err != nil {
		g.t.Fatal(err)
	}
	return found
}

// expectation returns the only expectation.
func (g *gate) expectation() conntrack.Expect {
	g.t.Helper()
	found := g.expectations()
	if len(found) != 1 {
		g.t.Fatalf("%d expectations, want 1", len(found))
	}
	return found[0]
}

// wantCounts checks how many entries the tables have.
func (g *gate) wantCounts(expectations, anchors int) {
	g.t.Helper()
	if e, a := g.expectations(), g.anchors(); len(e) != expectations || len(a) != anchors {
		g.t.Errorf("%d expectations and %d anchors, want %d and %d:", len(e), len(a), expectations, anchors)
		for _, x := range e[:min(len(e), 5)] {
			g.t.Logf("%v on %v", x.Tuple, x.TupleMaster)
		}
		for _, f := range a[:min(len(a), 5)] {
			g.t.Logf("%v helper %q zone %d", f.TupleOrig, f.Helper.Name, f.Zone)
		}
	}
}

// wantPermissions checks what stands, in any order, by the Backend's own list.
func (g *gate) wantPermissions(b *expect.Backend, want ...cone.Permission) {
	g.t.Helper()
	left := slices.Clone(want)
	err := b.List(func(p cone.Permission, _ time.Duration) {
		i := slices.IndexFunc(left, func(w cone.Permission) bool { return w.Key == p.Key && w.Int == p.Int })
		if i < 0 {
			g.t.Errorf("stands, or twice: %v", p)
			return
		}
		left = slices.Delete(left, i, i+1)
	})
	if err != nil {
		g.t.Error(err)
	}
	for _, p := range left {
		g.t.Errorf("does not stand: %v", p)
	}
}

type refusals map[int]cone.Reason

func (g *gate) grant(b *expect.Backend, ps ...cone.Permission) refusals {
	g.t.Helper()
	refused := refusals{}
	b.Grant(ps, func(i int, r cone.Reason, err error) {
		g.t.Helper()
		if _, twice := refused[i]; twice {
			g.t.Errorf("permission %d refused twice", i)
		}
		g.t.Logf("permission %d refused: %v: %v", i, r, err)
		refused[i] = r
	})
	return refused
}

// mustGrant grants ps, of which none may be refused.
func (g *gate) mustGrant(b *expect.Backend, ps ...cone.Permission) {
	g.t.Helper()
	if r := g.grant(b, ps...); len(r) != 0 {
		g.t.Fatalf("refused: %v", r)
	}
}

func (g *gate) mustRevoke(b *expect.Backend, ps ...cone.Permission) {
	g.t.Helper()
	if err := b.Revoke(ps); err != nil {
		g.t.Fatal(err)
	}
}

// entry makes a conntrack entry like an anchor; without a helper if that is
// empty.
func (g *gate) entry(src, dst, helper string) conntrack.Flow {
	g.t.Helper()
	s, d := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	f := conntrack.NewFlow(unix.IPPROTO_UDP, conntrack.StatusConfirmed|conntrack.StatusAssured,
		s.Addr(), d.Addr(), s.Port(), d.Port(), 120, 0)
	if helper != "" {
		f.Helper.Name = helper + "\x00"
	}
	if err := g.ct.Create(f); err != nil {
		g.t.Fatalf("create entry: %v", err)
	}
	return f
}

// stranger makes an expectation as the kernel's own helpers do, on a master of
// its own: from any port of peer to ext, or from anywhere if peer is 0.0.0.0.
func (g *gate) stranger(peer, ext string) conntrack.Expect {
	g.t.Helper()
	e := netip.MustParseAddrPort(ext)
	master := g.entry(netip.AddrPortFrom(netip.MustParseAddr("10.47.11.110"), e.Port()).String(), "192.0.2.99:69", "tftp")
	tuple := func(src, dst netip.Addr, dport uint16) conntrack.Tuple {
		return conntrack.Tuple{
			IP:    conntrack.IPTuple{SourceAddress: src, DestinationAddress: dst},
			Proto: conntrack.ProtoTuple{Protocol: unix.IPPROTO_UDP, DestinationPort: dport},
		}
	}
	all := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	from, mask := netip.MustParseAddr(peer), all
	if from.IsUnspecified() {
		mask = from
	}
	err := g.ct.CreateExpect(conntrack.Expect{
		TupleMaster: master.TupleOrig,
		Tuple:       tuple(from, e.Addr(), e.Port()),
		Mask:        tuple(mask, all, 0xffff),
		Flags:       1, // permanent
	})
	if err != nil {
		g.t.Fatalf("create expectation: %v", err)
	}
	for _, x := range g.expectations() {
		if x.TupleMaster.Proto.DestinationPort == 69 && x.Tuple.IP.DestinationAddress == e.Addr() && x.Tuple.Proto.DestinationPort == e.Port() {
			return x
		}
	}
	g.t.Fatal("the expectation does not stand")
	panic("unreachable")
}

// wantUntouched checks that a stranger's expectation is there and nobody
// renewed or cut it.
func (g *gate) wantUntouched(x conntrack.Expect) {
	g.t.Helper()
	for _, y := range g.expectations() {
		if y.ID != x.ID {
			continue
		}
		if y.Timeout > x.Timeout || y.Timeout+30 < x.Timeout {
			g.t.Errorf("timeout of a stranger's expectation was %d and is %d", x.Timeout, y.Timeout)
		}
		return
	}
	g.t.Errorf("a stranger's expectation is gone: %+v", x)
}

// sendFromPortZero sends a packet that no socket of the usual kind can send,
// and returns when the gateway has an entry for it.
func (g *gate) sendFromPortZero(peer string, port uint16) {
	g.t.Helper()
	err := g.Inside(0).Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		udp := []byte{0, 0, byte(port >> 8), byte(port), 0, 8, 0, 0} // no checksum
		return unix.Sendto(fd, udp, 0, &unix.SockaddrInet4{Addr: netip.MustParseAddr(peer).As4()})
	})
	if err != nil {
		g.t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); len(g.anchors()) == 0; {
		if time.Now().After(deadline) {
			g.t.Fatal("the packet from port 0 made no conntrack entry")
		}
	}
}
