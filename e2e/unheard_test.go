package e2e

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// heardOf returns how many events the daemon reads of flows that n strangers begin towards a port of
// the gateway and that then end.
func (s *scene) heardOf(n int, port uint16) uint64 {
	s.T.Helper()
	before, to := s.Status().Events.Received, netip.AddrPortFrom(s.Gateway.Addr, port)
	f := s.Flood(n, false)
	for i := range n {
		f.Aim(i, netip.AddrPortFrom(netip.AddrFrom4([4]byte{60, 0, byte(i >> 8), byte(i)}), 10_000), to)
	}
	s.Must(f.Send(0, n))
	dport := fmt.Sprint("--dport=", port)
	s.Until("there are flows", func() bool { return len(s.ConntrackList("-p", "udp", dport, "-s", "60.0.0.0/8")) >= n*9/10 })
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", dport, "-s", "60.0.0.0/8")
	s.Must(err)
	fence, host := s.PeerSocket(lab.PeerC, 0), s.InsideSocket(0, 0)
	defer fence.Close()
	defer host.Close()
	s.Stands(host, fence, s.Contact(host, fence)) // events are in order
	return s.Status().Events.Received - before
}

// Nothing depends on flows to a socket of the gateway, nor on those of a forward, whatever else its
// rule requires: whoever floods them costs the daemon no events.
//
// Fails when their beginnings or their ends are reported.
func TestDaemonHearsOfNoFlowsThatDoNotMatter(t *testing.T) {
	const port, flows, few = 4000, 500, 20
	for name, tt := range map[string]struct {
		rule  string
		flags []string
	}{
		"a served port":                    {"", nil},
		"a served port, without the guard": {"", []string{"--guard=false"}},
		"a forward":                        {"udp dport 4000 dnat to 10.47.11.109", nil},
		"a forward without the guard":      {"udp dport 4000 dnat to 10.47.11.109", []string{"--guard=false"}},
		"a forward with a condition":       {"ip ttl 1-255 udp dport 4000 dnat to 10.47.11.109", nil},
		"a forward behind a return":        {"ip length 1000-1100 return; udp dport 4000 dnat to 10.47.11.109", nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Rules: lab.Masquerade + "table ip user { chain c { type nat hook prerouting priority dstnat; " + tt.rule + "; }; }"})
			if tt.rule == "" {
				defer s.Socket(s.Gateway.Namespace, s.Gateway.Addr, port).Close()
			}
			s.Serve(append(tt.flags, "--reconcile=1h", "--backend=nft", "--learn=false")...)
			if n := s.heardOf(flows, port); n > few {
				t.Errorf("it read %d events of %d flows", n, flows)
			}
		})
	}
}

// A socket that the gateway opens while the daemon runs is left out, too, once two looks found it.
// Flows to other ports are still heard of.
func TestDaemonWithoutAGuardFollowsTheSockets(t *testing.T) {
	const port, flows, few = 4000, 100, 20
	s := newScene(t, lab.Options{})
	s.Serve("--guard=false", "--reconcile=1s", "--backend=nft", "--learn=false")
	if n := s.heardOf(flows, port); n < flows*9/10 {
		t.Errorf("it read %d events of %d flows", n, flows)
	}
	defer s.Socket(s.Gateway.Namespace, s.Gateway.Addr, port).Close()
	s.Until("it does not hear of them any more", func() bool { return s.heardOf(flows, port) <= few })
	if n := s.heardOf(flows, port+1); n < flows*9/10 {
		t.Errorf("it read %d events of %d flows to another port", n, flows)
	}
}
