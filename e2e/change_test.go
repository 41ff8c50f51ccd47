package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// configured starts a daemon with a file and returns a function that writes a
// new one.
func (s *scene) configured(text string) (write func(string)) {
	s.T.Helper()
	path := filepath.Join(s.T.TempDir(), "conenatd.toml")
	write = func(text string) {
		s.T.Helper()
		s.Must(os.WriteFile(path, []byte(text), 0o644))
	}
	write(text)
	s.Start("--config", path)
	return write
}

func TestReloadChangesSubnetsWithoutTouchingWhatStays(t *testing.T) {
	for name, reload := range map[string]func(*scene){
		"by command": func(s *scene) {
			if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
				s.T.Errorf("exit %d, %q", code, out)
			}
		},
		"by signal": func(s *scene) { s.Must(s.Daemon.Signal(syscall.SIGHUP)) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2, Guest: true})
			write := s.configured("[[subnet]]\nprefix = \"10.47.11.0/24\"\n")
			one, two, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061), s.PeerSocket(lab.PeerA, 5060)
			guest := s.Socket(s.Guest.Namespace, s.Guest.Addr, 5062)
			extOne, extTwo, extGuest := s.Contact(one, proxy), s.Contact(two, proxy), s.Contact(guest, proxy)
			s.Stands(one, proxy, extOne)
			s.Stands(two, proxy, extTwo)
			granted := s.Status().Counters.Granted

			// Host two is no longer enabled, and the guest is.
			write("[[subnet]]\nprefix = \"10.47.11.109/32\"\n[[subnet]]\nprefix = \"10.47.12.0/24\"\n")
			reload(s)
			s.Stands(guest, proxy, extGuest) // its flow is older than the reload
			s.Arrives(guest, s.PeerSocket(lab.PeerA, 5070), extGuest)
			s.Arrives(one, s.PeerSocket(lab.PeerA, 5071), extOne)
			s.Lost(two, s.PeerSocket(lab.PeerA, 5072), extTwo, proxy)
			if n := s.Status().Counters.Granted; n != granted+1 {
				t.Errorf("%d grants since, want 1: that of the guest", n-granted)
			}
		})
	}
}

func TestReloadOfAWrongFileKeepsTheOldConfiguration(t *testing.T) {
	s := newScene(t, lab.Options{})
	write := s.configured("[[subnet]]\nprefix = \"10.47.11.0/24\"\n")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	for text, want := range map[string]string{
		"lifetime = 5\n[[subnet]]\nprefix = \"10.47.12.0/24\"\n":                        "conenatd.toml:1:12: lifetime: expected a duration",
		"event_buffer = 65536\n[[subnet]]\nprefix = \"10.47.12.0/24\"\n":                "event_buffer: a change needs a restart",
		"metrics_listen = \"127.0.0.1:9469\"\n[[subnet]]\nprefix = \"10.47.12.0/24\"\n": "metrics_listen: a change needs a restart",
		"": "none is enabled",
	} {
		write(text)
		out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket)
		if code == 0 || !strings.Contains(out, want) {
			t.Errorf("exit %d, %q, want %q", code, out, want)
		}
	}
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	if got := s.Status().Subnets; len(got) != 1 || got[0].Prefix != lab.InsideNet {
		t.Errorf("subnets: %v", got)
	}
}

func TestRevokeByHostPeerAndPermission(t *testing.T) {
	s := play(t, lab.Options{Inside: 2})
	one, two := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061)
	a, b := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
	for _, in := range []*lab.Socket{one, two} {
		for _, peer := range []*lab.Socket{a, b} {
			s.Stands(in, peer, s.Contact(in, peer))
		}
	}
	ext := netip.AddrPortFrom(s.Gateway.Addr, 5060)
	revoke := func(want int, words ...string) {
		t.Helper()
		args := append([]string{"revoke", "--control-socket", s.Daemon.Socket}, words...)
		if len(words) == 0 {
			args[0] = "flush"
		}
		out, code := s.CLI(args...)
		many := "s"
		if want == 1 {
			many = ""
		}
		said := "revoked " + strconv.Itoa(want) + " permission" + many + "; existing flows continue without it, and a new flow brings it back\n"
		if code != 0 || out != said {
			t.Errorf("revoke %q: exit %d, %q, want %d", words, code, out, want)
		}
	}
	revoke(1, ext.String(), lab.PeerA.String())
	if n := len(s.InKernel()); n != 3 {
		t.Errorf("%d permissions in the kernel, want 3", n)
	}
	s.Lost(one, s.PeerSocket(lab.PeerA, 5070), ext, a)
	// A new flow brings it back.
	a2 := s.PeerSocket(lab.PeerA, 5062)
	s.Contact(one, a2)
	s.Stands(one, a2, ext)
	revoke(2, "10.47.11.110")
	revoke(1, lab.PeerB.String())
	revoke(1)
	if left := s.InKernel(); len(left) > 0 {
		t.Errorf("permissions left: %q", left)
	}
	if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, "bogus"); code == 0 || !strings.Contains(out, "expected an address") {
		t.Errorf("exit %d, %q", code, out)
	}
}

// When the outside address goes away, its permissions end at once, long before the
// next reconcile. A new address and a new uplink work without a restart.
func TestOutsideAddressChange(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	_, err := s.Gateway.Output("ip", "address", "del", "198.51.100.1/24", "dev", "wan0")
	s.Must(err)
	s.Until("the permission ended", func() bool { return len(s.InKernel()) == 0 })
	for _, args := range [][]string{
		{"address", "add", "198.51.100.9/24", "dev", "wan0"},
		{"route", "replace", "default", "via", "198.51.100.254"},
	} {
		_, err = s.Gateway.Output("ip", args...)
		s.Must(err)
	}
	other := s.InsideSocket(0, 5061)
	ext = s.Contact(other, proxy)
	if ext.Addr() != netip.MustParseAddr("198.51.100.9") {
		t.Fatalf("outside endpoint %v", ext)
	}
	s.Stands(other, proxy, ext)
	s.Arrives(other, s.PeerSocket(lab.PeerA, 5070), ext)
}

func TestLimitPerHostIsKeptAndShown(t *testing.T) {
	s := play(t, lab.Options{Inside: 2}, "--max-permissions-per-host", "2")
	one, two := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061)
	for i, addr := range []netip.Addr{lab.PeerA, lab.PeerB, lab.PeerC} {
		peer := s.PeerSocket(addr, 5060)
		ext := s.Contact(one, peer)
		if i < 2 {
			s.Stands(one, peer, ext)
			continue
		}
		if p := s.Listed(one, peer, ext, "refused"); p.Reason != "host_limit" {
			t.Errorf("reason %q", p.Reason)
		}
		s.Stands(two, peer, s.Contact(two, peer))
	}
	if n := s.Status().Counters.Refused["host_limit"]; n != 1 {
		t.Errorf("%d refusals counted, want 1", n)
	}
}

func TestChildrenBeyondTheirLimitGo(t *testing.T) {
	s := play(t, lab.Options{}, "--max-children", "3", "--reconcile", "1s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	for port := uint16(6000); port < 6010; port++ {
		s.Must(s.PeerSocket(lab.PeerA, port).Send(ext, stage.Payload("child")))
	}
	n := 0
	child := regexp.MustCompile(`dport=5060 packets=\d+ bytes=\d+ \[UNREPLIED\] src=10\.47\.11\.109`)
	for _, l := range s.ConntrackList("-p", "udp") {
		if child.MatchString(l) {
			n++
		}
	}
	if n != 3 {
		t.Errorf("%d children, want 3\n%s", n, s.Dump())
	}
	// The guard drops a packet that the map does not admit, like any unsolicited one.
	s.Until("seven drops are counted", func() bool {
		st := s.Status()
		return st.Tables.Guard.Children+st.Tables.Guard.Drops+st.Counters.Crowded == 7
	})
}

// A peer has at most max_children live flows, answered or not, also while no daemon runs. A flow
// that ends makes room. The group has room for more packets in a time, so they are not what counts.
//
// Fails when answered flows, or the kernel alone, let more in.
func TestLiveChildrenAreLimitedWithoutADaemon(t *testing.T) {
	const most = 3
	group := netip.PrefixFrom(lab.PeerA, 28).Masked()
	s := play(t, lab.Options{}, "--max-children", strconv.Itoa(most), "--peer-group", group.String())
	if got := s.Status().PeerGroups; !slices.Equal(got, []netip.Prefix{group}) {
		t.Errorf("status has the peer groups %v", got)
	}
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	for _, peer := range []netip.Addr{lab.PeerA, lab.PeerB} { // expectations are for one each
		s.Until("the permission stands", func() bool {
			return slices.ContainsFunc(s.List(), func(p control.Permission) bool {
				return p.State == "standing" && (p.Peer == peer || p.Peers.Contains(peer))
			})
		})
	}
	var children []*lab.Socket
	for port := range uint16(most) {
		child := s.PeerSocket(lab.PeerA, 6000+port)
		s.Arrives(phone, child, ext)
		s.Must(lab.Arrives(child, lab.Packet{From: phone, To: child.Addr(), Payload: stage.Payload("answer")}))
		children = append(children, child)
	}
	s.Lost(phone, s.PeerSocket(lab.PeerA, 6010), ext, proxy)
	s.Kill()
	s.Lost(phone, s.PeerSocket(lab.PeerA, 6011), ext, proxy)
	s.Arrives(phone, s.PeerSocket(lab.PeerB, 6012), ext)
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", lab.PeerA.String(), "--sport", strconv.Itoa(int(children[0].Addr().Port())))
	s.Must(err)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 6013), ext)
	s.Lost(phone, s.PeerSocket(lab.PeerA, 6014), ext, proxy)
}
