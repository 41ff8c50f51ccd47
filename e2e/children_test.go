package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// leftChild lets a peer make a child that nobody answers, kills the daemon, and waits
// until the permission has run out.
func (s *scene) leftChild() (phone, child *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	phone, child = s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5070)
	proxy := s.PeerSocket(lab.PeerA, 5060)
	ext = s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, child, ext)
	s.Kill()
	s.Until("the permission has run out", func() bool { return len(s.entries()) == 0 })
	s.Arrives(phone, child, ext) // by the kernel's flow alone
	return phone, child, ext
}

// An unanswered child that the map admitted ends with its permission, however the daemon
// ended: the child has a conntrack label, so the next daemon knows it.
func TestNFTUnansweredChildrenEndWithTheirPermission(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, next := range map[string]func(s *scene, mode []string){
		"start": func(s *scene, mode []string) { s.Start(stage.Flags(mode)...) },
		"start of a daemon of another kind": func(s *scene, _ []string) {
			s.Start("--subnet", lab.InsideNet.String(), "--backend=expect")
		},
		"start and stop": func(s *scene, mode []string) {
			s.Start(stage.Flags(mode)...)
			s.Stop()
		},
		"cleanup": func(s *scene, _ []string) {
			if out, code := s.CLI("cleanup"); code != 0 || !strings.Contains(out, "1 unanswered child\n") {
				s.T.Errorf("exit %d, %q", code, out)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
				s := play(t, lab.Options{}, append(slices.Clone(mode), "--lifetime=6s")...)
				s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
				phone, child, ext := s.leftChild()
				_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", phone.Addr().Addr().String())
				s.Must(err)
				next(s, mode)
				s.Until("the child is gone", func() bool { return !s.hasFlowFrom(child) })
				fence := s.PeerSocket(lab.PeerB, 5060)
				s.Contact(phone, fence)
				s.Lost(phone, child, ext, fence)
			})
		})
	}
}

// An answered child outlives the daemon. The next daemon does not take it for a forward
// of the user's: another host on that port gets its permission.
func TestNFTRestartTakesNoChildForAForward(t *testing.T) {
	for name, end := range map[string]func(*scene){"stop": (*scene).stop, "kill": (*scene).kill} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 2}, stage.NFT...)
			one, two := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
			child, proxy := s.PeerSocket(lab.PeerA, 5070), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(one, proxy)
			s.Stands(one, proxy, ext)
			s.Arrives(one, child, ext)
			s.Contact(one, child) // the answer
			end(s)
			s.Arrives(one, child, ext)
			s.Start("--subnet", lab.InsideNet.String(), "--backend=expect", "--reconcile=1s")
			peer := s.PeerSocket(lab.PeerB, 5060)
			if other := s.Contact(two, peer); other != ext {
				t.Fatalf("ports are not shared: %v %v", ext, other)
			}
			s.Stands(two, peer, ext)
			s.Arrives(two, s.PeerSocket(lab.PeerB, 5071), ext)
			s.Verified()
		})
	}
}

// Flows of the user's own forward are not ours, and have no label.
func TestNFTChildrenHaveALabelAndForwardsHaveNone(t *testing.T) {
	const labels = `table ip seen {
	counter child { }
	counter forwarded { }
	chain labelled {
		type filter hook forward priority 0;
		udp sport 5070 ct label 126 counter name child
		udp sport 5071 ct label 126 counter name forwarded
	}
}
`
	s := play(t, lab.Options{Inside: 2, Rules: lab.Masquerade + strings.Replace(forward, "5060", "6000", 1) + labels}, stage.NFT...)
	phone, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 6000), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Arrives(server, s.PeerSocket(lab.PeerA, 5071), netip.AddrPortFrom(ext.Addr(), 6000))
	for counter, want := range map[string]string{"child": "packets 1 ", "forwarded": "packets 0 "} {
		out, err := s.Gateway.Output("nft", "list", "counter", "ip", "seen", counter)
		s.Must(err)
		if !strings.Contains(out, want) {
			t.Errorf("%s: %q, want %s", counter, out, want)
		}
	}
}

// An unanswered child that an expectation admitted ends with its permission, too, even if the next
// daemon comes after the anchor has ended: the kernel remembers who expected the child.
//
// Fails when a daemon that starts, or cleanup, knows such children by the anchors that are there.
func TestUnansweredChildrenOfExpectationsEndWithTheirPermission(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
	for _, mode := range [][]string{stage.Expect, stage.Auto} {
		for name, next := range map[string]func(s *scene){
			"start": func(s *scene) { s.Start(stage.Flags(mode)...) },
			"cleanup": func(s *scene) {
				if out, code := s.CLI("cleanup"); code != 0 || !strings.Contains(out, "1 unanswered child\n") {
					s.T.Errorf("exit %d, %q", code, out)
				}
			},
		} {
			t.Run(mode[0]+"/"+name, func(t *testing.T) {
				s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, mode...)
				s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
				phone, proxy, child := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
				ext := s.Contact(phone, proxy)
				s.Stands(phone, proxy, ext)
				s.Arrives(phone, child, ext)
				s.Kill()
				// The host's flow, and with the anchor its expectation.
				_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-src", phone.Addr().Addr().String())
				s.Must(err)
				if len(s.Elements()) > 0 {
					s.Must(s.NFT("flush map ip conenat permissions"))
				}
				s.Arrives(phone, child, ext) // by the kernel's flow alone
				if left := s.InKernel(); len(left) > 0 || len(s.Anchors()) > 0 {
					t.Fatalf("the kernel has %q\n%s", left, s.Dump())
				}
				next(s)
				s.Until("the child is gone", func() bool { return !s.hasFlowFrom(child) })
				fence := s.PeerSocket(lab.PeerB, 5060)
				s.Contact(phone, fence)
				s.Lost(phone, child, ext, fence)
			})
		}
	}
}
