package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// conenatd leaves alone what belongs to others: other networks, forwards, the gateway's
// own ports, the firewall.

func TestSubnetThatIsNotEnabledGetsNothing(t *testing.T) {
	s := play(t, lab.Options{Guest: true})
	guest := s.Socket(s.Guest.Namespace, s.Guest.Addr, 5060)
	phone, proxy := s.InsideSocket(0, 5061), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(guest, proxy)
	// Events come in order: once the daemon knows the phone, it has seen the guest.
	s.Stands(phone, proxy, s.Contact(phone, proxy))
	s.Lost(guest, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
	if n := len(s.List()); n != 1 {
		t.Errorf("%d permissions, want that of the phone only\n%s", n, s.Dump())
	}
}

// An inside host calls a guest. Only the port that it called may answer, whether the call
// is translated or not.
func TestGuestNetworkIsNotOpened(t *testing.T) {
	for name, nat := range map[string]string{
		"routed": lab.Masquerade,
		"masqueraded everywhere": `table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat;
		masquerade
	}
}
`,
	} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Guest: true, Rules: nat + lab.DropPolicy})
			phone, guest := s.InsideSocket(0, 5060), s.Socket(s.Guest.Namespace, s.Guest.Addr, 5060)
			proxy := s.PeerSocket(lab.PeerA, 5060)
			seen := s.Contact(phone, guest)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)
			s.Lost(phone, s.Socket(s.Guest.Namespace, s.Guest.Addr, 5070), seen, guest)
			// Nor does the permission for the peer let the guest in.
			s.Must(lab.Lost(phone,
				lab.Packet{From: s.Socket(s.Guest.Namespace, s.Guest.Addr, 5071), To: ext, Payload: stage.Payload("guest")},
				lab.Packet{From: guest, To: seen, Payload: stage.Payload("fence")}))
		})
	}
}

// forward is a rule of the user's: it forwards port 5060 to the second host.
const forward = `table ip forwards {
	chain prerouting {
		type nat hook prerouting priority dstnat;
		iifname "wan0" udp dport 5060 dnat to 10.47.11.110
	}
}
`

// Only root can know the tables of iptables-legacy; without root the daemon learns of a
// forward there from its first flow.
func TestForwardThatIsUsedFirstWins(t *testing.T) {
	s := playHiddenForward(t)
	phone, server := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
	proxy := s.PeerSocket(lab.PeerA, 5060)
	forwarded := netip.AddrPortFrom(s.Gateway.Addr, 5060)
	s.Arrives(server, s.PeerSocket(lab.PeerC, 9), forwarded)

	ext := s.Contact(phone, proxy)
	if ext != forwarded {
		t.Fatalf("outside endpoint %v, want the forwarded %v", ext, forwarded)
	}
	s.hidden(phone, proxy, ext, false)
	s.Arrives(server, s.PeerSocket(lab.PeerA, 5070), ext)
}

// hidden checks how a permission is listed whose packets a forward takes. With byRules
// the daemon knows the forward's rule: the permission is refused, though it stays in the
// map, behind the forward.
func (s *scene) hidden(in, peer *lab.Socket, ext netip.AddrPort, byRules bool) {
	s.T.Helper()
	if byRules || stage.UsesExpectAlone() {
		if p := s.Listed(in, peer, ext, "refused"); p.Reason != "forwarded" {
			s.T.Errorf("reason %q", p.Reason)
		}
		return
	}
	if p := s.Listed(in, peer, ext, "standing"); p.Backend != "nft" {
		s.T.Errorf("it stands by %q", p.Backend)
	}
}

func TestForwardThatIsUsedLaterWins(t *testing.T) {
	s := playHiddenForward(t)
	phone, server := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
	proxy := s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(server, s.PeerSocket(lab.PeerC, 9), ext)
	s.hidden(phone, proxy, ext, false)
	s.Arrives(server, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Arrives(phone, proxy, ext)
}

func playHiddenForward(t *testing.T) *scene {
	t.Helper()
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
	s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+`*nat
-A PREROUTING -i wan0 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.110
COMMIT
`))
	s.Exe = s.unprivileged()
	s.Start("--subnet", lab.InsideNet.String())
	return s
}

// A forward wins before anybody uses it, if its rule can be read, and so does a later
// one.
func TestForwardThatNobodyUsedYetWins(t *testing.T) {
	s := play(t, lab.Options{Inside: 2, Rules: lab.Masquerade + forward}, "--reconcile", "1s")
	phone, server := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
	other, later := s.InsideSocket(0, 5061), s.InsideSocket(1, 5061)
	proxy := s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.hidden(phone, proxy, ext, true)
	s.Arrives(server, s.PeerSocket(lab.PeerA, 5070), ext)

	extOther := s.Contact(other, proxy)
	s.Stands(other, proxy, extOther)
	s.Must(s.NFT("add rule ip forwards prerouting iifname wan0 udp dport 5061 dnat to 10.47.11.110"))
	s.hidden(other, proxy, extOther, true)
	s.Arrives(later, s.PeerSocket(lab.PeerA, 5071), extOther)
}

func TestForwardThatIsConfiguredWins(t *testing.T) {
	s := play(t, lab.Options{Inside: 2, Rules: lab.Masquerade + forward}, "--exclude-port", "5060")
	phone, server := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
	proxy, other := s.PeerSocket(lab.PeerA, 5060), s.InsideSocket(0, 5061)
	ext := s.Contact(phone, proxy)
	s.Stands(other, proxy, s.Contact(other, proxy)) // a later event
	s.Arrives(server, s.PeerSocket(lab.PeerA, 5070), ext)
}

// A range of ports is excluded including both ends, as one interval in the kernel; its
// neighbours are not.
func TestRangeOfPortsIsExcluded(t *testing.T) {
	s := play(t, lab.Options{}, "--exclude-port=10000-20000", "--exclude-port=5060")
	peer := s.PeerSocket(lab.PeerA, 5060)
	for _, port := range []uint16{5060, 10_000, 15_000, 20_000} {
		in := s.InsideSocket(0, port)
		ext := s.Contact(in, peer)
		s.Lost(in, s.PeerSocket(lab.PeerA, 5070+port), ext, peer)
	}
	for _, port := range []uint16{5061, 9999, 20_001} {
		in := s.InsideSocket(0, port)
		ext := s.Contact(in, peer)
		s.Stands(in, peer, ext)
		s.Arrives(in, s.PeerSocket(lab.PeerA, 5070+port), ext)
	}
	if n := len(s.List()); n != 3 {
		t.Errorf("%d permissions", n)
	}
	ruleset, err := s.Ruleset()
	s.Must(err)
	if strings.Contains(ruleset, "set excluded_ports") && !strings.Contains(ruleset, "elements = { 5060, 10000-20000 }") {
		t.Error(ruleset)
	}
}

func TestGatewaySocketKeepsItsPackets(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, addr := range map[string]netip.Addr{
		"wildcard":     netip.IPv4Unspecified(),
		"own address":  netip.MustParseAddr("198.51.100.1"),
		"dual stacked": netip.IPv6Unspecified(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := play(t, lab.Options{})                                                  // the next reconcile is too late, except for nft alone
			s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "120")) // the flow lasts until that reconcile
			own := s.Socket(s.Gateway.Namespace, addr, 5060)
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, proxy)
			p := s.Listed(phone, proxy, ext, "refused")
			if p.Reason != "local_socket" {
				t.Errorf("reason %q", p.Reason)
			}
			s.Arrives(own, s.PeerSocket(lab.PeerA, 5070), ext)
			if in := s.InKernel(); len(in) > 0 {
				t.Errorf("permissions: %q", in)
			}
		})
	}
}

func TestPermissionStandsWhenTheGatewaySocketIsGone(t *testing.T) {
	s := newScene(t, lab.Options{})
	own := s.Socket(s.Gateway.Namespace, s.Gateway.Addr, 5060)
	s.Start("--subnet", lab.InsideNet.String(), "--reconcile", "1s", "--lifetime", "20s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Listed(phone, proxy, ext, "refused")
	s.Must(own.Close())
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
}

// Conntrack has forgotten the flow of a connected socket, which still waits for its peer.
//
// Fails when the expectation takes the peer's packets.
func TestConnectedGatewaySocketKeepsItsPackets(t *testing.T) {
	for _, mode := range [][]string{stage.Expect, stage.NFT} {
		stage.InModes(t, [][]string{mode}, func(t *testing.T, mode ...string) {
			s := newScene(t, lab.Options{})
			own := s.Socket(s.Gateway.Namespace, s.Gateway.Addr, 5060)
			peer := s.PeerSocket(lab.PeerA, 5070)
			raw, err := own.SyscallConn()
			s.Must(err)
			s.Must(raw.Control(func(fd uintptr) {
				err = unix.Connect(int(fd), &unix.SockaddrInet4{Port: 5070, Addr: lab.PeerA.As4()})
			}))
			s.Must(err)
			s.Start(stage.Flags(mode, "--reconcile", "1s")...)
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, proxy)
			if slices.Equal(mode, stage.NFT) {
				s.Stands(phone, proxy, ext)
			} else if p := s.Listed(phone, proxy, ext, "refused"); p.Reason != "local_socket" {
				t.Errorf("reason %q", p.Reason)
			}
			s.Arrives(own, peer, ext)
			s.Must(own.Close())
			s.Stands(phone, proxy, ext)
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
		})
	}
}

// No event reports the flow, because the guard lets the peer's packet pass to the socket.
func TestFlowToAGatewaySocketThatIsGoneEnds(t *testing.T) {
	s := newScene(t, lab.Options{})
	own := s.Socket(s.Gateway.Namespace, s.Gateway.Addr, 5060)
	s.Start("--subnet", lab.InsideNet.String(), "--reconcile", "1s", "--lifetime", "20s")
	phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	ext := s.Contact(phone, proxy)
	s.Listed(phone, proxy, ext, "refused")
	s.Arrives(own, media, ext)
	s.Must(own.Close())
	s.Stands(phone, proxy, ext)
	s.Until("the flow to the gateway is gone", func() bool { return s.GetsIn(phone, media, ext) })
}

func TestGatewaySocketThatComesLaterIsServedAfterTheNextReconcile(t *testing.T) {
	s := play(t, lab.Options{}, "--reconcile", "1s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	own := s.Socket(s.Gateway.Namespace, s.Gateway.Addr, 5060)
	s.Listed(phone, proxy, ext, "refused")
	s.Arrives(own, s.PeerSocket(lab.PeerA, 5070), ext)
}

func TestExcludedPeerPortGivesNoPermission(t *testing.T) {
	s := play(t, lab.Options{})
	host, dns, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 53), s.PeerSocket(lab.PeerB, 5060)
	ext := s.Contact(host, dns)
	s.Stands(host, proxy, s.Contact(host, proxy))
	s.Lost(host, s.PeerSocket(lab.PeerA, 5070), ext, dns)
	if n := s.Status().Counters.Skipped["excluded_peer_port"]; n != 1 {
		t.Errorf("%d flows skipped, want 1", n)
	}
}

// IPv6 is off unless a subnet names it: our rules do not mention it, and the gateway
// still refuses packets to a closed port.
//
// Fails when the guard, or a chain for expectations, matches all families.
func TestFamilyThatIsNotEnabledIsLeftAlone(t *testing.T) {
	s := play(t, lab.Options{IPv6: true})
	in, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	s.Stands(in, peer, s.Contact(in, peer))
	s.Must(s.Outside.Do(func() error {
		c, err := net.Dial("udp", "[2001:db8:ffff::1]:5060")
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(stage.Patience())); err != nil {
			return err
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
			return fmt.Errorf("the port is not refused: %w", err)
		}
		return nil
	}))
	list, err := s.Gateway.Output("nft", "list", "table", "inet", "conenat")
	s.Must(err)
	before, after, ok := strings.Cut(list, "set revoked {") // it has IPv4 addresses as IPv6 ones; no rule uses it
	if _, rest, _ := strings.Cut(after, "}"); !ok || strings.Contains(before+rest, "ip6") || strings.Contains(before+rest, "ipv6") {
		t.Error(list)
	}
}
