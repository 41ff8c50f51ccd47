package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// Filtering per subnet (RFC 4787 section 5), and groups of peers.

var (
	stranger = netip.MustParseAddr("203.0.113.99") // nobody ever sends to it
	group    = netip.MustParsePrefix("203.0.113.4/31")
	neighbor = lab.PeerA.Prev() // the other peer of the group
)

// standsFor waits until a permission of in on ext stands for peers.
func (s *scene) standsFor(peers netip.Prefix, in *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	s.Until(ext.String()+" stands for "+peers.String(), func() bool {
		return slices.ContainsFunc(s.List(), func(p control.Permission) bool {
			return p.Int == in.Addr() && p.Ext == ext && p.Peers == peers && p.State == "standing"
		})
	})
}

func (s *scene) warns(text string) bool {
	s.T.Helper()
	return stage.Warned(s.Status(), text)
}

// Fails when chain admit lacks the lookup for all peers.
func TestNFTFilteringLetsAnybodyIn(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Inside: 2}, append(mode, "--filtering=endpoint_independent", "--exclude-peer=203.0.113.7/32")...)
		phone, closed, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.standsFor(netip.MustParsePrefix("0.0.0.0/0"), phone, ext)
		s.Arrives(phone, s.PeerSocket(stranger, 5070), ext)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
		s.Contact(phone, s.PeerSocket(lab.PeerB, 5060))
		if ps := s.List(); len(ps) != 1 {
			t.Errorf("%d permissions, want one for all: %v", len(ps), ps)
		}
		if !s.warns("is open: anybody") {
			t.Errorf("warnings %q", s.Status().Warnings)
		}
		if out, _ := s.CLI("list", "--control-socket", s.Daemon.Socket); !strings.Contains(out, "anybody") {
			t.Errorf("the list does not say that anybody may send:\n%s", out)
		}
		excluded := netip.MustParseAddr("203.0.113.7")
		s.Lost(phone, s.PeerSocket(excluded, 5072), ext, proxy)
		unused := netip.AddrPortFrom(ext.Addr(), closed.Addr().Port())
		if err := s.PeerSocket(stranger, 5073).Send(unused, "x"); err != nil {
			t.Error(err)
		}
		s.Arrives(phone, s.PeerSocket(stranger, 5074), ext) // the fence

		// The next daemon takes over the permission; revoke ends it.
		s.Kill()
		s.Arrives(phone, s.PeerSocket(stranger, 5075), ext)
		s.Start(stage.Flags(mode, "--filtering=endpoint_independent", "--reconcile=1s")...)
		s.standsFor(netip.MustParsePrefix("0.0.0.0/0"), phone, ext)
		if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, ext.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
			t.Errorf("exit %d, %q", code, out)
		}
		s.Lost(phone, s.PeerSocket(stranger, 5076), ext, proxy)
		s.Stop()
		if left := s.Leftovers(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

func TestNFTFilteringIsEachSubnetsOwn(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.NFTByEvent, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 3})
		text := strings.TrimSuffix(toml(mode), "[[subnet]]\nprefix = \"10.47.11.0/24\"\n")
		config := func(one, two string) string {
			return text + "[[subnet]]\nprefix = \"" + s.Inside(0).Addr.String() + "/32\"\nfiltering = \"" + one + "\"\n" +
				"[[subnet]]\nprefix = \"" + s.Inside(1).Addr.String() + "/32\"\nfiltering = \"" + two + "\"\n"
		}
		write := s.configured(config("address_dependent", "address_and_port_dependent"))
		one, two, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061), s.PeerSocket(lab.PeerA, 5060)
		extOne, extTwo := s.Contact(one, proxy), s.Contact(two, proxy)
		s.Stands(one, proxy, extOne)
		s.Arrives(one, s.PeerSocket(lab.PeerA, 5070), extOne)
		s.Lost(one, s.PeerSocket(stranger, 5070), extOne, proxy)
		s.Lost(two, s.PeerSocket(lab.PeerA, 5071), extTwo, proxy)
		if n := max(len(s.entries()), len(s.ConntrackList("expect"))); n != 1 {
			t.Errorf("%d permissions in the kernel, want 1", n)
		}

		// A reload opens one host and closes the other, for existing flows too.
		write(config("endpoint_independent", "address_dependent"))
		if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
			t.Fatalf("exit %d, %q", code, out)
		}
		s.Stands(two, proxy, extTwo)
		s.Arrives(two, s.PeerSocket(lab.PeerA, 5072), extTwo)
		if mode[0] == stage.Expect[0] {
			s.Stands(one, proxy, extOne)
			s.Lost(one, s.PeerSocket(stranger, 5073), extOne, proxy)
			if !s.warns("only the nft backend can give it endpoint_independent") {
				t.Errorf("warnings %q", s.Status().Warnings)
			}
			return
		}
		s.standsFor(netip.MustParsePrefix("0.0.0.0/0"), one, extOne)
		s.Arrives(one, s.PeerSocket(stranger, 5074), extOne)
		s.Lost(two, s.PeerSocket(stranger, 5075), extTwo, proxy)
	})
}

// One contact permits the whole group, and nobody outside it. Fails when the kernel
// learns, or the daemon grants, a permission for the contacted peer alone.
func TestNFTGroupOfPeers(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		grouped := "peer_groups = [\"" + group.String() + "\"]\n" + toml(mode)
		s.configured(grouped)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.standsFor(group, phone, ext)
		s.Arrives(phone, s.PeerSocket(neighbor, 5070), ext)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
		s.Lost(phone, s.PeerSocket(lab.PeerB, 5070), ext, proxy)
		s.Verified()
		s.Kill()
		write := s.configured(grouped)
		s.standsFor(group, phone, ext)
		s.Arrives(phone, s.PeerSocket(neighbor, 5071), ext)
		write(toml(mode))
		if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
			t.Fatalf("exit %d, %q", code, out)
		}
		s.Stands(phone, proxy, ext)
		s.Until("the group is not in the map", func() bool { return len(s.entries()) == 1 && s.inMap(entryOf(phone, proxy, ext)) })
		s.Lost(phone, s.PeerSocket(neighbor, 5072), ext, proxy)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5073), ext)
	})
}

// An expectation with translation admits one peer, so each peer of a small group gets
// its own.
func TestGroupOfPeersByExpectations(t *testing.T) {
	s := newScene(t, lab.Options{})
	grouped := "peer_groups = [\"203.0.113.0/28\"]\n" + toml(stage.Expect)
	s.configured(grouped)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	near, far := netip.MustParseAddr("203.0.113.15"), netip.MustParseAddr("203.0.113.16")
	ext := s.Contact(phone, proxy)
	all := func() bool { return s.Status().Permissions.Standing == 16 }
	s.Until("all of the group have one", all)
	s.Arrives(phone, s.PeerSocket(near, 5070), ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Lost(phone, s.PeerSocket(far, 5070), ext, proxy)
	if s.warns("peer_groups") {
		t.Errorf("warnings %q", s.Status().Warnings)
	}
	s.Verified()
	s.Kill()
	write := s.configured(grouped)
	s.Until("all of the group have one again", all)
	s.Arrives(phone, s.PeerSocket(near, 5071), ext)
	write(toml(stage.Expect))
	if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
		t.Fatalf("exit %d, %q", code, out)
	}
	s.Until("the group is gone", func() bool { return len(s.ConntrackList("expect")) == 1 })
	s.Lost(phone, s.PeerSocket(near, 5072), ext, proxy)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5073), ext)
}

// A killed daemon leaves a group's permission, and the next daemon has no such group:
// the permission ends, and its unanswered children with it.
func TestNFTGroupThatAKilledDaemonLeft(t *testing.T) {
	for name, next := range map[string]func(*scene){
		"cleanup": func(s *scene) {
			if out, code := s.CLI("cleanup"); code != 0 || !strings.Contains(out, "1 unanswered") {
				s.T.Errorf("exit %d, %q", code, out)
			}
		},
		"start without the group": func(s *scene) { s.Start(stage.Flags(stage.NFT)...) },
	} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{}, append(stage.NFT, "--peer-group="+group.String())...)
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(neighbor, 5060)
			child := s.PeerSocket(lab.PeerA, 5070) // not the first address of the group
			ext := s.Contact(phone, proxy)
			s.standsFor(group, phone, ext)
			s.Arrives(phone, child, ext)
			s.Kill()
			next(s)
			if s.hasFlowFrom(child) {
				t.Error("the unanswered child is still there")
			}
			s.Lost(phone, child, ext, proxy)
		})
	}
}

// Without translation one expectation serves a whole group.
func TestRoutedIPv6FilteringAndGroups(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
	outsider := netip.MustParseAddr("2001:db8:113::9:9")
	for name, tc := range map[string]struct {
		flag    string
		peers   string
		in, out netip.Addr
	}{
		"a group": {"--peer-group=" + netip.PrefixFrom(lab.Peer6A, 112).Masked().String(), netip.PrefixFrom(lab.Peer6A, 112).Masked().String(), lab.Peer6B, outsider},
		"nobody":  {"--filtering=address_and_port_dependent", "", netip.Addr{}, lab.Peer6A},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy})
			s.Start("--subnet", lab.InsideNet6.String(), "--routed", "--reconcile=1s", tc.flag)
			h := s.Inside(0)
			phone, proxy := s.Socket(h.Namespace, h.Addr6, 5060), s.Socket(s.Outside.Namespace, lab.Peer6A, 5060)
			ext := s.Contact(phone, proxy)
			if tc.peers != "" {
				s.standsFor(netip.MustParsePrefix(tc.peers), phone, ext)
			}
			if tc.in.IsValid() {
				child := s.Socket(s.Outside.Namespace, tc.in, 5070)
				s.Arrives(phone, child, ext)
				s.Kill()
				s.Start("--subnet", lab.InsideNet6.String(), "--routed", "--reconcile=1s", tc.flag)
				s.standsFor(netip.MustParsePrefix(tc.peers), phone, ext)
				s.Arrives(phone, s.Socket(s.Outside.Namespace, tc.in, 5071), ext)
			}
			if tc.out.IsValid() {
				s.Lost(phone, s.Socket(s.Outside.Namespace, tc.out, 5072), ext, proxy)
			}
			s.Stop()
			if left := s.Leftovers(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}
