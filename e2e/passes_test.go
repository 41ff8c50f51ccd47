package e2e

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// daemonStates bring a daemon into states in which an outside port may pass to another inside host.
var daemonStates = map[string]func(s *stage.Scene){
	"running": func(*stage.Scene) {},
	"stopped": func(s *stage.Scene) { s.Must(s.Daemon.Pause()) },
	"dead":    (*stage.Scene).Kill,
}

// onePort returns two inside hosts that send from one port. The former has sent to the proxy by ext, and
// his permission stands.
func onePort(s *stage.Scene) (former, next, proxy *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	former, next, proxy = s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext = s.Contact(former, proxy)
	s.Stands(former, proxy, ext)
	return former, next, proxy, ext
}

// An outside port passes to another inside host while the old host's permission still
// stands. The peer sends at once, from another port, and reaches the new host, whether
// the daemon runs, is stopped or dead. Nothing goes to the old host.
//
// Fails when chain learn keeps an element of another host, and, with a running daemon,
// when the model revokes the old permission before it grants the new one.
func TestNFTPortPassesToAnotherHost(t *testing.T) {
	t.Parallel() // mostly it waits
	for _, mode := range [][]string{
		stage.NFT,
		stage.Auto,
		append(stage.Auto, "--peer-group=203.0.113.0/24"),
		append(stage.NFT, "--filtering=endpoint_independent"),
	} {
		for state, to := range daemonStates {
			t.Run(mode[len(mode)-1]+"/"+state, func(t *testing.T) {
				s := stage.New(t, lab.Options{Inside: 2})
				s.Start(stage.Flags(mode)...)
				former, next := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
				proxy := s.PeerSocket(lab.PeerA, 5060)
				ext := s.Contact(former, proxy)
				s.Until("it stands", func() bool { return len(s.List()) == 1 && s.List()[0].State == "standing" })
				to(s)
				for i := range uint16(10) {
					_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5060")
					s.Must(err)
					if got := s.Contact(next, proxy); got != ext {
						t.Fatalf("the next host has %v, the former had %v", got, ext)
					}
					s.Arrives(next, s.PeerSocket(lab.PeerA, 5070+i), ext)
					former, next = next, former
				}
			})
		}
	}
}

// The same with permissions that are expectations, which conenatd alone passes on: what the peer
// sends once the new host's permission stands reaches that host.
//
// Fails when the old host's expectation stays, or the new host gets none.
func TestExpectationPassesToAnotherHost(t *testing.T) {
	t.Parallel() // mostly it waits
	for _, tc := range []struct {
		mode     []string
		rules    string
		carriers string
	}{
		{stage.Expect, lab.Masquerade + lab.DropPolicy, "expect"},
		{stage.Auto, lab.Masquerade + lab.DropPolicy, "expect+nft"},
		{stage.Auto, lab.Masquerade + early("mangle", "ct state new"), "expect"},
	} {
		t.Run(tc.mode[0]+" "+tc.carriers, func(t *testing.T) {
			s := stage.New(t, lab.Options{Inside: 2, Rules: tc.rules})
			s.Start(stage.Flags(tc.mode)...)
			former, next, proxy, ext := onePort(s)
			for i := range uint16(10) {
				_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5060")
				s.Must(err)
				if got := s.Contact(next, proxy); got != ext {
					t.Fatalf("the next host has %v, the former had %v", got, ext)
				}
				s.Stands(next, proxy, ext)
				s.Arrives(next, s.PeerSocket(lab.PeerA, 5070+i), ext)
				if p := s.List(); len(p) != 1 || p[0].Backend != tc.carriers {
					t.Fatalf("%+v, want the next host's alone", p)
				}
				former, next = next, former
			}
			s.Verified()
		})
	}
}
