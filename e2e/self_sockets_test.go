package e2e

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// The PBX moves from the gateway to an inside host with the same outside endpoint, where the
// proxy reaches it.
//
// Fails when the permission outlives its socket: for up to a lifetime it would take the host's
// packets.
func TestSelfEndsWithItsSocket(t *testing.T) {
	stage.NeedsExpect(t)
	stage.InModes(t, [][]string{stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Rules: ofSelf})
		s.Serve(append(slices.Clone(mode), "--self", "--reconcile=1s")...)
		p := s.newPBX(s.Gateway.Addr)
		s.reached(p)
		s.Must(p.Close())
		moved := s.InsideSocket(0, 5060)
		if ext := s.Contact(moved, s.another(p)); ext != p.Addr() {
			t.Fatalf("the host has %v", ext)
		}
		s.Stands(moved, p.proxy, p.Addr())
		s.Arrives(moved, s.another(p), p.Addr())
		s.Verified()
	})
}

// The rules translate the PBX's packets to another address of the gateway, as for a second
// uplink. Its socket is bound to all addresses, so it gets the proxy's packets there.
//
// Fails when that socket conflicts with the permission, and when a socket bound to the same
// port at the outside address alone does not.
func TestSelfSendsByAnotherAddress(t *testing.T) {
	stage.NeedsExpect(t)
	other := netip.MustParseAddr("198.51.100.7")
	rules := lab.DropPolicy + "table ip n { chain c { type nat hook postrouting priority srcnat; " +
		`oifname "wan0" snat to ` + other.String() + "; }; }\n"
	setUp := func(t *testing.T, mode []string, addr netip.Addr) (*scene, *pbx) {
		s := newScene(t, lab.Options{Rules: rules})
		s.IP(s.Gateway, "address add "+other.String()+"/24 dev wan0")
		s.Serve(append(slices.Clone(mode), "--self", "--reconcile=1s")...)
		return s, &pbx{
			Socket: s.Socket(s.Gateway.Namespace, addr, 5060),
			proxy:  s.PeerSocket(lab.PeerA, 5060), stranger: s.PeerSocket(lab.PeerB, 5060), free: 5070,
		}
	}
	is := func(s *scene, state, reason string) func() bool {
		return func() bool {
			return slices.ContainsFunc(s.List(), func(x control.Permission) bool {
				return x.Int == netip.AddrPortFrom(s.Gateway.Addr, 5060) && x.Ext.Addr() == other && x.State == state && x.Reason == reason
			})
		}
	}
	stage.InModes(t, [][]string{stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
		for _, all := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			s, p := setUp(t, mode, all)
			ext := s.Contact(p.Socket, p.proxy)
			s.Until("it stands", is(s, "standing", ""))
			s.Arrives(p.Socket, s.another(p), ext)
			phone := s.InsideSocket(0, 5090)
			taken := s.Contact(phone, p.proxy)
			s.Stands(phone, p.proxy, taken)
			s.Socket(s.Gateway.Namespace, taken.Addr(), taken.Port())
			s.Listed(phone, p.proxy, taken, "refused") // the daemon has looked at sockets
			if !is(s, "standing", "")() {
				t.Errorf("a look at the sockets ended it: %+v", s.List())
			}
			s.Arrives(p.Socket, s.another(p), ext)
			s.Lost(p.Socket, p.stranger, ext, p.proxy)
			s.Verified()
		}
		s, p := setUp(t, mode, netip.MustParseAddr("198.51.100.1"))
		s.Socket(s.Gateway.Namespace, other, 5060)
		s.Contact(p.Socket, p.proxy)
		s.Until("it is refused", is(s, "refused", "local_socket"))
	})
}

// A program contacts more peers, one after another, than its port may have expectations.
//
// Fails when permissions without a flow keep a new peer from getting one.
func TestSelfMakesRoomForNewPeers(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{Rules: ofSelf})
	s.Serve("--self")
	p := s.newPBX(s.Gateway.Addr)
	for i := range 64 {
		peer := s.PeerSocket(netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)}), 5060)
		s.Stands(p.Socket, peer, s.Contact(p.Socket, peer))
	}
	s.Contact(p.Socket, p.proxy)
	if got := s.Listed(p.Socket, p.proxy, p.Addr(), "refused").Reason; got != "peers_on_port" {
		t.Errorf("refused for %q", got)
	}
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5060")
	s.Must(err)
	s.reached(p)
}
