package e2e

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A one-way flow keeps sending, from which the kernel could learn the permission
// again.
func TestNFTRevokeHoldsWhileTheHostGoesOnSending(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		phone, talker := s.InsideSocket(0, 5060), s.InsideSocket(0, 5061)
		proxy, sink := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5062)
		ext, extTalker := s.Contact(phone, proxy), s.Contact(talker, sink)
		s.Steady(func() error { return talker.Send(sink.Addr(), "x") })
		rounds := 20
		if os.Getenv("CONENATD_GUEST") != "" {
			rounds = 5
		}
		for round := range rounds {
			// A new flow restores the permission.
			sink := s.PeerSocket(lab.PeerA, uint16(20_000+round))
			s.Contact(talker, sink)
			s.Stands(talker, sink, extTalker)
			e := entryOf(talker, sink, extTalker)
			if !s.inMap(e) {
				t.Fatalf("round %d: the map has %v", round, s.entries())
			}
			if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, extTalker.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
				t.Fatalf("exit %d, %q", code, out)
			}
			s.Until("it is not in the map", func() bool { return !s.inMap(e) })
			for range 3 {
				if s.inMap(e) {
					t.Fatalf("round %d: revoked, and learned again", round)
				}
			}
		}
		if p := s.Listed(talker, sink, extTalker, "refused"); p.Reason != "revoked" {
			t.Errorf("reason %q", p.Reason)
		}
		s.Lost(talker, s.PeerSocket(lab.PeerA, 5070), extTalker, sink)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
	})
}

// A revoke ends the permission's children, except those that the inside host
// answered.
func TestNFTRevokeEndsUnansweredChildren(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		answered, ignored := s.PeerSocket(lab.PeerA, 5070), s.PeerSocket(lab.PeerA, 5071)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, answered, ext)
		s.Arrives(phone, ignored, ext)
		p := stage.Payload("answer")
		s.Must(phone.Send(answered.Addr(), p))
		_, err := answered.Expect(p)
		s.Must(err)
		s.Until("both children are listed", func() bool {
			s.Must(s.Daemon.Signal(syscall.SIGHUP)) // reads the flows
			return s.Listed(phone, proxy, ext, "standing").Answered == 1
		})
		if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, lab.PeerA.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
			t.Fatalf("exit %d, %q", code, out)
		}
		s.Until("the one that nobody answered is gone", func() bool { return !s.hasFlowFrom(ignored) })
		s.Lost(phone, ignored, ext, proxy)
		s.Arrives(phone, answered, ext)
	})
}
