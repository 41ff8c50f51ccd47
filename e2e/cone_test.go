package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// The question of 2003: the proxy answers from another port.
func TestPeerAnswersFromAnyPortAndNobodyElseDoes(t *testing.T) {
	s := play(t, lab.Options{})
	phone := s.inside(0, 5060)
	proxy := s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)

	for _, port := range []uint16{5070, 1, 1024, 53, 65535} {
		s.arrives(phone, s.peer(lab.PeerA, port), ext)
	}
	s.arrives(phone, proxy, ext)
	for _, stranger := range []netip.Addr{lab.PeerB, lab.PeerC, s.Outside.Addr} {
		if stranger == lab.PeerA {
			continue
		}
		s.lost(phone, s.peer(stranger, 5060), ext, proxy)
	}
	// The permission is for this outside port only.
	other := netip.AddrPortFrom(ext.Addr(), ext.Port()+1)
	if err := lab.Lost(phone,
		lab.Packet{From: s.peer(lab.PeerA, 5071), To: other, Payload: payload("other outside port")},
		lab.Packet{From: proxy, To: ext, Payload: payload("fence")}); err != nil {
		t.Error(err)
	}
}

func TestChildIsATwoWayFlow(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 7078)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	s.arrives(phone, media, ext)
	p := payload("reply to child")
	s.must(phone.Send(media.Addr(), p))
	from, err := media.Expect(p)
	s.must(err)
	if from != ext {
		t.Errorf("the reply to a child comes from %v, want %v", from, ext)
	}
}

func TestTwoPeersHaveAPermissionEach(t *testing.T) {
	s := play(t, lab.Options{})
	phone, a, b := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerB, 5060)
	extA := s.contact(phone, a)
	s.stands(phone, a, extA)
	s.lost(phone, s.peer(lab.PeerB, 5070), extA, a)
	extB := s.contact(phone, b)
	s.stands(phone, b, extB)
	s.arrives(phone, s.peer(lab.PeerA, 5071), extA)
	s.arrives(phone, s.peer(lab.PeerB, 5071), extB)
	s.lost(phone, s.peer(lab.PeerC, 5071), extB, b)
}

func TestTwoInsideHostsHaveAMappingEach(t *testing.T) {
	s := play(t, lab.Options{Inside: 2})
	one, two, proxy := s.inside(0, 5060), s.inside(1, 5061), s.peer(lab.PeerA, 5060)
	extOne, extTwo := s.contact(one, proxy), s.contact(two, proxy)
	s.stands(one, proxy, extOne)
	s.stands(two, proxy, extTwo)
	s.arrives(one, s.peer(lab.PeerA, 5070), extOne)
	s.arrives(two, s.peer(lab.PeerA, 5071), extTwo)
}

// Both hosts use port 3074 towards one peer: NAT moves the second.
func TestPortMovedByAClash(t *testing.T) {
	s := play(t, lab.Options{Inside: 2})
	one, two, peer := s.inside(0, 3074), s.inside(1, 3074), s.peer(lab.PeerA, 3074)
	extOne, extTwo := s.contact(one, peer), s.contact(two, peer)
	if extOne == extTwo {
		t.Fatalf("both have %v", extOne)
	}
	s.stands(one, peer, extOne)
	s.stands(two, peer, extTwo)
	s.arrives(one, s.peer(lab.PeerA, 5070), extOne)
	s.arrives(two, s.peer(lab.PeerA, 5071), extTwo)
}

func TestPortMovedByARange(t *testing.T) {
	s := play(t, lab.Options{Rules: lab.MasqueradeRange(50000, 50999)})
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	if ext.Port() < 50000 || ext.Port() > 50999 {
		t.Fatalf("outside port %d is not in the range", ext.Port())
	}
	s.stands(phone, proxy, ext)
	s.arrives(phone, s.peer(lab.PeerA, 5070), ext)
	s.lost(phone, s.peer(lab.PeerB, 5060), ext, proxy)
}

func TestSNATToAFixedAddress(t *testing.T) {
	fixed := netip.MustParseAddr("198.51.100.77")
	s := newScene(t, lab.Options{Rules: lab.SNATTo(fixed)})
	_, err := s.Gateway.Output("ip", "address", "add", fixed.String()+"/32", "dev", "wan0")
	s.must(err)
	s.start("--subnet", lab.InsideNet.String())
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	if ext.Addr() != fixed {
		t.Fatalf("outside address is %v, want %v", ext.Addr(), fixed)
	}
	s.stands(phone, proxy, ext)
	s.arrives(phone, s.peer(lab.PeerA, 5070), ext)
	s.lost(phone, s.peer(lab.PeerB, 5060), ext, proxy)
}

// Two hosts share an outside port towards different peers (port overloading);
// then the second one calls the first one's peer. The kernel moves that flow,
// so nobody takes anything over.
func TestSharedOutsidePortKeepsItsOwners(t *testing.T) {
	s := play(t, lab.Options{Inside: 2})
	one, two := s.inside(0, 3074), s.inside(1, 3074)
	a, b := s.peer(lab.PeerA, 3074), s.peer(lab.PeerB, 3074)
	extOne, extTwo := s.contact(one, a), s.contact(two, b)
	if extOne != extTwo {
		t.Fatalf("ports are not shared: %v %v", extOne, extTwo)
	}
	s.stands(one, a, extOne)
	s.stands(two, b, extTwo)
	s.arrives(one, s.peer(lab.PeerA, 5070), extOne)
	s.arrives(two, s.peer(lab.PeerB, 5070), extTwo)

	// Another port of the first one's peer: the kernel shares ext:P again, and
	// the owner keeps his permission.
	a2 := s.peer(lab.PeerA, 3075)
	if ext := s.contact(two, a2); ext != extOne {
		t.Fatalf("the kernel gave %v, want the shared %v", ext, extOne)
	}
	s.listed(two, a2, extOne, "waiting")
	s.arrives(one, s.peer(lab.PeerA, 5071), extOne)
	if st := s.status(); st.Counters.Conflicts == 0 {
		t.Error("the conflict is not counted")
	}
}

// Children inherit the connmark of the flow that earned the permission, so that
// policy routing and shaping by mark go on working.
func TestConnmarkIsInherited(t *testing.T) {
	s := play(t, lab.Options{Rules: lab.Masquerade + `table ip mangle {
	chain forward {
		type filter hook forward priority mangle;
		iifname "lan0" ct state new ct mark set 0x2a
	}
}
`})
	phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5070)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	s.arrives(phone, media, ext)
	child := fmt.Sprintf("sport=%d dport=%d", media.Addr().Port(), ext.Port())
	for _, l := range s.conntrack("-p", "udp") {
		if strings.Contains(l, child) {
			if !strings.Contains(l, "mark=42") {
				t.Errorf("the child has not the mark 42: %s", l)
			}
			return
		}
	}
	t.Errorf("no child %q\n%s", child, s.dump())
}

func TestIPv6RoutedPeerAnswersFromAnyPort(t *testing.T) {
	needsExpect(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy})
	s.start("--subnet", lab.InsideNet6.String(), "--routed")
	h := s.Inside(0)
	phone := s.socket(h.Namespace, h.Addr6, 5060)
	proxy := s.socket(s.Outside.Namespace, lab.Peer6A, 5060)
	ext := s.contact(phone, proxy)
	if ext != phone.Addr() {
		t.Fatalf("outside endpoint is %v, want the untranslated %v", ext, phone.Addr())
	}
	s.stands(phone, proxy, ext)
	s.arrives(phone, s.socket(s.Outside.Namespace, lab.Peer6A, 5070), ext)
	s.lost(phone, s.socket(s.Outside.Namespace, lab.Peer6B, 5070), ext, proxy)
}

func TestIPv4RoutedPeerAnswersFromAnyPort(t *testing.T) {
	needsExpect(t)
	s := newScene(t, lab.Options{Rules: "table ip nat {\n\tchain p { type nat hook postrouting priority srcnat; }\n}\n" + lab.DropPolicy})
	_, err := s.Outside.Output("ip", "route", "add", lab.InsideNet.String(), "via", "198.51.100.1")
	s.must(err)
	s.start("--subnet", lab.InsideNet.String(), "--routed")
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	s.arrives(phone, s.peer(lab.PeerA, 5070), ext)
	s.lost(phone, s.peer(lab.PeerB, 5060), ext, proxy)
}
