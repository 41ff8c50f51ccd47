package e2e

import (
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// The map's chain runs after the user's forward. The permission stays in the map, is
// shown as refused, and admits again as soon as the forward is gone.
func TestNFTForwardOfTheUsersWins(t *testing.T) {
	for name, tc := range map[string]struct {
		load, unload func(s *scene) error
	}{
		"nft": {
			func(s *scene) error { return s.NFT(lab.Masquerade + forward) },
			func(s *scene) error { return s.NFT("delete table ip forwards") },
		},
		"iptables-legacy": {
			func(s *scene) error {
				return s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+`*nat
-A PREROUTING -i wan0 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.110
COMMIT
`)
			},
			func(s *scene) error { return s.IPTables(lab.IPTablesLegacy, "*nat\n-F PREROUTING\nCOMMIT\n") },
		},
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
				s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
				s.Must(tc.load(s))
				s.Start(stage.Flags(mode)...)
				phone, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
				ext := s.Contact(phone, proxy)
				s.Until("it is listed", func() bool { return len(s.List()) == 1 })
				// Before anybody used the forward.
				s.Arrives(server, s.PeerSocket(lab.PeerA, 5070), ext)
				if p := s.Listed(phone, proxy, ext, "refused"); p.Backend != "nft" {
					t.Errorf("it stands by %q", p.Backend)
				}
				s.Arrives(server, s.PeerSocket(lab.PeerA, 5071), ext)
				s.Arrives(phone, proxy, ext) // its own flow
				s.Must(tc.unload(s))
				s.Listed(phone, proxy, ext, "standing")
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5072), ext)
			})
		})
	}
}

// Without root the daemon learns of the forward from its first flow.
func TestNFTForwardThatIsUsedFirstWins(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
		s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+`*nat
-A PREROUTING -i wan0 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.110
COMMIT
`))
		s.Exe = s.unprivileged()
		s.Start(stage.Flags(mode)...)
		phone, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
		s.Arrives(server, s.PeerSocket(lab.PeerC, 9), netip.AddrPortFrom(s.Gateway.Addr, 5060))
		ext := s.Contact(phone, proxy)
		if p := s.Listed(phone, proxy, ext, "standing"); p.Backend != "nft" {
			t.Errorf("it stands by %q", p.Backend)
		}
		s.Arrives(server, s.PeerSocket(lab.PeerA, 5070), ext)
	})
}

// An unanswered child goes to the forward's host as soon as there is a forward, even if
// its peer never stops sending. Conflicting expectations are removed.
func TestForwardTakesOverUnansweredChildren(t *testing.T) {
	for name, rules := range map[string]string{"map": lab.Masquerade, "expectations": lab.Masquerade + lab.DropPolicy} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 2, Rules: rules}, stage.Auto...)
			phone, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)
			media := s.PeerSocket(lab.PeerA, 5070)
			s.Arrives(phone, media, ext)
			if rules != lab.Masquerade {
				s.Must(s.NFT("insert rule inet filter forward ip daddr 10.47.11.110 accept"))
			}
			s.Must(s.NFT(forward))
			s.Must(s.Daemon.Signal(syscall.SIGHUP))
			s.Until("the forward leads it", func() bool {
				s.Must(media.Send(ext, "taken over"))
				_, _, err := server.Recv(50 * time.Millisecond)
				return err == nil
			})
		})
	}
}

// A firewall script takes the rules away and adds them again. What the peer of a forwarded port
// sends in between is a child, and its host answers it. The forward gets the next packet after it
// is back, however short the gap was.
func TestForwardThatWasAwayTakesAnsweredChildren(t *testing.T) {
	t.Run("noticed", func(t *testing.T) {
		stage.InModes(t, [][]string{stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) { forwardGoesAndReturns(t, true, mode...) })
	})
	t.Run("not noticed", func(t *testing.T) { forwardGoesAndReturns(t, false, stage.Auto...) }) // there was no expectation
	// The kernel hides the flow of the late answer.
	t.Run("not reported", func(t *testing.T) {
		stage.InModes(t, [][]string{slices.Concat(stage.NFT, []string{"--events=lean"})}, func(t *testing.T, mode ...string) { forwardGoesAndReturns(t, false, mode...) })
	})
}

func forwardGoesAndReturns(t *testing.T, noticed bool, mode ...string) {
	s := play(t, lab.Options{Inside: 2, Rules: lab.Masquerade + forward}, mode...)
	if slices.Contains(mode, "--events=lean") {
		s.untilEvents("lean")
	}
	phone, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Listed(phone, proxy, ext, "refused")
	media := s.PeerSocket(lab.PeerA, 5070)
	s.Must(s.NFT("flush chain ip forwards prerouting"))
	if noticed {
		s.Listed(phone, proxy, ext, "standing")
	}
	s.Arrives(phone, media, ext)
	s.Must(phone.Send(media.Addr(), "answer"))
	if _, err := media.Expect("answer"); err != nil {
		t.Fatal(err)
	}
	s.Must(s.NFT(forward))
	s.Until("the forward leads it", func() bool {
		s.Must(media.Send(ext, "taken over"))
		_, _, err := server.Recv(50 * time.Millisecond)
		s.Must(phone.Send(media.Addr(), "answer")) // late, for the phone does not know that the child ended
		return err == nil
	})
}

// A forward of all ports to one host takes every child, and a warning says so.
func TestNFTForwardOfAllPortsWinsAndIsWarnedOf(t *testing.T) {
	const dmz = `table ip dmz {
	chain prerouting {
		type nat hook prerouting priority dstnat;
		iifname "wan0" dnat to 10.47.11.110
	}
}
`
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Inside: 2, Rules: lab.Masquerade + dmz}, mode...)
		phone, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Listed(phone, proxy, ext, "refused")
		s.Arrives(server, s.PeerSocket(lab.PeerA, 5070), ext)
		s.Arrives(phone, proxy, ext)
		if st := s.Status(); !stage.Warned(st, "forwards all ports to 10.47.11.110, so that no peer gets to another inside host") {
			t.Errorf("warnings: %q", st.Warnings)
		}
	})
}

// A forward of all ports that matches only some packets leaves the others to the map.
//
// Fails when the warning says that no peer gets in.
func TestNFTForwardOfAllPortsForSomePeersIsWarnedOfAsSuch(t *testing.T) {
	for _, condition := range []string{"ip saddr 192.0.2.0/24", "meta mark 0x64"} {
		t.Run(condition, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 2, Rules: lab.Masquerade + `table ip dmz {
				chain marks { type filter hook prerouting priority mangle; ip saddr 192.0.2.0/24 meta mark set 0x64; }
				chain prerouting { type nat hook prerouting priority dstnat; iifname "wan0" ` + condition + ` dnat to 10.47.11.110; }
			}`}, stage.Auto...)
			phone, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
			s.Arrives(server, s.PeerSocket(lab.PeerC, 5070), ext)
			if st := s.Status(); !stage.Warned(st, "forwards all ports of what it matches") || stage.Warned(st, "no peer gets") {
				t.Errorf("warnings: %q", st.Warnings)
			}
		})
	}
}

// shared makes two hosts share an outside port: host one calls peer A; host two calls
// peer B, then another port of peer A.
func (s *scene) shared() (one, two, a, a2 *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	one, two = s.InsideSocket(0, 3074), s.InsideSocket(1, 3074)
	a, a2 = s.PeerSocket(lab.PeerA, 3074), s.PeerSocket(lab.PeerA, 3075)
	b := s.PeerSocket(lab.PeerB, 3074)
	ext = s.Contact(one, a)
	s.Stands(one, a, ext)
	if other := s.Contact(two, b); other != ext {
		s.T.Fatalf("ports are not shared: %v %v", ext, other)
	}
	if other := s.Contact(two, a2); other != ext {
		s.T.Fatalf("ports are not shared: %v %v", ext, other)
	}
	return one, two, a, a2, ext
}

func TestNFTSecondHostWaitsForTheFirst(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Inside: 2}, mode...)
		one, two, a, a2, ext := s.shared()
		s.Listed(two, a2, ext, "waiting")
		s.Arrives(one, s.PeerSocket(lab.PeerA, 5070), ext)
		if e := s.entries(); len(e) != 2 || !s.inMap(entryOf(one, a, ext)) {
			t.Errorf("the map has %v", e)
		}
		if n := s.Status().Counters.Conflicts; n != 1 {
			t.Errorf("%d conflicts counted, want 1", n)
		}
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", "10.47.11.109", "--orig-port-src", "3074", "--orig-port-dst", "3074")
		s.Must(err)
		s.Stands(two, a2, ext)
		if !s.inMap(entryOf(two, a2, ext)) {
			t.Errorf("the map has %v", s.entries())
		}
		s.Arrives(two, s.PeerSocket(lab.PeerA, 5071), ext)
	})
}

// The same without a daemon: the second host's packets neither take over the element nor
// keep it alive. Once it has expired, the second host's next packet gets it.
func TestNFTSecondHostDoesNotRefreshTheFirst(t *testing.T) {
	t.Parallel() // mostly it waits
	s := play(t, lab.Options{Inside: 2}, append(stage.NFT, "--lifetime=8s")...)
	one, two, a, a2, ext := s.shared()
	s.Kill()
	last := time.Hour
	s.Until("the second host has it", func() bool {
		// The chain learn looks at one of 64 packets of such a flow, on a slow machine too.
		for range 128 {
			s.Contact(two, a2)
		}
		all := s.entries()
		if left, ok := all[entryOf(one, a, ext)]; ok {
			if left > last {
				t.Fatalf("%v left, and %v after the second host sent", last, left)
			}
			last = left
			return false
		}
		_, ok := all[entryOf(two, a2, ext)]
		return ok
	})
	s.Arrives(two, s.PeerSocket(lab.PeerA, 5070), ext)
}

// Two hosts share an outside port towards different peers. One's permission ends while
// its peer sends from ever new ports, so events of the last children come after the
// permission is gone. They must not look like a user's forward that conflicts with the
// other host's permission. Fails when a flow to the inside endpoint of a recently ended
// permission counts as a forward.
func TestNFTEndOfAPermissionDoesNotBarItsNeighbour(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 2})
		s.Start(stage.Flags(mode, "--lifetime=8s", "--reconcile=1s", "--max-children=0")...)
		one, two := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074)
		a, b := s.PeerSocket(lab.PeerA, 3074), s.PeerSocket(lab.PeerB, 3074)
		ext := s.Contact(two, b)
		if other := s.Contact(one, a); other != ext {
			t.Fatalf("ports are not shared: %v %v", ext, other)
		}
		s.Stands(one, a, ext)
		s.Stands(two, b, ext)
		s.Steady(func() error { return two.Send(b.Addr(), "x") })
		port := uint16(10_000)
		s.Steady(func() error {
			from, err := s.Outside.Socket(lab.PeerA, port)
			if err != nil {
				return err
			}
			defer from.Close()
			port = max(port+1, 10_000)
			return from.Send(ext, "x")
		})
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", "10.47.11.109", "--orig-port-src", "3074", "--orig-port-dst", "3074")
		s.Must(err)
		s.Until("the permission of the one has ended", func() bool {
			return !slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.Int == one.Addr() })
		})
		if n := s.Status().Counters.Refused["forwarded"]; n != 0 {
			t.Errorf("the other host's was refused %d times, as if the port were forwarded", n)
		}
		s.Stands(two, b, ext)
	})
}

// A permitted peer comes by a forward of the user's that leads to the permission's own host.
//
// Fails when verify takes that flow for a child of the permission.
func TestNFTFlowOfAForwardIsNoChild(t *testing.T) {
	s := play(t, lab.Options{Rules: lab.Masquerade + `table ip fw {
	chain pre {
		type nat hook prerouting priority dstnat;
		iifname "wan0" udp dport 5060 dnat to 10.47.11.109
	}
}
`}, stage.Auto...)
	phone, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, peer)
	s.Stands(phone, peer, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Verified()
}
