package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// configured starts a daemon with a file and returns a function that writes a
// new one.
func (s *scene) configured(text string) (write func(string)) {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), "conenatd.toml")
	write = func(text string) {
		s.t.Helper()
		s.must(os.WriteFile(path, []byte(text), 0o644))
	}
	write(text)
	s.start("--config", path)
	return write
}

func TestReloadChangesSubnetsWithoutTouchingWhatStays(t *testing.T) {
	for name, reload := range map[string]func(*scene){
		"by command": func(s *scene) {
			if out, code := s.cli("reload", "--control-socket", s.d.Socket); code != 0 {
				s.t.Errorf("exit %d, %q", code, out)
			}
		},
		"by signal": func(s *scene) { s.must(s.d.Signal(syscall.SIGHUP)) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2, Guest: true})
			write := s.configured("[[subnet]]\nprefix = \"10.47.11.0/24\"\n")
			one, two, proxy := s.inside(0, 5060), s.inside(1, 5061), s.peer(lab.PeerA, 5060)
			guest := s.socket(s.Guest.Namespace, s.Guest.Addr, 5062)
			extOne, extTwo, extGuest := s.contact(one, proxy), s.contact(two, proxy), s.contact(guest, proxy)
			s.stands(one, proxy, extOne)
			s.stands(two, proxy, extTwo)
			granted := s.status().Counters.Granted

			// Host two is not enabled any more, the guest is.
			write("[[subnet]]\nprefix = \"10.47.11.109/32\"\n[[subnet]]\nprefix = \"10.47.12.0/24\"\n")
			reload(s)
			s.stands(guest, proxy, extGuest) // its flow is older than the reload
			s.arrives(guest, s.peer(lab.PeerA, 5070), extGuest)
			s.arrives(one, s.peer(lab.PeerA, 5071), extOne)
			s.lost(two, s.peer(lab.PeerA, 5072), extTwo, proxy)
			if n := s.status().Counters.Granted; n != granted+1 {
				t.Errorf("%d grants since, want 1: that of the guest", n-granted)
			}
		})
	}
}

func TestReloadOfAWrongFileKeepsTheOldConfiguration(t *testing.T) {
	s := newScene(t, lab.Options{})
	write := s.configured("[[subnet]]\nprefix = \"10.47.11.0/24\"\n")
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	for text, want := range map[string]string{
		"lifetime = 5\n[[subnet]]\nprefix = \"10.47.12.0/24\"\n":         "conenatd.toml:1: lifetime: expected a duration",
		"event_buffer = 65536\n[[subnet]]\nprefix = \"10.47.12.0/24\"\n": "event_buffer: a change needs a restart",
		"": "none is enabled",
		"outside = [\"ppp00\"]\n[[subnet]]\nprefix = \"10.47.11.0/24\"\n": "ppp00",
	} {
		write(text)
		out, code := s.cli("reload", "--control-socket", s.d.Socket)
		if code == 0 || !strings.Contains(out, want) {
			t.Errorf("exit %d, %q, want %q", code, out, want)
		}
	}
	s.arrives(phone, s.peer(lab.PeerA, 5070), ext)
	if got := s.status().Subnets; len(got) != 1 || got[0].Prefix != lab.InsideNet {
		t.Errorf("subnets: %v", got)
	}
}

func TestRevokeByHostPeerAndPermission(t *testing.T) {
	s := play(t, lab.Options{Inside: 2})
	one, two := s.inside(0, 5060), s.inside(1, 5061)
	a, b := s.peer(lab.PeerA, 5060), s.peer(lab.PeerB, 5060)
	for _, in := range []*lab.Socket{one, two} {
		for _, peer := range []*lab.Socket{a, b} {
			s.stands(in, peer, s.contact(in, peer))
		}
	}
	ext := netip.AddrPortFrom(s.Gateway.Addr, 5060)
	revoke := func(want int, words ...string) {
		t.Helper()
		args := append([]string{"revoke", "--control-socket", s.d.Socket}, words...)
		if len(words) == 0 {
			args[0] = "flush"
		}
		out, code := s.cli(args...)
		if code != 0 || out != "revoked "+strconv.Itoa(want)+" permissions\n" {
			t.Errorf("revoke %q: exit %d, %q, want %d", words, code, out, want)
		}
	}
	revoke(1, ext.String(), lab.PeerA.String())
	if n := len(s.inKernel()); n != 3 {
		t.Errorf("%d permissions in the kernel, want 3", n)
	}
	s.lost(one, s.peer(lab.PeerA, 5070), ext, a)
	// A new flow brings it back.
	a2 := s.peer(lab.PeerA, 5062)
	s.contact(one, a2)
	s.stands(one, a2, ext)
	revoke(2, "10.47.11.110")
	revoke(1, lab.PeerB.String())
	revoke(1)
	if left := s.inKernel(); len(left) > 0 {
		t.Errorf("permissions left: %q", left)
	}
	if out, code := s.cli("revoke", "--control-socket", s.d.Socket, "bogus"); code == 0 || !strings.Contains(out, "expected an address") {
		t.Errorf("exit %d, %q", code, out)
	}
}

// The outside address goes: its permissions end at once, long before the next
// reconcile. A new address and a new uplink work without restart.
func TestOutsideAddressChange(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	_, err := s.Gateway.Output("ip", "address", "del", "198.51.100.1/24", "dev", "wan0")
	s.must(err)
	s.until("the permission ended", func() bool { return len(s.inKernel()) == 0 })
	for _, args := range [][]string{
		{"address", "add", "198.51.100.9/24", "dev", "wan0"},
		{"route", "replace", "default", "via", "198.51.100.254"},
	} {
		_, err = s.Gateway.Output("ip", args...)
		s.must(err)
	}
	other := s.inside(0, 5061)
	ext = s.contact(other, proxy)
	if ext.Addr() != netip.MustParseAddr("198.51.100.9") {
		t.Fatalf("outside endpoint %v", ext)
	}
	s.stands(other, proxy, ext)
	s.arrives(other, s.peer(lab.PeerA, 5070), ext)
}

func TestLimitPerHostIsKeptAndShown(t *testing.T) {
	s := play(t, lab.Options{Inside: 2}, "--max-permissions-per-host", "2")
	one, two := s.inside(0, 5060), s.inside(1, 5061)
	for i, addr := range []netip.Addr{lab.PeerA, lab.PeerB, lab.PeerC} {
		peer := s.peer(addr, 5060)
		ext := s.contact(one, peer)
		if i < 2 {
			s.stands(one, peer, ext)
			continue
		}
		if p := s.listed(one, peer, ext, "refused"); p.Reason != "limit per inside host" {
			t.Errorf("reason %q", p.Reason)
		}
		s.stands(two, peer, s.contact(two, peer))
	}
	if n := s.status().Counters.Refused["limit per inside host"]; n != 1 {
		t.Errorf("%d refusals counted, want 1", n)
	}
}

func TestChildrenBeyondTheirLimitGo(t *testing.T) {
	s := play(t, lab.Options{}, "--max-children", "3", "--reconcile", "1s")
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	for port := uint16(6000); port < 6010; port++ {
		s.must(s.peer(lab.PeerA, port).Send(ext, payload("child")))
	}
	n := 0
	for _, l := range s.conntrack("-p", "udp") {
		if strings.Contains(l, "dport=5060 [UNREPLIED] src=10.47.11.109") {
			n++
		}
	}
	if n != 3 {
		t.Errorf("%d children, want 3\n%s", n, s.dump())
	}
	// What the map does not admit is like any packet that nobody waits for.
	s.until("seven drops are counted", func() bool {
		st := s.status()
		return st.Tables.Guard.Children+st.Tables.Guard.Drops+st.Counters.Crowded == 7
	})
}
