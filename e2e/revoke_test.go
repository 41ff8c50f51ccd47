package e2e

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// What the user revoked stays revoked when the daemon is killed, or told to keep what
// stands, and a new one reads the flows: until there is a new flow, as the help says.
// What a limit kept away does not count as revoked.
//
// Fails when the next daemon does not look for what was revoked.
func TestNFTRevokeOutlivesTheDaemon(t *testing.T) {
	stage.OfTheDaemon(t)
	for name, end := range map[string]func(*scene){
		"killed": (*scene).kill, "kept": (*scene).stop,
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
				s := newScene(t, lab.Options{})
				args := stage.Flags(mode, "--on-stop=keep", "--reconcile=1s")
				s.Start(append(args, "--max-permissions=1")...)
				phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
				ext := s.Contact(phone, proxy)
				s.Stands(phone, proxy, ext)
				// One of these takes the place of the one that is revoked.
				one, two, other := s.InsideSocket(0, 5061), s.InsideSocket(0, 5062), s.PeerSocket(lab.PeerB, 5060)
				extOne, extTwo := s.Contact(one, other), s.Contact(two, other)
				s.Listed(one, other, extOne, "refused")
				s.Listed(two, other, extTwo, "refused")
				if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, ext.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
					t.Fatalf("exit %d, %q", code, out)
				}
				s.Until("another one has its place", func() bool { return len(s.Elements()) == 1 })

				end(s)
				s.Start(args...)
				if p := s.Listed(phone, proxy, ext, "refused"); p.Reason != "revoked" {
					t.Errorf("reason %q", p.Reason)
				}
				s.Stands(one, other, extOne)
				s.Stands(two, other, extTwo)
				s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
				s.Must(phone.Send(proxy.Addr(), "it goes on"))
				s.Lost(phone, s.PeerSocket(lab.PeerA, 5071), ext, proxy)

				again := s.PeerSocket(lab.PeerA, 5063)
				s.Contact(phone, again)
				s.Stands(phone, again, ext)
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5072), ext)
			})
		})
	}
}

func (s *scene) kill() { s.Kill() }
func (s *scene) stop() { s.Stop() }
