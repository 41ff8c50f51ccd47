package lab

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// socket opens a socket that is closed when the test ends.
func socket(t *testing.T, n *Namespace, addr netip.Addr, port uint16) *Socket {
	t.Helper()
	s, err := n.Socket(addr, port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// contact lets s send to the peer, which must see it come from want.
func contact(t *testing.T, s, peer *Socket, want netip.AddrPort) {
	t.Helper()
	seen, err := s.Contact(peer)
	must(t, err)
	if seen != want {
		t.Fatalf("%s is seen as %s, want %s", s.Addr(), seen, want)
	}
}

func TestStockNATLetsInTheAnswerFromThePortAskedOnly(t *testing.T) {
	l := ForTest(t, Options{})
	inside := socket(t, l.Inside(0).Namespace, l.Inside(0).Addr, 5060)
	asked := socket(t, l.Outside.Namespace, PeerA, 5060)
	other := socket(t, l.Outside.Namespace, PeerA, 5070)
	ext := netip.AddrPortFrom(l.Gateway.Addr, 5060)

	contact(t, inside, asked, ext)
	must(t, asked.Send(ext, "answer"))
	from, err := inside.Expect("answer")
	must(t, err)
	if from != asked.Addr() {
		t.Errorf("the answer came from %s, want %s", from, asked.Addr())
	}
	must(t, Lost(inside, Packet{other, ext, "from another port"}, Packet{asked, ext, "fence"}))

	lines, err := l.Conntrack("-p", "udp", "--orig-src", inside.Addr().Addr().String())
	must(t, err)
	if len(lines) != 1 || !strings.Contains(lines[0], "src=203.0.113.5 dst=198.51.100.1 sport=5060 dport=5060") {
		t.Errorf("conntrack lists %q", lines)
	}
	must(t, l.Flush())
	for _, args := range [][]string{{"-p", "udp"}, {"expect"}} {
		if lines, err := l.Conntrack(args...); err != nil || len(lines) != 0 {
			t.Errorf("conntrack -L %v after Flush: %q, %v", args, lines, err)
		}
	}
}

func TestLostTellsAPacketThatArrives(t *testing.T) {
	l := ForTest(t, Options{})
	inside := socket(t, l.Inside(0).Namespace, l.Inside(0).Addr, 5060)
	peer := socket(t, l.Outside.Namespace, PeerA, 5060)
	ext := netip.AddrPortFrom(l.Gateway.Addr, 5060)
	contact(t, inside, peer, ext)

	err := Lost(inside, Packet{peer, ext, "not lost"}, Packet{peer, ext, "fence"})
	if err == nil || !strings.Contains(err.Error(), "arrived from 203.0.113.5:5060") {
		t.Errorf("Lost says %v", err)
	}
	if err := Lost(inside, Packet{inside, ext, "x"}, Packet{peer, ext, "y"}); err == nil {
		t.Error("Lost takes a fence from another namespace")
	}
}

// A packet that is sent as soon as New returns must get through; otherwise tests of
// the first packet would fail now and then.
func TestTheFirstPacketGetsThrough(t *testing.T) {
	for range 20 {
		l := ForTest(t, Options{Inside: 2, Guest: true, IPv6: true})
		for _, h := range []*Host{l.Guest, l.Inside(1), l.Inside(0)} {
			s := socket(t, h.Namespace, h.Addr, 0)
			contact(t, s, socket(t, l.Outside.Namespace, PeerC, 0), netip.AddrPortFrom(l.Gateway.Addr, s.Addr().Port()))
		}
		must(t, l.Close())
	}
}

func TestIPv6IsRoutedUntranslated(t *testing.T) {
	l := ForTest(t, Options{Inside: 2, IPv6: true, Guest: true})
	peer := socket(t, l.Outside.Namespace, Peer6B, 5060)
	for _, h := range []*Host{l.Inside(0), l.Inside(1), l.Guest} {
		s := socket(t, h.Namespace, h.Addr6, 5060)
		contact(t, s, peer, s.Addr())
		contact(t, peer, s, peer.Addr())
	}
	anyPeer := socket(t, l.Outside.Namespace, netip.MustParseAddr("2001:db8:5::99"), 0)
	contact(t, anyPeer, socket(t, l.Inside(0).Namespace, l.Inside(0).Addr6, 0), anyPeer.Addr())
}

func TestHostsOfTheLANsReachEachOther(t *testing.T) {
	l := ForTest(t, Options{Inside: 2, Guest: true})
	a := socket(t, l.Inside(0).Namespace, netip.MustParseAddr("10.47.11.109"), 0)
	b := socket(t, l.Inside(1).Namespace, netip.MustParseAddr("10.47.11.110"), 0)
	guest := socket(t, l.Guest.Namespace, netip.MustParseAddr("10.47.12.20"), 0)
	contact(t, a, b, a.Addr())
	contact(t, guest, b, guest.Addr())
}

func TestRuleSets(t *testing.T) {
	for name, rules := range map[string]string{
		"masquerade":    Masquerade,
		"drop policy":   Masquerade + DropPolicy,
		"fixed address": SNATTo(netip.MustParseAddr("198.51.100.1")) + DropPolicy,
		IPTablesNFT:     "",
		IPTablesLegacy:  "",
	} {
		t.Run(name, func(t *testing.T) {
			var l *Lab
			if strings.HasPrefix(name, "iptables") {
				l = ForTest(t, Options{Guest: true, Rules: NoRules})
				must(t, l.IPTables(name, IPTablesMasquerade+IPTablesDropPolicy))
			} else {
				l = ForTest(t, Options{Guest: true, Rules: rules})
				text, err := l.Ruleset()
				must(t, err)
				if strings.Count(text, "table ") != strings.Count(rules, "table ") {
					t.Errorf("the rules %s are printed as %s", rules, text)
				}
			}
			peer := socket(t, l.Outside.Namespace, PeerB, 5060)
			for _, h := range []*Host{l.Inside(0), l.Guest} {
				s := socket(t, h.Namespace, h.Addr, 0)
				ext := netip.AddrPortFrom(l.Gateway.Addr, s.Addr().Port())
				contact(t, s, peer, ext)
				must(t, peer.Send(ext, "answer"))
				_, err := s.Expect("answer")
				must(t, err)
			}

			gateway := socket(t, l.Gateway.Namespace, l.Gateway.Addr, 7000)
			contact(t, gateway, peer, gateway.Addr())
			err := Lost(gateway,
				Packet{socket(t, l.Outside.Namespace, PeerB, 5070), gateway.Addr(), "unsolicited"},
				Packet{peer, gateway.Addr(), "fence"})
			if drops := strings.Contains(rules, "policy drop") || rules == ""; drops != (err == nil) {
				t.Errorf("unsolicited packet to the gateway: %v, want it lost: %v", err, drops)
			}
		})
	}
}

func TestMasqueradeRangeKeepsToItsPorts(t *testing.T) {
	l := ForTest(t, Options{Rules: MasqueradeRange(40000, 40001)})
	peer := socket(t, l.Outside.Namespace, PeerB, 5060)
	for range 2 {
		seen, err := socket(t, l.Inside(0).Namespace, l.Inside(0).Addr, 0).Contact(peer)
		must(t, err)
		if p := seen.Port(); p != 40000 && p != 40001 {
			t.Errorf("outside port %d", p)
		}
	}
}

func TestNoRulesMeansAnEmptyRuleset(t *testing.T) {
	l := ForTest(t, Options{Rules: NoRules})
	text, err := l.Ruleset()
	if err != nil || text != "" {
		t.Errorf("rules: %q, %v", text, err)
	}
}

func TestNewRefusesNonsense(t *testing.T) {
	ForTest(t, Options{}) // skips without privilege
	for name, o := range map[string]Options{
		"inside hosts: want 0 to 100": {Inside: 101},
		"run nft -f -: exit status 1": {Rules: "nonsense"},
	} {
		if _, err := New(o); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("New(%+v): %v, want %q", o, err, name)
		}
	}
}

// machine describes what a lab must not touch, without what changes by itself.
func machine(t *testing.T) string {
	var all strings.Builder
	for _, args := range [][]string{
		{"ip", "link"},
		{"ip", "-brief", "addr"},
		{"ip", "netns"},
		{"nft", "--stateless", "list", "ruleset"},
		{"sysctl", "net.ipv4.ip_forward", "net.ipv4.conf.all", "net.ipv4.conf.default"},
	} {
		path, err := program(args[0])
		must(t, err)
		out, err := exec.Command(path, args[1:]...).Output()
		if err != nil { // as root of a user namespace we can neither read nor change it
			t.Logf("%v: %v", args, err)
		}
		all.Write(out)
	}
	return all.String()
}

func openFiles(t *testing.T) int {
	files, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(files)
}

func TestNothingIsLeftAndTheMachineIsUntouched(t *testing.T) {
	ForTest(t, Options{}) // the runtime opens files of its own on first use
	before, files := machine(t), openFiles(t)
	l := ForTest(t, Options{Inside: 2, Guest: true, IPv6: true, Rules: Masquerade + DropPolicy})
	during := machine(t)
	must(t, l.Close())
	must(t, l.Close())
	if _, err := New(Options{Rules: "nonsense"}); err == nil {
		t.Error("New takes nonsense for rules")
	}
	if diff := cmp.Diff(before, during); diff != "" {
		t.Errorf("the machine with a lab:\n%s", diff)
	}
	if diff := cmp.Diff(before, machine(t)); diff != "" {
		t.Errorf("the machine after a lab:\n%s", diff)
	}
	if now := openFiles(t); now != files {
		t.Errorf("%d open files, %d before", now, files)
	}
	if err := l.Gateway.Do(func() error { return nil }); err == nil {
		t.Error("Do works in a closed namespace")
	}
}

func BenchmarkNew(b *testing.B) {
	for b.Loop() {
		l := ForTest(b, Options{Inside: 2, Guest: true, IPv6: true})
		if err := l.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// Fails when conntrack takes a packet of a flood for invalid, because of a wrong length or
// checksum, and when the length is not the one asked for.
func TestFloodOfShapes(t *testing.T) {
	l := ForTest(t, Options{})
	if err := l.NFT(`table ip shapes { chain c { type filter hook forward priority 0; meta length 1400 udp dport 5060 counter; }; }`); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Outside.Output("nft", `table ip silent { chain c { type filter hook prerouting priority raw; drop; }; }`); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		shape Shape
		entry string
	}{
		{Shape{}, "udp"}, {Shape{Length: 1400}, "udp"}, {Shape{TCP: true}, "SYN_SENT"}, {Shape{TCP: true, Length: 1400}, "SYN_SENT"},
	} {
		f, err := l.NewFloodOf(test.shape, 1, true)
		if err != nil {
			t.Fatal(err)
		}
		f.Aim(0, netip.AddrPortFrom(l.Inside(0).Addr, 5060), netip.AddrPortFrom(PeerA, 5060))
		if err := errors.Join(f.Send(0, 1), f.Close()); err != nil {
			t.Fatal(err)
		}
		entries, err := l.Conntrack("-s", l.Inside(0).Addr.String())
		if err != nil || len(entries) != 1 || !strings.Contains(entries[0], test.entry) {
			t.Errorf("%+v: entries %q (%v)", test.shape, entries, err)
		}
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := l.Gateway.Output("nft", "list", "table", "ip", "shapes"); err != nil || !strings.Contains(out, "counter packets 1 bytes 1400") {
		t.Errorf("%s (%v)", out, err)
	}
	for _, s := range []Shape{{Length: 27}, {Length: 39, TCP: true}, {Length: 1501}} {
		if _, err := l.NewFloodOf(s, 1, true); err == nil {
			t.Errorf("%+v is possible", s)
		}
	}
}
