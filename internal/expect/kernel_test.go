package expect_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/lab"
)

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

func open(t *testing.T, l *lab.Lab) *expect.Backend {
	t.Helper()
	b, err := expect.Open(expect.Config{NetNS: l.Gateway.FD(), Lifetime: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func grant(t *testing.T, b *expect.Backend, ps ...cone.Permission) (refused map[int]cone.Reason) {
	t.Helper()
	refused = map[int]cone.Reason{}
	b.Grant(ps, func(i int, r cone.Reason, err error) {
		t.Logf("permission %d refused: %v: %v", i, r, err)
		refused[i] = r
	})
	return refused
}

func conntrack(t *testing.T, l *lab.Lab, args ...string) []string {
	t.Helper()
	lines, err := l.Conntrack(args...)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func listed(t *testing.T, b *expect.Backend) []cone.Permission {
	t.Helper()
	var ps []cone.Permission
	if err := b.List(func(p cone.Permission) { ps = append(ps, p) }); err != nil {
		t.Fatal(err)
	}
	return ps
}

func TestPermissionStandsUntilRevoked(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	b := open(t, l)
	t.Logf("helper %v", slices.Collect(func(yield func(string) bool) { v4, _ := b.Helpers(); yield(v4) }))

	if r := grant(t, b, seed); len(r) != 0 {
		t.Fatalf("refused: %v", r)
	}
	exp := conntrack(t, l, "expect")
	if len(exp) != 1 || !strings.Contains(exp[0], "dst=198.51.100.1") || !strings.Contains(exp[0], "PERMANENT") {
		t.Errorf("expectations: %q", exp)
	}
	if got := listed(t, b); !slices.Equal(got, []cone.Permission{seed}) {
		t.Errorf("List = %v, want %v", got, seed)
	}
	if anchors := conntrack(t, l, "-p", "udp"); len(anchors) != 1 || !strings.Contains(anchors[0], "sport=0 dport=5060") {
		t.Errorf("anchors: %q", anchors)
	}
	if err := b.Revoke([]cone.Permission{seed}); err != nil {
		t.Fatal(err)
	}
	if exp, ct := conntrack(t, l, "expect"), conntrack(t, l, "-p", "udp"); len(exp)+len(ct) != 0 {
		t.Errorf("left after revoke: %q %q", exp, ct)
	}
}
