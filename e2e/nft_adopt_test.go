package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A daemon that dies leaves a large map. The next one does not list it before it answers, but
// takes over all of it: what flows hold, and what none holds, with the time that is left. A
// revocation waits until it knows all.
//
// Fails without adoptHeld, adoptRest or allAdopted.
func TestNFTLargeMapIsTakenOver(t *testing.T) {
	const ports, lifetime = 70, 10 * time.Minute
	s := newScene(t, lab.Options{})
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
	args := stage.Flags(stage.NFT, "--max-permissions-per-host=0", "--learn-rate=100000", "--event-buffer=67108864",
		"--events=all", "--lifetime="+lifetime.String())
	s.Start(args...)
	flood := s.Scan(10_000, ports)
	const n = ports * stage.Peers
	s.Must(flood.Send(0, n))
	s.allStand(n, func(map[stage.Flow]bool) { s.Must(flood.Send(0, n)) })
	latest := time.Now().Add(lifetime + 2*time.Second) // conntrack tells the time left in seconds
	s.Kill()
	for port := range 20 { // no flow holds these
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", fmt.Sprint(10_000+port))
		s.Must(err)
	}
	s.Start(args...)
	out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, stage.Peer(7).String())
	if want := fmt.Sprintf("revoked %d permissions", ports); code != 0 || len(out) < len(want) || out[:len(want)] != want {
		t.Errorf("revoke: %d, %q, want %q", code, out, want)
	}
	if p := s.Status().Permissions; p.Standing != n-ports {
		t.Errorf("%+v, want %d to stand", p, n-ports)
	}
	if e := s.CountElements(); e != n-ports {
		t.Errorf("%d elements, want %d", e, n-ports)
	}
	late := 0
	for _, p := range s.List() {
		if p.State == "standing" && p.Expires.After(latest) {
			late++
		}
	}
	if late > 0 {
		t.Errorf("%d permissions live longer than without the death", late)
	}
	in, from := s.InsideSocket(0, 10_005), s.PeerSocket(stage.Peer(3), 0)
	s.Arrives(in, from, netip.AddrPortFrom(s.Gateway.Addr, 10_005))
	s.Verified()
}
