package e2e

import (
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Fifty thousand permissions stand if the expectation table has room for them; in
// the first network namespace conenatd makes that room. Otherwise as many stand as
// fit; the rest is refused and counted, with one warning, and everything else goes
// on.
func TestManyPermissions(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2})
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
	s.Start("--backend=expect", "--subnet", lab.InsideNet.String(), "--max-permissions-per-host", "0", "--event-buffer", "67108864")
	limit := s.Status().Permissions.Limit
	const peers = 50 // on each outside port, of the 64 that there may be
	ports := 50_000 / peers
	if limit < 50_000 {
		ports = limit/peers + 20
	}
	wanted := ports * peers
	stand := min(wanted, limit)

	s.Until("all flows have their claim", func() bool {
		known := s.Known()
		for i := range ports {
			in := s.InsideSocket(0, uint16(10_000+i))
			for p := range peers {
				addr := netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + p)})
				if !known[stage.Flow{Port: in.Addr().Port(), Peer: addr}] { // a busy machine loses packets
					s.Must(in.Send(netip.AddrPortFrom(addr, 9), "x"))
				}
			}
			in.Close()
		}
		return len(known) == wanted
	})
	s.Until("all permissions stand that may", func() bool {
		p := s.Status().Permissions
		return p.Standing == stand && p.Refused == wanted-stand
	})
	t.Logf("%d permissions wanted, %d stand; %+v", wanted, stand, s.Status().Latency)
	if n := len(s.List()); n != wanted {
		t.Errorf("%d permissions are listed, want %d", n, wanted)
	}
	if n := len(s.ConntrackList("expect")); n != stand {
		t.Errorf("%d expectations, want %d", n, stand)
	}
	if refused := s.Status().Counters.Refused["table_full"]; refused != uint64(wanted-stand) {
		t.Errorf("%d refusals counted, want %d", refused, wanted-stand)
	}
	// Permissions that stand still work, and one that ends makes room.
	if wanted > stand {
		s.Must(s.Daemon.Signal(syscall.SIGHUP)) // makes the next reconcile log
		s.Until("there is a warning", func() bool { return strings.Contains(s.Daemon.Output(), "table_full") })
		if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, "203.0.113.100"); code != 0 {
			t.Errorf("exit %d, %q", code, out)
		}
	}
	phone, proxy := s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Stop()
	if left := s.ConntrackList("expect"); len(left) > 0 {
		t.Errorf("%d expectations left", len(left))
	}
	if left := s.Anchors(); len(left) > 0 {
		t.Errorf("%d anchors left", len(left))
	}
}
