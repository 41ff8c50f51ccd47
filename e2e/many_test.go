package e2e

import (
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// Fifty thousand permissions where the expectation table has room for them (in
// the first network namespace conenatd makes it); else as many as fit, the rest
// refused and counted with one warning, and everything else goes on.
func TestManyPermissions(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2})
	s.must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
	s.start("--backend=expect", "--subnet", lab.InsideNet.String(), "--max-permissions-per-host", "0", "--event-buffer", "67108864")
	limit := s.status().Permissions.Limit
	const peers = 50 // on each outside port, of the 64 that there may be
	ports := 50_000 / peers
	if limit < 50_000 {
		ports = limit/peers + 20
	}
	wanted := ports * peers
	stand := min(wanted, limit)

	type pair struct {
		port uint16
		peer netip.Addr
	}
	s.until("all flows have their claim", func() bool {
		known := map[pair]bool{}
		for _, p := range s.list() {
			known[pair{p.Int.Port(), p.Peer}] = true
		}
		for i := range ports {
			in := s.inside(0, uint16(10_000+i))
			for p := range peers {
				addr := netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + p)})
				if !known[pair{in.Addr().Port(), addr}] { // a busy machine loses packets
					s.must(in.Send(netip.AddrPortFrom(addr, 9), "x"))
				}
			}
			in.Close()
		}
		return len(known) == wanted
	})
	s.until("all permissions stand that may", func() bool {
		p := s.status().Permissions
		return p.Standing == stand && p.Refused == wanted-stand
	})
	t.Logf("%d permissions wanted, %d stand; %+v", wanted, stand, s.status().Latency)
	if n := len(s.list()); n != wanted {
		t.Errorf("%d permissions are listed, want %d", n, wanted)
	}
	if n := len(s.conntrack("expect")); n != stand {
		t.Errorf("%d expectations, want %d", n, stand)
	}
	if refused := s.status().Counters.Refused["kernel table is full"]; refused != uint64(wanted-stand) {
		t.Errorf("%d refusals counted, want %d", refused, wanted-stand)
	}
	// Everything else goes on: what stands works, and what ends makes room.
	if wanted > stand {
		s.must(s.d.Signal(syscall.SIGHUP)) // the next reconcile logs
		s.until("there is a warning", func() bool { return strings.Contains(s.d.Output(), "kernel table is full") })
		if out, code := s.cli("revoke", "--control-socket", s.d.Socket, "203.0.113.100"); code != 0 {
			t.Errorf("exit %d, %q", code, out)
		}
	}
	phone, proxy := s.inside(1, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	s.arrives(phone, s.peer(lab.PeerA, 5070), ext)
	s.stop()
	if left := s.conntrack("expect"); len(left) > 0 {
		t.Errorf("%d expectations left", len(left))
	}
	if left := s.anchors(); len(left) > 0 {
		t.Errorf("%d anchors left", len(left))
	}
}
