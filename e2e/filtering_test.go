package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// Filtering for each subnet (RFC 4787 section 5), and groups of peers.

var (
	stranger = netip.MustParseAddr("203.0.113.99") // nobody ever sends to it
	group    = netip.MustParsePrefix("203.0.113.4/31")
	neighbor = lab.PeerA.Prev() // the other peer of the group
)

// standsFor waits until the permission of in stands for peers.
func (s *scene) standsFor(peers netip.Prefix, in *lab.Socket, ext netip.AddrPort) {
	s.t.Helper()
	s.until(ext.String()+" stands for "+peers.String(), func() bool {
		return slices.ContainsFunc(s.list(), func(p control.Permission) bool {
			return p.Int == in.Addr() && p.Ext == ext && p.Peers == peers && p.State == "standing"
		})
	})
}

func (s *scene) warns(text string) bool {
	s.t.Helper()
	return slices.ContainsFunc(s.status().Warnings, func(w string) bool { return strings.Contains(w, text) })
}

// Fails if the chain admit lacks the look-up for everybody.
func TestNFTFilteringLetsAnybodyIn(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent, auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Inside: 2}, append(mode, "--filtering=endpoint_independent", "--exclude-peer=203.0.113.7/32")...)
		phone, closed, proxy := s.inside(0, 5060), s.inside(1, 5061), s.peer(lab.PeerA, 5060)
		ext := s.contact(phone, proxy)
		s.standsFor(netip.MustParsePrefix("0.0.0.0/0"), phone, ext)
		s.arrives(phone, s.peer(stranger, 5070), ext)
		s.arrives(phone, s.peer(lab.PeerA, 5071), ext)
		s.contact(phone, s.peer(lab.PeerB, 5060))
		if ps := s.list(); len(ps) != 1 {
			t.Errorf("%d permissions, want one for all: %v", len(ps), ps)
		}
		if !s.warns("is open: anybody") {
			t.Errorf("warnings %q", s.status().Warnings)
		}
		if out, _ := s.cli("list", "--control-socket", s.d.Socket); !strings.Contains(out, "anybody") {
			t.Errorf("the list does not say that anybody may send:\n%s", out)
		}
		excluded := netip.MustParseAddr("203.0.113.7")
		s.lost(phone, s.peer(excluded, 5072), ext, proxy)
		unused := netip.AddrPortFrom(ext.Addr(), closed.Addr().Port())
		if err := s.peer(stranger, 5073).Send(unused, "x"); err != nil {
			t.Error(err)
		}
		s.arrives(phone, s.peer(stranger, 5074), ext) // the fence

		// What was there is taken over, and a command ends it.
		s.kill()
		s.arrives(phone, s.peer(stranger, 5075), ext)
		s.start(subnet(mode, "--filtering=endpoint_independent", "--reconcile=1s")...)
		s.standsFor(netip.MustParsePrefix("0.0.0.0/0"), phone, ext)
		if out, code := s.cli("revoke", "--control-socket", s.d.Socket, ext.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
			t.Errorf("exit %d, %q", code, out)
		}
		s.lost(phone, s.peer(stranger, 5076), ext, proxy)
		s.stop()
		if left := s.leftovers(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

func TestNFTFilteringIsEachSubnetsOwn(t *testing.T) {
	inModes(t, [][]string{auto, nft, nftByEvent, expects}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 3})
		text := strings.TrimSuffix(toml(mode), "[[subnet]]\nprefix = \"10.47.11.0/24\"\n")
		config := func(one, two string) string {
			return text + "[[subnet]]\nprefix = \"" + s.Inside(0).Addr.String() + "/32\"\nfiltering = \"" + one + "\"\n" +
				"[[subnet]]\nprefix = \"" + s.Inside(1).Addr.String() + "/32\"\nfiltering = \"" + two + "\"\n"
		}
		write := s.configured(config("address_dependent", "address_and_port_dependent"))
		one, two, proxy := s.inside(0, 5060), s.inside(1, 5061), s.peer(lab.PeerA, 5060)
		extOne, extTwo := s.contact(one, proxy), s.contact(two, proxy)
		s.stands(one, proxy, extOne)
		s.arrives(one, s.peer(lab.PeerA, 5070), extOne)
		s.lost(one, s.peer(stranger, 5070), extOne, proxy)
		s.lost(two, s.peer(lab.PeerA, 5071), extTwo, proxy)
		if n := max(len(s.entries()), len(s.conntrack("expect"))); n != 1 {
			t.Errorf("%d permissions in the kernel, want 1", n)
		}

		// A reload opens and closes; flows that are there count.
		write(config("endpoint_independent", "address_dependent"))
		if out, code := s.cli("reload", "--control-socket", s.d.Socket); code != 0 {
			t.Fatalf("exit %d, %q", code, out)
		}
		s.stands(two, proxy, extTwo)
		s.arrives(two, s.peer(lab.PeerA, 5072), extTwo)
		if mode[0] == expects[0] {
			s.stands(one, proxy, extOne)
			s.lost(one, s.peer(stranger, 5073), extOne, proxy)
			if !s.warns("only the nft backend can give it endpoint_independent") {
				t.Errorf("warnings %q", s.status().Warnings)
			}
			return
		}
		s.standsFor(netip.MustParsePrefix("0.0.0.0/0"), one, extOne)
		s.arrives(one, s.peer(stranger, 5074), extOne)
		s.lost(two, s.peer(stranger, 5075), extTwo, proxy)
	})
}

// One contact permits the whole group, and nobody outside it. Fails if the kernel
// learns, or the daemon grants, the contact alone.
func TestNFTGroupOfPeers(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent, auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		grouped := "peer_groups = [\"" + group.String() + "\"]\n" + toml(mode)
		s.configured(grouped)
		phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
		ext := s.contact(phone, proxy)
		s.standsFor(group, phone, ext)
		s.arrives(phone, s.peer(neighbor, 5070), ext)
		s.arrives(phone, s.peer(lab.PeerA, 5070), ext)
		s.lost(phone, s.peer(lab.PeerB, 5070), ext, proxy)
		s.kill()
		write := s.configured(grouped)
		s.standsFor(group, phone, ext)
		s.arrives(phone, s.peer(neighbor, 5071), ext)
		write(toml(mode))
		if out, code := s.cli("reload", "--control-socket", s.d.Socket); code != 0 {
			t.Fatalf("exit %d, %q", code, out)
		}
		s.stands(phone, proxy, ext)
		s.until("the group is not in the map", func() bool { return len(s.entries()) == 1 && s.inMap(entryOf(phone, proxy, ext)) })
		s.lost(phone, s.peer(neighbor, 5072), ext, proxy)
		s.arrives(phone, s.peer(lab.PeerA, 5073), ext)
	})
}

// What a daemon left for a group that the next one does not know goes, and with it
// the children that nobody answered.
func TestNFTGroupThatAKilledDaemonLeft(t *testing.T) {
	for name, next := range map[string]func(*scene){
		"cleanup": func(s *scene) {
			if out, code := s.cli("cleanup"); code != 0 || !strings.Contains(out, "1 unanswered") {
				s.t.Errorf("exit %d, %q", code, out)
			}
		},
		"start without the group": func(s *scene) { s.start(subnet(nft)...) },
	} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{}, append(nft, "--peer-group="+group.String())...)
			phone, proxy := s.inside(0, 5060), s.peer(neighbor, 5060)
			child := s.peer(lab.PeerA, 5070) // not the first address of the group
			ext := s.contact(phone, proxy)
			s.standsFor(group, phone, ext)
			s.arrives(phone, child, ext)
			s.kill()
			next(s)
			if s.hasFlowFrom(child) {
				t.Error("the unanswered child is still there")
			}
			s.lost(phone, child, ext, proxy)
		})
	}
}

// Without translation an expectation serves a group.
func TestRoutedIPv6FilteringAndGroups(t *testing.T) {
	needsExpect(t)
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
			s.start("--subnet", lab.InsideNet6.String(), "--routed", "--reconcile=1s", tc.flag)
			h := s.Inside(0)
			phone, proxy := s.socket(h.Namespace, h.Addr6, 5060), s.socket(s.Outside.Namespace, lab.Peer6A, 5060)
			ext := s.contact(phone, proxy)
			if tc.peers != "" {
				s.standsFor(netip.MustParsePrefix(tc.peers), phone, ext)
			}
			if tc.in.IsValid() {
				child := s.socket(s.Outside.Namespace, tc.in, 5070)
				s.arrives(phone, child, ext)
				s.kill()
				s.start("--subnet", lab.InsideNet6.String(), "--routed", "--reconcile=1s", tc.flag)
				s.standsFor(netip.MustParsePrefix(tc.peers), phone, ext)
				s.arrives(phone, s.socket(s.Outside.Namespace, tc.in, 5071), ext)
			}
			if tc.out.IsValid() {
				s.lost(phone, s.socket(s.Outside.Namespace, tc.out, 5072), ext, proxy)
			}
			s.stop()
			if left := s.leftovers(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}
