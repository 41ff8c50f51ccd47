package e2e

import (
	"encoding/json"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// explained checks the verdict of "conenatd explain", and which step decides.
func (s *scene) explained(peer string, ext netip.AddrPort, verdict, step string, to netip.AddrPort) {
	s.T.Helper()
	var x control.Explanation
	out, code := s.CLI("explain", "--json", peer, ext.String())
	if err := json.Unmarshal([]byte(out), &x); err != nil || code != 0 {
		s.T.Fatalf("exit %d, %v: %s", code, err, out)
	}
	if last := x.Steps[len(x.Steps)-1].ID; x.Verdict != verdict || last != step || x.To != to {
		s.T.Errorf("want %s by %s at %v:\n%s", verdict, step, to, out)
	}
}

// explainedArrives checks that packets of from arrive at in, as explain says, whether it is asked for
// any port, or for this one before and after the first packet.
func (s *scene) explainedArrives(in, from *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	s.explained(from.Addr().Addr().String(), ext, "arrives", "firewall", in.Addr())
	s.explained(from.Addr().String(), ext, "arrives", "firewall", in.Addr())
	s.Arrives(in, from, ext)
	s.explained(from.Addr().String(), ext, "arrives", "firewall", in.Addr()) // an unanswered flow
	s.Arrives(in, from, ext)
	text := stage.Payload("reply")
	s.Must(in.Send(from.Addr(), text))
	_, err := from.Expect(text)
	s.Must(err)
	s.explained(from.Addr().String(), ext, "arrives", "flow", in.Addr())
	s.Arrives(in, from, ext)
}

var nowhere netip.AddrPort

func ownMode(t *testing.T) {
	t.Helper()
	stage.OfTheDaemon(t)
	if os.Getenv(stage.ModeEnv) != "" {
		t.Skip("it chooses its backends itself")
	}
}

// Each packet goes where explain says.
//
// Fails when a verdict, or the step that decides, is not the kernel's.
func TestExplainIsRight(t *testing.T) {
	for name, tt := range map[string]struct{ rules, backend string }{
		"the map": {lab.Masquerade, "auto"}, "expectations": {lab.Masquerade + lab.DropPolicy, "auto"}, "expectations alone": {lab.Masquerade, "expect"},
	} {
		t.Run(name, func(t *testing.T) {
			ownMode(t)
			s := newScene(t, lab.Options{Inside: 2, Rules: tt.rules})
			s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s", "--backend="+tt.backend)
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)
			s.explained(proxy.Addr().String(), ext, "arrives", "flow", phone.Addr())
			s.Arrives(phone, proxy, ext)
			s.explainedArrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)

			stranger := s.PeerSocket(lab.PeerC, 5070)
			s.explained(lab.PeerC.String(), ext, "lost", "map", nowhere)
			s.Lost(phone, stranger, ext, proxy)
			unused := replacePort(ext, 5999)
			s.explained(lab.PeerA.String(), unused, "lost", "map", nowhere)
			s.Must(lab.Lost(phone,
				lab.Packet{From: s.PeerSocket(lab.PeerA, 5071), To: unused, Payload: stage.Payload("must not arrive")},
				lab.Packet{From: proxy, To: ext, Payload: stage.Payload("fence")}))
			s.explained(lab.PeerA.String(), netip.MustParseAddrPort("198.51.100.77:5060"), "lost", "address", nowhere)
			s.explained("10.47.11.5", ext, "lost", "address", nowhere)

			// A second host with the same outside port waits for its turn.
			other := s.InsideSocket(1, 5060)
			s.Contact(other, s.PeerSocket(lab.PeerC, 5060))
			if at := s.Contact(other, s.PeerSocket(lab.PeerA, 5080)); at == ext {
				s.Listed(other, proxy, ext, "waiting")
			} else {
				t.Errorf("NAT gave it %v", at)
			}
			s.explainedArrives(phone, s.PeerSocket(lab.PeerA, 5072), ext)

			if out, code := s.CLI("revoke", phone.Addr().String()); code != 0 {
				t.Fatal(out)
			}
			s.Until("the other host has its turn", func() bool {
				out, _ := s.CLI("explain", lab.PeerA.String(), ext.String())
				return strings.Contains(out, "ARRIVES at "+other.Addr().String())
			})
			s.explainedArrives(other, s.PeerSocket(lab.PeerA, 5073), ext)
			if out, code := s.CLI("flush"); code != 0 {
				t.Fatal(out)
			}
			s.explained(lab.PeerA.String(), ext, "lost", "map", nowhere)
			s.Lost(phone, s.PeerSocket(lab.PeerA, 5074), ext, proxy)
			out, _ := s.CLI("explain", lab.PeerA.String(), ext.String())
			if !strings.Contains(out, "is LOST") || !strings.Contains(out, "revoked by command") {
				t.Error(out)
			}
		})
	}
}

// What the gateway forwards and serves itself goes there, before any permission of the map.
//
// Fails when a permission counts for a port that is forwarded or served.
func TestExplainKnowsForwardsAndSockets(t *testing.T) {
	ownMode(t)
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.Masquerade + `table ip forwards {
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		iifname "wan0" udp dport 6000 dnat to 10.47.11.110
		iifname "wan0" ip saddr 203.0.113.6 udp dport 6001 dnat to 10.47.11.110:6100
		iifname "wan0" ip saddr 203.0.113.6 udp sport 7003 udp dport 6003 dnat to 10.47.11.110:6103
	}
}
`})
	s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s")
	ext := s.Contact(s.InsideSocket(0, 6000), s.PeerSocket(lab.PeerA, 6000))
	other := s.InsideSocket(1, 6000)
	s.explained(lab.PeerA.String(), ext, "forwarded", "forward", other.Addr())
	s.Arrives(other, s.PeerSocket(lab.PeerA, 7000), ext)

	// Rules with other conditions than on outside ports, addresses and links are not evaluated to
	// the end.
	proxy := s.PeerSocket(lab.PeerB, 6001)
	first, second := s.InsideSocket(1, 6100), s.InsideSocket(1, 6103)
	for port, want := range map[uint16]struct {
		verdict, step string
		to            netip.AddrPort
		at            *lab.Socket
	}{
		6001: {"forwarded", "forward", first.Addr(), first},
		6003: {"unknown", "firewall", nowhere, second},
	} {
		phone := s.InsideSocket(0, port)
		ext = s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.explained(lab.PeerB.String(), ext, want.verdict, want.step, want.to)
		peer := s.PeerSocket(lab.PeerB, port+1000)
		s.Arrives(want.at, peer, ext)
		peer.Close()
		phone.Close()
	}
	phone := s.InsideSocket(0, 6001)
	proxy = s.PeerSocket(lab.PeerA, 6001)
	ext = s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.explainedArrives(phone, s.PeerSocket(lab.PeerA, 7001), ext) // the rule is for another peer

	served := s.Socket(s.Gateway.Namespace, s.Gateway.Addr, 6002)
	at := served.Addr()
	s.explained(lab.PeerA.String(), at, "gateway", "socket", nowhere)
	from := s.PeerSocket(lab.PeerA, 7002)
	s.Arrives(served, from, at)
	s.explained(from.Addr().String(), at, "gateway", "flow", at)
	s.Arrives(served, from, at)
}

// Fails when the user's forward chain is not asked, or not for the kind of the child.
func TestExplainKnowsTheFirewall(t *testing.T) {
	ownMode(t)
	for name, tt := range map[string]struct{ rules, backend, verdict string }{
		"drops both":           {lab.Masquerade + established, "auto", "lost"},
		"drops what is DNATed": {lab.Masquerade + lab.DropPolicy, "nft", "lost"},
		"drops one host":       {lab.Masquerade + "table ip f { chain f { type filter hook forward priority 0; ct state new ip daddr 10.47.11.109 drop; }; }\n", "nft", "lost"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Rules: tt.rules})
			s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s", "--backend="+tt.backend)
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)
			s.explained(lab.PeerA.String(), ext, tt.verdict, "firewall", nowhere)
			s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
		})
	}
}

// Fails when explain says that a packet goes where a forward leads it although the firewall drops it
// there, or drops it because of other ports.
func TestExplainKnowsThatTheFirewallDropsAForward(t *testing.T) {
	ownMode(t)
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.Masquerade + lab.DropPolicy + `table ip forwards {
	chain early { type filter hook prerouting priority mangle; udp dport 6003 drop; }
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		iifname "wan0" udp dport 6000-6002 dnat to 10.47.11.110
		iifname "wan0" udp dport 6003 dnat to 10.47.11.110:6002
		iifname "wan0" udp dport 6004 dnat to 10.47.11.110:6003
	}
}
insert rule inet filter forward ip daddr 10.47.11.110 udp dport 6001-6003 accept
insert rule inet filter forward ip daddr 10.47.11.110 ip saddr 203.0.113.6 udp dport 6001 drop
`})
	s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s")
	addr := s.Contact(s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)).Addr()
	for port, want := range map[uint16]struct {
		from netip.Addr
		at   uint16 // at the host; 0: nowhere
	}{
		6000: {lab.PeerA, 0}, 6001: {lab.PeerB, 0}, 6002: {lab.PeerB, 6002}, 6003: {lab.PeerA, 0}, 6004: {lab.PeerA, 6003},
	} {
		ext, host := netip.AddrPortFrom(addr, port), s.InsideSocket(1, max(want.at, 5999+port%100))
		peer := s.PeerSocket(want.from, port+1000)
		for _, from := range []string{want.from.String(), peer.Addr().String()} {
			if want.at == 0 {
				s.explained(from, ext, "lost", "firewall", nowhere)
			} else {
				s.explained(from, ext, "forwarded", "forward", host.Addr())
			}
		}
		if want.at != 0 {
			s.Arrives(host, peer, ext)
			s.explained(peer.Addr().String(), ext, "arrives", "firewall", host.Addr())
		}
		host.Close()
	}
}

// Fails when a rule for some peers counts for none, because most children pass.
func TestExplainDoesNotGuessAboutSomePeers(t *testing.T) {
	ownMode(t)
	s := newScene(t, lab.Options{Rules: lab.Masquerade +
		"table ip f { set blocked { type ipv4_addr; elements = { 203.0.113.5 }; }; chain f { type filter hook forward priority 0; ct state new ip saddr @blocked drop; }; }\n"})
	s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s", "--backend=nft", "--max-children=0")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.explained(lab.PeerA.String(), ext, "unknown", "firewall", phone.Addr())
	s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
}

// Without a limit any number of children is no reason.
//
// Fails when max_children = 0 means that none is allowed.
func TestExplainKnowsThatThereIsNoLimit(t *testing.T) {
	ownMode(t)
	for _, backend := range []string{"expect", "nft"} {
		s := newScene(t, lab.Options{})
		s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s", "--backend="+backend, "--max-children=0")
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.explained(lab.PeerA.String(), ext, "arrives", "firewall", phone.Addr())
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	}
}

// Fails when the limit on children does not count, or counts too early.
func TestExplainKnowsTheLimitOnChildren(t *testing.T) {
	ownMode(t)
	for _, backend := range []string{"expect", "nft"} {
		s := newScene(t, lab.Options{})
		s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s", "--backend="+backend, "--max-children=2")
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		for i := range uint16(2) {
			s.explained(lab.PeerA.String(), ext, "arrives", "firewall", phone.Addr())
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070+i), ext)
			s.Until("the daemon counts it", func() bool { return s.Listed(phone, proxy, ext, "standing").Children == int(i)+1 })
		}
		s.explained(lab.PeerA.String(), ext, "lost", "children", nowhere)
		s.Lost(phone, s.PeerSocket(lab.PeerA, 5079), ext, proxy)
	}
}

// IPv6 is not translated: the outside endpoint is the host's own.
//
// Fails when a host of a routed subnet does not count as one of this gateway.
func TestExplainKnowsRoutedHosts(t *testing.T) {
	ownMode(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy})
	s.Start("--subnet", lab.InsideNet6.String(), "--routed", "--reconcile=1s")
	phone, proxy := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5060), s.Socket(s.Outside.Namespace, lab.Peer6A, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.explainedArrives(phone, s.Socket(s.Outside.Namespace, lab.Peer6A, 5070), ext)
	s.explained(lab.Peer6B.String(), ext, "lost", "firewall", nowhere)
	s.Lost(phone, s.Socket(s.Outside.Namespace, lab.Peer6B, 5070), ext, proxy)
}

// Without a permission the user's firewall decides what reaches a host that is not translated, of
// an enabled subnet or not.
//
// Fails when what the firewall accepts counts as lost, when a rule for another peer, port or host
// decides, and when a subnet that is not enabled counts as nobody's.
func TestExplainLeavesRoutedHostsToTheFirewall(t *testing.T) {
	ownMode(t)
	for name, tt := range map[string]struct {
		rules, subnet string
		arrives       bool
	}{
		"no rules":           {"", lab.InsideNet6.String(), true},
		"no rules, another":  {"", "2001:db8:99::/64", true},
		"a port":             {"meta l4proto udp udp dport 5060 accept", lab.InsideNet6.String(), true},
		"another port":       {"udp dport 5061 accept", lab.InsideNet6.String(), false},
		"a peer":             {"ip6 saddr " + lab.Peer6B.String() + " accept", lab.InsideNet6.String(), true},
		"another peer":       {"ip6 saddr " + lab.Peer6A.String() + " accept", lab.InsideNet6.String(), false},
		"DNATed alone":       {"ct status dnat accept", lab.InsideNet6.String(), false},
		"RELATED alone":      {"ct state established,related accept", lab.InsideNet6.String(), false},
		"a port, by another": {"ip6 daddr 2001:db8:47::/64 udp dport 5060 ct state new accept", "2001:db8:99::/64", true},
	} {
		t.Run(name, func(t *testing.T) {
			rules := lab.Masquerade
			if tt.rules != "" {
				rules += "table ip6 f { chain f { type filter hook forward priority 0; policy drop; " +
					"iifname \"lan0\" accept; ct state established accept; " + tt.rules + "; }; }\n"
			}
			s := newScene(t, lab.Options{IPv6: true, Rules: rules})
			s.Start("--subnet", tt.subnet, "--routed", "--reconcile=1s")
			phone, proxy := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5060), s.Socket(s.Outside.Namespace, lab.Peer6A, 5060)
			ext := s.Contact(phone, proxy)
			peer := s.Socket(s.Outside.Namespace, lab.Peer6B, 5070)
			if !tt.arrives {
				s.explained(lab.Peer6B.String(), ext, "lost", "firewall", nowhere)
				s.explained(peer.Addr().String(), ext, "lost", "firewall", nowhere)
				s.Lost(phone, peer, ext, proxy)
				return
			}
			s.explainedArrives(phone, peer, ext)
		})
	}
}

// Fails when a flow is looked for in zone 0 alone.
func TestExplainFindsFlowsInTheZoneOfThePermission(t *testing.T) {
	ownMode(t)
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{Rules: lab.Masquerade +
		`table inet zones { chain c { type filter hook prerouting priority raw; iifname { "lan0", "wan0" } ct zone set 250; }; }
`})
	s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.explained(proxy.Addr().String(), ext, "arrives", "flow", phone.Addr())
	s.explainedArrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
}

// An outside link accepts packets with addresses of the gateway itself, as for tests of its own links.
//
// Fails when explain says that the kernel drops them, or when it does not where the kernel does.
func TestExplainKnowsLinksThatAcceptOwnAddresses(t *testing.T) {
	ownMode(t)
	s := newScene(t, lab.Options{})
	own := netip.MustParseAddr("192.0.2.99")
	s.IP(s.Gateway, "address add 192.0.2.99/32 dev lo")
	s.Start("--subnet", lab.InsideNet.String(), "--filtering=endpoint_independent", "--reconcile=1s")
	phone, proxy := s.InsideSocket(0, 6000), s.PeerSocket(lab.PeerA, 6000)
	ext := s.Contact(phone, proxy)
	s.Until("the port is open", func() bool { return s.Status().Permissions.Standing == 1 })
	s.IP(s.Outside, "address add 192.0.2.99/32 dev lo")
	from := s.Socket(s.Outside.Namespace, own, 6001)
	s.explained(own.String(), ext, "lost", "address", nowhere)
	s.Lost(phone, from, ext, proxy)
	sets("sysctl -w net.ipv4.conf.wan0.accept_local=1")(s)
	s.explained(own.String(), ext, "arrives", "firewall", phone.Addr())
	s.Arrives(phone, from, ext)
}
