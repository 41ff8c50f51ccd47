package e2e

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// What the user revoked stays revoked until there is a new flow, as the help says, even if
// the daemon is killed, keeps its permissions or takes them out of the kernel, and a new one
// reads the flows. A permission that a limit kept out does not count as revoked.
//
// Fails when the next daemon does not read what was revoked, and after a clean stop, when no
// note tells it.
func TestNFTRevokeOutlivesTheDaemon(t *testing.T) {
	stage.OfTheDaemon(t)
	for name, tt := range map[string]struct {
		end    func(*scene)
		onStop string
	}{
		"killed": {(*scene).kill, "keep"}, "kept": {(*scene).stop, "keep"}, "stopped": {(*scene).stop, "revoke"},
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.NFT, stage.Auto, stage.NFTByEvent, stage.Expect}, func(t *testing.T, mode ...string) {
				s := newScene(t, lab.Options{})
				args := stage.Flags(mode, "--on-stop="+tt.onStop, "--reconcile=1s")
				s.Start(append(args, "--max-permissions=1")...)
				phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
				ext := s.Contact(phone, proxy)
				s.Stands(phone, proxy, ext)
				// One of these gets the place of the revoked permission.
				one, two, other := s.InsideSocket(0, 5061), s.InsideSocket(0, 5062), s.PeerSocket(lab.PeerB, 5060)
				extOne, extTwo := s.Contact(one, other), s.Contact(two, other)
				s.Listed(one, other, extOne, "refused")
				s.Listed(two, other, extTwo, "refused")
				if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, ext.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
					t.Fatalf("exit %d, %q", code, out)
				}
				s.Until("another one has its place", func() bool {
					expected, err := s.Conntrack("expect")
					s.Must(err)
					return len(s.Elements())+len(expected) == 1
				})

				tt.end(s)
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

// The next daemon tells a flow that began while none ran from those that were there, and
// begins anew after cleanup.
//
// Fails when the note does not name flows, and when cleanup leaves it.
func TestNewFlowEndsARevokeWhileNoDaemonRuns(t *testing.T) {
	stage.OfTheDaemon(t)
	for name, between := range map[string]func(t *testing.T, s *scene, phone *lab.Socket){
		"a new flow": func(t *testing.T, s *scene, phone *lab.Socket) { s.Contact(phone, s.PeerSocket(lab.PeerA, 5063)) },
		"cleanup": func(t *testing.T, s *scene, _ *lab.Socket) {
			if out, code := s.CLI("cleanup"); code != 0 {
				t.Fatalf("exit %d, %q", code, out)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.NFT, stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
				s := newScene(t, lab.Options{})
				args := stage.Flags(mode, "--reconcile=1s")
				s.Start(args...)
				phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
				ext := s.Contact(phone, proxy)
				s.Stands(phone, proxy, ext)
				if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, ext.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
					t.Fatalf("exit %d, %q", code, out)
				}
				s.Stop()
				between(t, s, phone)
				s.Start(args...)
				s.Stands(phone, proxy, ext)
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
			})
		})
	}
}

// A revoke also holds for permissions that the map cannot carry, even if the next daemon's table has
// another name: it takes over the list.
//
// Fails when only IPv4 permissions behind source NAT are remembered, and when a start with
// another table name does not move them.
func TestRevokeOfUntranslatedFlowsOutlivesTheDaemon(t *testing.T) {
	stage.OfTheDaemon(t)
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: "table ip nat {\n\tchain p { type nat hook postrouting priority srcnat; }\n}\n" + lab.DropPolicy})
	s.IP(s.Outside, "route add "+lab.InsideNet.String()+" via 198.51.100.1")
	args := []string{"--subnet", lab.InsideNet.String(), "--subnet", lab.InsideNet6.String(), "--routed", "--reconcile=1s"}
	s.Start(args...)
	h := s.Inside(0)
	pairs := map[*lab.Socket]*lab.Socket{
		s.Socket(h.Namespace, h.Addr, 5060):  s.PeerSocket(lab.PeerA, 5060),
		s.Socket(h.Namespace, h.Addr6, 5060): s.PeerSocket(lab.Peer6A, 5060),
	}
	for phone, proxy := range pairs {
		s.Stands(phone, proxy, s.Contact(phone, proxy))
		if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, phone.Addr().String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
			t.Fatalf("exit %d, %q", code, out)
		}
	}
	for i, more := range []string{"--table=conenat", "--table=other"} {
		s.Kill()
		s.Start(append(args, more)...)
		for phone, proxy := range pairs {
			if p := s.Listed(phone, proxy, phone.Addr(), "refused"); p.Reason != "revoked" {
				t.Errorf("%s: reason %q", more, p.Reason)
			}
			s.Lost(phone, s.PeerSocket(proxy.Addr().Addr(), 5070+uint16(i)), phone.Addr(), proxy)
		}
	}
	for phone, proxy := range pairs {
		again := s.PeerSocket(proxy.Addr().Addr(), 5063)
		s.Contact(phone, again)
		s.Stands(phone, again, phone.Addr())
		s.Arrives(phone, s.PeerSocket(proxy.Addr().Addr(), 5072), phone.Addr())
	}
	s.Kill()
	s.Start(append(args, "--table=other")...)
	for phone, proxy := range pairs {
		s.Stands(phone, proxy, phone.Addr())
	}
}

func (s *scene) kill() { s.Kill() }
func (s *scene) stop() { s.Stop() }
