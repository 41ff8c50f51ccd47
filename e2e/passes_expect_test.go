package e2e

import (
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// alone are set-ups in which an expectation says where children go: by the configuration, and because
// the firewall drops new flows before NAT, where the map comes too late.
var alone = map[string]struct {
	mode  []string
	rules string
}{
	"backend expect":  {stage.Expect, lab.Masquerade + lab.DropPolicy},
	"drop before NAT": {stage.Auto, lab.Masquerade + early("mangle", "ct state new")},
}

// An outside port passes to another inside host while no daemon reads of it, and an expectation of
// the old host stands. From the port that the new host sent to, the peer reaches the new host. From
// another port, it reaches the old one: this is what SECURITY.md bounds. Once the daemon reads of
// the flow, the peer reaches the new host from all ports, also from that of a child that slipped in,
// except where the old host has answered.
//
// Fails when the children of the old host's permission stay, and when the expectation goes on
// leading to it.
func TestExpectationAlonePassesOnceTheDaemonReads(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
	states := map[string]struct{ stop, resume func(s *stage.Scene) }{
		"stopped": {
			func(s *stage.Scene) { s.Must(s.Daemon.Pause()) },
			func(s *stage.Scene) { s.Must(s.Daemon.Resume()) },
		},
		"dead": {(*stage.Scene).Kill, nil},
	}
	for name, up := range alone {
		for state, change := range states {
			t.Run(name+"/"+state, func(t *testing.T) {
				s := stage.New(t, lab.Options{Inside: 2, Rules: up.rules})
				s.Start(stage.Flags(up.mode)...)
				former, next, proxy, ext := onePort(s)
				change.stop(s)
				passOn(s, next, proxy)
				s.Arrives(next, proxy, ext)
				child, answered := s.PeerSocket(lab.PeerA, 5070), s.PeerSocket(lab.PeerA, 5072)
				s.Arrives(former, child, ext)
				s.Arrives(former, answered, ext)
				s.Must(lab.Arrives(answered, lab.Packet{From: former, To: answered.Addr(), Payload: stage.Payload("answer")}))
				if change.resume != nil {
					change.resume(s)
				} else {
					s.Start(stage.Flags(up.mode)...)
				}
				s.Stands(next, proxy, ext)
				s.Until("the next host gets it", func() bool { return s.GetsIn(next, child, ext) })
				s.Arrives(next, s.PeerSocket(lab.PeerA, 5071), ext)
				s.Arrives(former, answered, ext)
				s.Verified()
			})
		}
	}
}

// With mapping, an outside port does not pass to another host while the old host's mapping stands.
// So where expectations alone admit peers, too, what a peer sends reaches the host that it is for,
// whether the daemon runs, is stopped or dead.
//
// Fails when the kernel gives the new host the outside port that a mapping owns.
func TestExpectationAlonePassesNothingOnWithMapping(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
	for name, up := range alone {
		for state, to := range daemonStates {
			t.Run(name+"/"+state, func(t *testing.T) {
				s := stage.New(t, lab.Options{Inside: 2, Rules: up.rules})
				s.Start(stage.Flags(up.mode, "--mapping=endpoint_independent")...)
				former, next, proxy, ext := onePort(s)
				to(s)
				_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5060")
				s.Must(err)
				own := s.Contact(next, proxy)
				if own == ext {
					t.Fatalf("the next host has %v, which the old host's mapping owns", own)
				}
				s.Arrives(next, proxy, own)
				s.Arrives(former, s.PeerSocket(lab.PeerA, 5070), ext)
				if s.GetsIn(former, s.PeerSocket(lab.PeerA, 5071), own) {
					t.Error("what is for the next host reaches the old one")
				}
			})
		}
	}
}
