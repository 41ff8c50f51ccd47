package expect_test

import (
	"errors"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/lab"
)

// Anchors of an earlier daemon may have another helper than is in use now.
//
// Fails when only the names of those in use are known.
func TestHelpersOfAdoptedAnchorsAreKnown(t *testing.T) {
	const other = "netbios-ns"
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	if names := b.OnAnchors(); slices.Contains(names, other) || slices.Contains(names, "") || len(names) == 0 {
		t.Errorf("helpers %q", names)
	}
	b.UseHelper(other)
	g.mustGrant(b, seed)
	b = g.open(time.Minute)
	v4, v6 := b.Helpers()
	want := []string{v4, v6, other}
	slices.Sort(want)
	want = slices.Compact(want)
	if got := b.OnAnchors(); !slices.Equal(got, want) {
		t.Errorf("helpers %q, want %q", got, want)
	}
}

func TestRenewRenewsAndTellsWhatIsLost(t *testing.T) {
	g := newGate(t, lab.Options{})
	ps := many(100)
	g.mustGrant(g.open(30*time.Second), ps...)
	b := g.open(time.Hour)

	if err := b.DeleteExpectation(&ps[10]); err != nil {
		t.Fatal(err)
	}
	for _, f := range g.anchors() { // whose expectation goes with it
		if f.TupleOrig.Proto.DestinationPort == ps[90].Ext.Port {
			if err := g.ct.Delete(f); err != nil {
				t.Fatal(err)
			}
		}
	}
	never := perm("198.51.100.1:1", "10.47.11.109:1", "203.0.113.5")
	var lost []int
	b.Renew(append(slices.Clone(ps), never), func(i int) { lost = append(lost, i) })
	if want := []int{10, 90, 100}; !slices.Equal(lost, want) {
		t.Errorf("lost %v, want %v", lost, want)
	}
	for _, x := range g.expectations() {
		if x.Timeout < 1000 {
			t.Fatalf("not renewed: %+v", x)
		}
	}
	for _, f := range g.anchors() {
		if f.Timeout < 1000 {
			t.Fatalf("not renewed: %+v", f)
		}
	}
	// What is lost can be granted again.
	g.mustGrant(b, ps[10], ps[90])
	g.wantPermissions(b, ps...)
	if b.Standing() != len(ps) {
		t.Errorf("%d stand, want %d", b.Standing(), len(ps))
	}
}

func TestRevokeOfWhatIsGoneIsNoError(t *testing.T) {
	for name, lose := range map[string]func(*gate, *expect.Backend) error{
		"revoked": func(_ *gate, b *expect.Backend) error { return b.Revoke([]cone.Permission{seed}) },
		"expectation deleted": func(_ *gate, b *expect.Backend) error {
			return b.DeleteExpectation(&seed)
		},
		"all flushed": func(g *gate, _ *expect.Backend) error { return g.Flush() },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGate(t, lab.Options{})
			b := g.open(time.Minute)
			g.mustGrant(b, seed)
			if err := lose(g, b); err != nil {
				t.Fatal(err)
			}
			g.mustRevoke(b, seed)
			g.wantCounts(0, 0)
			if b.Standing() != 0 {
				t.Errorf("%d stand", b.Standing())
			}
		})
	}
}

func TestBackendAdoptsWhatAnEarlierOneLeft(t *testing.T) {
	g := newGate(t, lab.Options{})
	ps := peers(64)
	g.mustGrant(g.open(time.Minute), ps...)
	g.stranger("203.0.113.5", "198.51.100.1:7")

	b := g.open(time.Minute)
	if b.Standing() != 64 {
		t.Errorf("%d adopted", b.Standing())
	}
	g.wantPermissions(b, ps...)
	adopted := b.Adopted()
	for _, a := range adopted {
		if !slices.Contains(ps, a.Permission) || a.Left > time.Minute || a.Left < 30*time.Second {
			t.Errorf("adopted %+v", a)
		}
	}
	if len(adopted) != 64 || b.Adopted() != nil {
		t.Errorf("%d adopted", len(adopted))
	}
	// What is adopted counts against the cap, until it is revoked.
	full := refusals{0: cone.ReasonPeersOnPort}
	if got := g.grant(b, seed); !maps.Equal(got, full) {
		t.Errorf("refused %v, want %v", got, full)
	}
	g.mustRevoke(b, ps[0])
	g.mustGrant(b, seed)
	g.mustRevoke(b, append(ps, seed)...)
	if b.Standing() != 0 {
		t.Errorf("%d stand", b.Standing())
	}
	g.wantCounts(1, 0)
}

func TestCleanupTakesOnlyWhatIsOurs(t *testing.T) {
	g := newGate(t, lab.Options{IPv6: true})
	b := g.open(time.Minute)
	ps := many(70)
	ps[3].Zone = 7
	ps[4] = perm("[2001:db8:47::109]:5060", "[2001:db8:47::109]:5060", "2001:db8:5::5")
	g.mustGrant(b, ps...)
	if err := b.DeleteExpectation(&ps[5]); err != nil {
		t.Fatal(err)
	}
	x := g.stranger("203.0.113.5", "198.51.100.1:7")
	flow := g.entry("10.47.11.109:0", "203.0.113.5:9", "") // nobody can tell it from a flow

	n, err := expect.Cleanup(g.Gateway.FD())
	if want := (expect.Cleaned{Expectations: 69, Anchors: 70}); err != nil || n != want {
		// Deleting an anchor ends its expectation.
		t.Errorf("Cleanup = %+v, %v, want %+v", n, err, want)
	}
	g.wantUntouched(x)
	g.wantCounts(1, 1)
	if got := g.anchor().TupleOrig; got.String() != flow.TupleOrig.String() {
		t.Errorf("%v is left, want %v", got, flow.TupleOrig)
	}
	if n, err := expect.Cleanup(g.Gateway.FD()); err != nil || n != (expect.Cleaned{}) {
		t.Errorf("second Cleanup = %+v, %v", n, err)
	}
}

func TestRoutedIPv6PermissionIsNotTranslated(t *testing.T) {
	g := newGate(t, lab.Options{IPv6: true, Rules: lab.DropPolicy})
	in := g.Inside(0)
	p := perm("[2001:db8:47::1]:1", "[2001:db8:47::1]:1", lab.Peer6A.String())
	p.Ext.Addr = cone.AddrFrom(in.Addr6)
	p.Mark = 0x2a

	host, err := in.Socket(in.Addr6, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = host.Close() }()
	p.Ext.Port = host.Addr().Port()
	p.Int = p.Ext
	b := g.open(time.Minute)
	g.mustGrant(b, p)
	g.wantPermissions(b, p)
	if x := g.expectation(); x.Function != "" || x.NAT.Tuple.IP.SourceAddress.IsValid() {
		t.Errorf("it is translated: %+v", x)
	}
	wantChild(g, host, p, g.Outside, lab.Peer6A)
	g.mustRevoke(b, p)
	g.wantCounts(0, 0)
}

func TestPeerReachesInsideHostFromAnyPort(t *testing.T) {
	g := newGate(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy})
	host, err := g.Inside(0).Socket(g.Inside(0).Addr, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = host.Close() }()
	p := perm("198.51.100.1:40000", host.Addr().String(), lab.PeerA.String())
	p.Mark = 0x2a
	b := g.open(time.Minute)
	g.mustGrant(b, p)
	wantChild(g, host, p, g.Outside, lab.PeerA)
}

// wantChild sends from two ports of the peer to the outside endpoint of p and
// checks that it reaches the host, as a child with the mark of p.
func wantChild(g *gate, host *lab.Socket, p cone.Permission, outside *lab.Host, peer netip.Addr) {
	g.t.Helper()
	for range 2 {
		s, err := outside.Socket(peer, 0)
		if err != nil {
			g.t.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		if err := lab.Arrives(host, lab.Packet{From: s, To: p.Ext.Netip(), Payload: "hello"}); err != nil {
			g.t.Fatal(err)
		}
		all, err := g.ct.Dump(nil)
		if err != nil {
			g.t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(f conntrack.Flow) bool {
			return f.TupleOrig.Proto.SourcePort == s.Addr().Port() && f.TupleOrig.IP.SourceAddress == peer
		})
		if i < 0 || !all[i].Status.Expected() || all[i].Mark != p.Mark {
			g.t.Fatalf("no child with mark %#x: %+v", p.Mark, all)
		}
	}
}

func TestWithoutPrivilege(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	g.mustGrant(b, seed)
	// The kernel answers a batch sent without privilege once, not at its end: who waits for that
	// end waits for answerTime.
	const answerTime = 5 * time.Second
	began := time.Now()
	atOnce := func(what string) {
		if took := time.Since(began); took >= answerTime {
			t.Errorf("%s took %v", what, took)
		}
		began = time.Now()
	}
	withoutPrivilege(t, func() {
		const hint = "operation not permitted: run as root or with CAP_NET_ADMIN"
		if _, err := expect.Open(expect.Config{NetNS: g.Gateway.FD(), Lifetime: time.Minute}); !errors.Is(err, unix.EPERM) ||
			!endsWith(err, hint) {
			t.Errorf("Open: %v", err)
		}
		if _, err := expect.Cleanup(g.Gateway.FD()); !errors.Is(err, unix.EPERM) || !endsWith(err, hint) {
			t.Errorf("Cleanup: %v", err)
		}
		ps := append(many(70), seed)
		began = time.Now()
		if got := g.grant(b, ps...); len(got) != len(ps) || got[0] != cone.ReasonKernel || got[70] != cone.ReasonKernel {
			t.Errorf("refused %v", got)
		}
		atOnce("Grant")
		if err := b.Revoke([]cone.Permission{seed}); !errors.Is(err, unix.EPERM) {
			t.Errorf("Revoke: %v", err)
		}
		atOnce("Revoke")
		lost := 0
		b.Renew([]cone.Permission{seed}, func(int) { lost++ })
		if lost != 1 {
			t.Errorf("%d lost", lost)
		}
		atOnce("Renew")
	})
	// What could not be revoked still can be.
	g.wantPermissions(b, seed)
	g.mustRevoke(b, seed)
	g.wantCounts(0, 0)
}

func endsWith(err error, s string) bool { return err != nil && strings.HasSuffix(err.Error(), s) }

// withoutPrivilege runs f on a thread without CAP_NET_ADMIN.
func withoutPrivilege(t *testing.T, f func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var all, less [2]unix.CapUserData
	if err := unix.Capget(&head, &all[0]); err != nil {
		t.Fatal(err)
	}
	less = all
	less[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	if err := unix.Capset(&head, &less[0]); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Capset(&head, &all[0]); err != nil {
			panic(err) // the thread is of no use any more
		}
	}()
	f()
}

func TestListRunsBesideAllOthers(t *testing.T) {
	g := newGate(t, lab.Options{})
	b := g.open(time.Minute)
	ps := many(70)
	ps[0].Zone = 7
	stop, done := make(chan struct{}), make(chan error)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if err := b.List(func(cone.Permission, time.Duration) {}); err != nil {
				done <- err
				return
			}
		}
	}()
	for range 20 {
		g.mustGrant(b, ps...)
		b.Renew(ps, func(i int) { t.Errorf("permission %d lost", i) })
		g.mustRevoke(b, ps...)
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
