package e2e

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A host at its limit goes on to open flows, and for each of them an older one ends. Each may
// make room for another, but the ruleset changes only now and then: others must be able to list
// it meanwhile. No more stand in the kernel than may, and a host that has room is served.
//
// Fails when each idle permission makes room alone.
func TestNFTFlowsThatEndAtALimitChangeTheRulesetRarely(t *testing.T) {
	const limit, more, most = 640, 100, 60
	s := newScene(t, lab.Options{})
	s.Start("--backend=auto", "--subnet", lab.InsideNet.String(), "--events=all", "--learn-rate=100000", "--max-permissions-per-host", fmt.Sprint(limit))
	// All by different ports, so that they have different permissions.
	send := func(port int) {
		in := s.InsideSocket(0, uint16(port))
		s.Must(in.Send(netip.AddrPortFrom(lab.PeerC, 9), "x"))
		in.Close()
	}
	for i := range limit {
		send(10_000 + i)
	}
	s.Until("as many stand as may", func() bool { return s.Status().Permissions.Standing == limit })

	before := s.generation()
	for i := range more {
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", fmt.Sprint(10_000+i))
		s.Must(err)
		had := s.Status().Counters.Granted + s.Status().Counters.Refused["host_limit"]
		send(20_000 + i)
		s.Until("the daemon has decided", func() bool {
			c := s.Status().Counters
			return c.Granted+c.Refused["host_limit"] > had
		})
	}
	n := s.generation() - before
	t.Logf("%d changes of the ruleset for %d flows", n, more)
	if n > most {
		t.Errorf("%d changes of the ruleset for %d flows, want at most %d", n, more, most)
	}
	st := s.Status().Permissions
	if n := s.CountElements(); n > limit || n != st.Standing || st.Standing < limit-limit/64 {
		t.Errorf("%d elements; %+v", n, st)
	}

	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp")
	s.Must(err)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Until("it is granted", func() bool { return s.Known()[stage.Flow{Port: 5060, Peer: lab.PeerA}] })
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
}
