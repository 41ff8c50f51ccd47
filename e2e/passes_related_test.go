package e2e

import (
	"maps"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// relatedAlone are firewalls that accept what is ESTABLISHED or RELATED alone: nothing else gets
// from outside to an inside host, nor to the gateway.
var relatedAlone = map[string]func(s *stage.Scene) error{
	"nft": func(s *stage.Scene) error { return s.NFT(lab.Masquerade + lab.DropPolicy) },
	"iptables-nft": func(s *stage.Scene) error {
		return s.IPTables(lab.IPTablesNFT, lab.IPTablesMasquerade+lab.IPTablesDropPolicy)
	},
	"iptables-legacy": func(s *stage.Scene) error {
		return s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+lab.IPTablesDropPolicy)
	},
}

// behind makes a lab with one of relatedAlone as its firewall.
func behind(t *testing.T, firewall string) *stage.Scene {
	t.Helper()
	s := stage.New(t, lab.Options{Inside: 2, Rules: lab.NoRules})
	s.Must(relatedAlone[firewall](s))
	return s
}

// passOn ends the flows to port 5060 of the peer, and lets another host contact it, which gets
// the same outside port.
func passOn(s *stage.Scene, next, peer *lab.Socket) {
	s.T.Helper()
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5060", "--orig-port-dst", "5060")
	s.Must(err)
	s.Contact(next, peer)
}

// An outside port passes to another inside host, behind a firewall that lets children in only
// because an expectation made them RELATED. The peer sends at once, from another port, and
// reaches the new host, whether the daemon runs, is stopped or dead, or left its permissions.
//
// Fails when the expectation says where children go.
func TestPortPassesBehindRelatedAlone(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
	states := maps.Clone(daemonStates)
	states["kept"] = (*stage.Scene).Stop
	for firewall := range relatedAlone {
		for state, to := range states {
			for _, group := range []string{"", "--peer-group=203.0.113.0/29"} {
				t.Run(firewall+"/"+state+group, func(t *testing.T) {
					s := behind(t, firewall)
					s.Start(slices.DeleteFunc(stage.Flags(stage.Auto, "--on-stop=keep", group), func(f string) bool { return f == "" })...)
					former, next := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
					proxy := s.PeerSocket(lab.PeerA, 5060)
					ext := s.Contact(former, proxy)
					s.Until("it stands", func() bool {
						p := s.List()
						return len(p) == 1 && p[0].State == "standing" && p[0].Backend == "expect+nft"
					})
					to(s)
					for i := range uint16(10) {
						passOn(s, next, proxy)
						s.Arrives(next, s.PeerSocket(lab.PeerA, 5070+i), ext)
						former, next = next, former
					}
				})
			}
		}
	}
}

// While the daemon is stopped, the new host sends to another port of the peer, which the kernel does
// not pass on. A child slips in for the old host. It does not stay with that host once the daemon
// has read of the flow.
//
// Fails when the children of the old host's permission stay, and when the expectation goes on
// leading to it.
func TestChildOfTheFormerHostEndsBehindRelatedAlone(t *testing.T) {
	stage.NeedsExpect(t)
	for firewall := range relatedAlone {
		t.Run(firewall, func(t *testing.T) {
			s := behind(t, firewall)
			s.Start(stage.Flags(stage.Auto)...)
			former, next := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
			proxy, other := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5061)
			ext := s.Contact(former, proxy)
			s.Stands(former, proxy, ext)
			s.Must(s.Daemon.Pause())
			passOn(s, next, other)
			child := s.PeerSocket(lab.PeerA, 5070)
			s.Arrives(former, child, ext)
			s.Must(s.Daemon.Resume())
			s.Stands(next, other, ext)
			s.Until("the next host gets it", func() bool { return s.GetsIn(next, child, ext) })
			s.Arrives(next, s.PeerSocket(lab.PeerA, 5071), ext)
			s.Verified()
		})
	}
}

// An expectation stands, and the map has no permission for it, as when somebody deletes an element
// of a dead daemon's. What the peer sends reaches no inside host, and not the gateway either, though
// its firewall accepts what is RELATED.
//
// Fails when nothing drops such a packet.
func TestExpectationWithoutAnElementLetsNothingIn(t *testing.T) {
	stage.NeedsExpect(t)
	for firewall := range relatedAlone {
		t.Run(firewall, func(t *testing.T) {
			s := behind(t, firewall)
			s.Start(stage.Flags(stage.Auto, "--guard=false")...)
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
			s.Kill()
			s.Must(s.NFT("flush map ip conenat permissions"))
			s.Lost(phone, s.PeerSocket(lab.PeerA, 5071), ext, proxy)
			served := s.Socket(s.Gateway.Namespace, ext.Addr(), ext.Port())
			late := s.PeerSocket(lab.PeerA, 5072)
			s.Lost(phone, late, ext, proxy)
			if s.GetsIn(served, late, ext) {
				t.Error("it reaches a socket of the gateway")
			}
		})
	}
}

// Somebody flushes the ruleset of a dead daemon, and loads the firewall again. What the peer sends
// reaches no inside host: nothing leads the packets of its expectation any more. It reaches the
// gateway's own port, if something listens there and the firewall accepts what is RELATED. A
// stranger's does not.
//
// Fails when the expectation translates.
func TestExpectationThatAFlushLeavesLeadsToNoHost(t *testing.T) {
	stage.NeedsExpect(t)
	s := behind(t, "nft")
	s.Start(stage.Flags(stage.Auto)...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Kill()
	s.Must(s.NFT("flush ruleset\n" + lab.Masquerade + lab.DropPolicy))
	late := s.PeerSocket(lab.PeerA, 5071)
	s.Lost(phone, late, ext, proxy)
	served := s.Socket(s.Gateway.Namespace, ext.Addr(), ext.Port())
	s.Arrives(served, s.PeerSocket(lab.PeerA, 5072), ext)
	if s.GetsIn(served, s.PeerSocket(lab.PeerB, 5072), ext) {
		t.Error("a stranger reaches the gateway")
	}
}
