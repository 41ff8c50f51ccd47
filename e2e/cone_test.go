package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// The question of 2003: the proxy answers from another port.
func TestPeerAnswersFromAnyPortAndNobodyElseDoes(t *testing.T) {
	s := play(t, lab.Options{})
	phone := s.InsideSocket(0, 5060)
	proxy := s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)

	for _, port := range []uint16{5070, 1, 1024, 53, 65535} {
		s.Arrives(phone, s.PeerSocket(lab.PeerA, port), ext)
	}
	s.Arrives(phone, proxy, ext)
	for _, stranger := range []netip.Addr{lab.PeerB, lab.PeerC, s.Outside.Addr} {
		if stranger == lab.PeerA {
			continue
		}
		s.Lost(phone, s.PeerSocket(stranger, 5060), ext, proxy)
	}
	// The permission is for this outside port only.
	other := netip.AddrPortFrom(ext.Addr(), ext.Port()+1)
	if err := lab.Lost(phone,
		lab.Packet{From: s.PeerSocket(lab.PeerA, 5071), To: other, Payload: stage.Payload("other outside port")},
		lab.Packet{From: proxy, To: ext, Payload: stage.Payload("fence")}); err != nil {
		t.Error(err)
	}
}

func TestChildIsATwoWayFlow(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 7078)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, media, ext)
	p := stage.Payload("reply to child")
	s.Must(phone.Send(media.Addr(), p))
	from, err := media.Expect(p)
	s.Must(err)
	if from != ext {
		t.Errorf("the reply to a child comes from %v, want %v", from, ext)
	}
}

func TestTwoPeersHaveAPermissionEach(t *testing.T) {
	s := play(t, lab.Options{})
	phone, a, b := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
	extA := s.Contact(phone, a)
	s.Stands(phone, a, extA)
	s.Lost(phone, s.PeerSocket(lab.PeerB, 5070), extA, a)
	extB := s.Contact(phone, b)
	s.Stands(phone, b, extB)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), extA)
	s.Arrives(phone, s.PeerSocket(lab.PeerB, 5071), extB)
	s.Lost(phone, s.PeerSocket(lab.PeerC, 5071), extB, b)
}

func TestTwoInsideHostsHaveAMappingEach(t *testing.T) {
	s := play(t, lab.Options{Inside: 2})
	one, two, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061), s.PeerSocket(lab.PeerA, 5060)
	extOne, extTwo := s.Contact(one, proxy), s.Contact(two, proxy)
	s.Stands(one, proxy, extOne)
	s.Stands(two, proxy, extTwo)
	s.Arrives(one, s.PeerSocket(lab.PeerA, 5070), extOne)
	s.Arrives(two, s.PeerSocket(lab.PeerA, 5071), extTwo)
}

// Both hosts use port 3074 towards one peer: NAT moves the second.
func TestPortMovedByAClash(t *testing.T) {
	s := play(t, lab.Options{Inside: 2})
	one, two, peer := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074), s.PeerSocket(lab.PeerA, 3074)
	extOne, extTwo := s.Contact(one, peer), s.Contact(two, peer)
	if extOne == extTwo {
		t.Fatalf("both have %v", extOne)
	}
	s.Stands(one, peer, extOne)
	s.Stands(two, peer, extTwo)
	s.Arrives(one, s.PeerSocket(lab.PeerA, 5070), extOne)
	s.Arrives(two, s.PeerSocket(lab.PeerA, 5071), extTwo)
}

func TestPortMovedByARange(t *testing.T) {
	s := play(t, lab.Options{Rules: lab.MasqueradeRange(50000, 50999)})
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	if ext.Port() < 50000 || ext.Port() > 50999 {
		t.Fatalf("outside port %d is not in the range", ext.Port())
	}
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Lost(phone, s.PeerSocket(lab.PeerB, 5060), ext, proxy)
}

func TestSNATToAFixedAddress(t *testing.T) {
	fixed := netip.MustParseAddr("198.51.100.77")
	s := newScene(t, lab.Options{Rules: lab.SNATTo(fixed)})
	_, err := s.Gateway.Output("ip", "address", "add", fixed.String()+"/32", "dev", "wan0")
	s.Must(err)
	s.Start("--subnet", lab.InsideNet.String())
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	if ext.Addr() != fixed {
		t.Fatalf("outside address is %v, want %v", ext.Addr(), fixed)
	}
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Lost(phone, s.PeerSocket(lab.PeerB, 5060), ext, proxy)
}

// Two hosts share an outside port towards different peers (port overloading); then
// the second host calls the first one's peer from that port. The second host waits,
// and the first keeps its permission until that is revoked.
func TestSharedOutsidePortKeepsItsOwners(t *testing.T) {
	s := play(t, lab.Options{Inside: 2})
	one, two := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074)
	a, b := s.PeerSocket(lab.PeerA, 3074), s.PeerSocket(lab.PeerB, 3074)
	extOne, extTwo := s.Contact(one, a), s.Contact(two, b)
	if extOne != extTwo {
		t.Fatalf("ports are not shared: %v %v", extOne, extTwo)
	}
	s.Stands(one, a, extOne)
	s.Stands(two, b, extTwo)
	s.Arrives(one, s.PeerSocket(lab.PeerA, 5070), extOne)
	s.Arrives(two, s.PeerSocket(lab.PeerB, 5070), extTwo)

	// Another port of the first host's peer: the kernel shares ext:P again, and the
	// first host keeps its permission.
	a2 := s.PeerSocket(lab.PeerA, 3075)
	if ext := s.Contact(two, a2); ext != extOne {
		t.Fatalf("the kernel gave %v, want the shared %v", ext, extOne)
	}
	s.Listed(two, a2, extOne, "waiting")
	s.Arrives(one, s.PeerSocket(lab.PeerA, 5071), extOne)
	if st := s.Status(); st.Counters.Conflicts == 0 {
		t.Error("the conflict is not counted")
	}

	// After a revoke the first host's flow goes on, and the second host gets the
	// permission at once.
	if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, one.Addr().String(), lab.PeerA.String()); code != 0 {
		t.Errorf("exit %d, %q", code, out)
	}
	s.Stands(two, a2, extOne)
	s.Arrives(two, s.PeerSocket(lab.PeerA, 5072), extOne)
	s.Arrives(one, a, extOne)
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
	phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, media, ext)
	child := fmt.Sprintf("sport=%d dport=%d", media.Addr().Port(), ext.Port())
	for _, l := range s.ConntrackList("-p", "udp") {
		if strings.Contains(l, child) {
			if !strings.Contains(l, "mark=42") {
				t.Errorf("the child has not the mark 42: %s", l)
			}
			return
		}
	}
	t.Errorf("no child %q\n%s", child, s.Dump())
}

func TestIPv6RoutedPeerAnswersFromAnyPort(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy})
	s.Start("--subnet", lab.InsideNet6.String(), "--routed")
	h := s.Inside(0)
	phone := s.Socket(h.Namespace, h.Addr6, 5060)
	proxy := s.Socket(s.Outside.Namespace, lab.Peer6A, 5060)
	ext := s.Contact(phone, proxy)
	if ext != phone.Addr() {
		t.Fatalf("outside endpoint is %v, want the untranslated %v", ext, phone.Addr())
	}
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.Socket(s.Outside.Namespace, lab.Peer6A, 5070), ext)
	s.Lost(phone, s.Socket(s.Outside.Namespace, lab.Peer6B, 5070), ext, proxy)
}

func TestIPv4RoutedPeerAnswersFromAnyPort(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{Rules: "table ip nat {\n\tchain p { type nat hook postrouting priority srcnat; }\n}\n" + lab.DropPolicy})
	_, err := s.Outside.Output("ip", "route", "add", lab.InsideNet.String(), "via", "198.51.100.1")
	s.Must(err)
	s.Start("--subnet", lab.InsideNet.String(), "--routed")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Lost(phone, s.PeerSocket(lab.PeerB, 5060), ext, proxy)
}
