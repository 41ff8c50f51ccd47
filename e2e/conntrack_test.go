package e2e

import (
	"fmt"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Status shows what conntrack counts in the gateway's network namespace while the daemon
// runs. A user rule gives two flows the same fixed source port towards one peer: the
// kernel drops the second flow's packet.
//
// Fails when status counts another namespace, or includes what was counted before the
// start.
func TestStatusTellsWhatConntrackCounts(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Rules: lab.NoRules})
	s.Must(s.NFT(fmt.Sprintf(`table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "wan0" udp sport 7000 snat to %s:7000
		oifname "wan0" masquerade
	}
}
`, s.Gateway.Addr)))
	own, host, peer := s.Socket(s.Gateway.Namespace, s.Gateway.Addr, 7000), s.InsideSocket(0, 7000), s.PeerSocket(lab.PeerA, 7000)
	phone, proxy, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerB, 5060), s.PeerSocket(lab.PeerC, 5060)
	s.Contact(own, peer)
	clash := func() {
		s.Must(host.Send(peer.Addr(), "in vain"))
		s.Contact(phone, other) // by now the host's packet was handled
	}
	clash()
	s.Start(stage.Flags(stage.Expect)...)
	before := s.Status().Conntrack
	if before.InsertFailed != 0 || before.Drop != 0 || before.Entries < 2 || before.Max == 0 {
		t.Errorf("before: %+v", before)
	}
	clash()
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerB, 6000), ext)
	after := before
	s.Until("the last flow is counted", func() bool { // the kernel may be busy
		after = s.Status().Conntrack
		return after.Expected > before.Expected
	})
	if after.InsertFailed != 1 || after.Drop != 1 || after.EarlyDrop != 0 || after.Entries <= before.Entries {
		t.Errorf("after: %+v", after)
	}
	if n := after.ExpectationsMade - before.ExpectationsMade; n != 1 {
		t.Errorf("%d expectations made, want 1", n)
	}
	if n := after.Expected - before.Expected; n != 1 {
		t.Errorf("%d flows were expected, want 1", n)
	}
	if out, code := s.CLI("flush", "--control-socket", s.Daemon.Socket); code != 0 {
		t.Fatalf("flush: exit %d\n%s", code, out)
	}
	s.Until("an expectation ended", func() bool { return s.Status().Conntrack.ExpectationsEnded > after.ExpectationsEnded })
}
