package e2e

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// The map of permissions (--backend=nft, and auto), with and without the kernel
// filling it by itself (--learn).

// An entry is an element of the map.
type entry struct {
	ext  netip.AddrPort
	peer netip.Addr
	in   netip.AddrPort
}

func entryOf(in, peer *lab.Socket, ext netip.AddrPort) entry {
	return entry{ext: ext, peer: peer.Addr().Addr(), in: in.Addr()}
}

func (e entry) String() string {
	return fmt.Sprintf("%v . %v . %v : %v . %v", e.peer, e.ext.Addr(), e.ext.Port(), e.in.Addr(), e.in.Port())
}

var entryLine = regexp.MustCompile(`(\S+) \. (\S+) \. (\d+)(?: limit rate \S+ burst \d+ packets)?(?: timeout \S+)?(?: expires (\S+))? : ([\d.]+)`)

// entries are what "nft list map" shows of addresses and of ports, with the time that each
// has left. Without maps there are none.
func (s *scene) entries() map[entry]time.Duration {
	s.T.Helper()
	lists := map[string]string{}
	for _, name := range []string{"permissions", "permission_ports"} {
		out, err := s.Gateway.Output("nft", "list", "map", "ip", "conenat", name)
		if err != nil && strings.Contains(err.Error(), "No such file") {
			return nil
		}
		s.Must(err)
		lists[name] = out
	}
	key := func(m []string) string { return strings.Join(m[1:4], " ") }
	ports := map[string]string{}
	for _, m := range entryLine.FindAllStringSubmatch(lists["permission_ports"], -1) {
		ports[key(m)] = m[5]
	}
	all := map[entry]time.Duration{}
	for _, m := range entryLine.FindAllStringSubmatch(lists["permissions"], -1) {
		port, ok := ports[key(m)]
		if !ok {
			continue
		}
		var left time.Duration
		if m[4] != "" { // else it never ends
			var err error
			left, err = time.ParseDuration(m[4])
			s.Must(err)
		}
		all[entry{
			peer: netip.MustParseAddr(m[1]),
			ext:  netip.MustParseAddrPort(m[2] + ":" + m[3]),
			in:   netip.MustParseAddrPort(m[5] + ":" + port),
		}] = left
	}
	return all
}

// inMap reports whether the map has an element.
func (s *scene) inMap(e entry) bool {
	s.T.Helper()
	_, ok := s.entries()[e]
	return ok
}

// tables are the names of the tables of conenatd's that there are.
func (s *scene) tables() (names []string) {
	s.T.Helper()
	out, err := s.Gateway.Output("nft", "list", "tables")
	s.Must(err)
	for line := range strings.Lines(out) {
		if strings.Contains(line, "conenat") {
			names = append(names, strings.TrimSpace(line))
		}
	}
	return names
}

// quickAnswers lets an inside host ask n times, each time from a fresh port, a
// peer that answers from another port before the asker's packet has left the
// peer's softirq. It returns how many answers got through. A fence tells when an
// answer is lost.
func (s *scene) quickAnswers(n int) (through int) {
	s.T.Helper()
	s.reflect(7000, 7001)
	s.reflect(7002, 7002)
	asked, fence := netip.AddrPortFrom(lab.PeerA, 7000), netip.AddrPortFrom(lab.PeerB, 7002)
	for i := range n {
		in := s.InsideSocket(0, uint16(10_000+i))
		err := lab.Lost(in,
			lab.Packet{From: in, To: asked, Payload: stage.Payload("question")},
			lab.Packet{From: in, To: fence, Payload: stage.Payload("fence")})
		switch {
		case err == nil:
		case strings.HasPrefix(err.Error(), "lose packet"):
			through++
		default:
			s.T.Fatalf("question %d: %v\n%s", i, err, s.Dump())
		}
		s.Must(in.Close())
	}
	return through
}

func TestNFTLearnsBeforeTheQuickestAnswer(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, append(mode, "--learn-rate=100000")...)
		if n := s.quickAnswers(1000); n != 1000 {
			t.Errorf("%d of 1,000 answers got through", n)
		}
	})
}

// What the kernel does not learn depends on who is quicker. This only shows the
// difference.
func TestNFTWithoutLearningLosesTheQuickestAnswers(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFTByEvent, stage.AutoByEvent, stage.Expect}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		t.Logf("%d of 1,000 answers got through", s.quickAnswers(1000))
	})
}

// What stands goes on without a daemon, and more comes; the next one takes all
// over. Meanwhile no packet of the peer's is lost, from whatever port.
func TestNFTOutlivesTheDaemonAndIsTakenOver(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto, stage.NFTByEvent, stage.AutoByEvent}, func(t *testing.T, mode ...string) {
		learns := !slices.Contains(mode, "--learn=false")
		s := newScene(t, lab.Options{Inside: 3})
		args := stage.Flags(mode, "--max-children=0")
		s.Start(args...)
		proxy := s.PeerSocket(lab.PeerA, 5060)
		one, two, three := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061), s.InsideSocket(2, 5062)
		extOne, extTwo := s.Contact(one, proxy), s.Contact(two, proxy)
		s.Stands(one, proxy, extOne)
		s.Stands(two, proxy, extTwo)
		media := s.PeerSocket(lab.PeerA, 5070)
		s.Arrives(one, media, extOne)
		sameChild := s.Steady(s.OnOnePort(one, media, extOne))
		freshChild := s.Steady(s.FreshPorts(two, lab.PeerA, extTwo))

		s.Kill()
		extThree := s.Contact(three, proxy)
		if learns {
			s.Arrives(three, s.PeerSocket(lab.PeerA, 5071), extThree)
		}
		before := s.entries()
		if _, learned := before[entryOf(three, proxy, extThree)]; len(before) < 2 || learned != learns {
			t.Errorf("without a daemon the map has %v", before)
		}

		s.Start(args...)
		standing := s.List()
		s.Stands(three, proxy, extThree)
		s.Arrives(three, s.PeerSocket(lab.PeerA, 5072), extThree)
		t.Logf("%d packets of one child and the first packets of %d others arrived", sameChild(), freshChild())
		for e := range before {
			if !slices.ContainsFunc(standing, func(p control.Permission) bool {
				return p.Ext == e.ext && p.Peer == e.peer && p.Int == e.in && p.State == "standing"
			}) {
				t.Errorf("%v was not taken over: %+v", e, standing)
			}
			if !s.inMap(e) {
				t.Errorf("the map lost %v", e)
			}
		}
		if n := s.Status().Counters.Granted; int(n) != 3-len(before) {
			t.Errorf("%d permissions were granted anew, want all taken over that stood", n)
		}
	})
}

func TestNFTRunsOutWithoutADaemon(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, append(mode, "--lifetime=4s")...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Kill()
		later := s.PeerSocket(lab.PeerB, 5060)
		s.Contact(phone, later)
		if !s.inMap(entryOf(phone, later, ext)) {
			t.Errorf("without a daemon nothing is learned: %v", s.entries())
		}
		s.Until("all has run out", func() bool { return len(s.entries()) == 0 && len(s.ConntrackList("expect")) == 0 })
		fence := s.PeerSocket(lab.PeerC, 5060)
		s.Contact(phone, fence)
		for _, peer := range []netip.Addr{lab.PeerA, lab.PeerB} {
			s.Lost(phone, s.PeerSocket(peer, 5070), ext, fence)
		}
	})
}

// A firewall that drops what it does not know lets expected children pass. Those
// that only the map admitted it drops, and the user is told what would mend that.
func TestNFTChildrenPassAFirewallThatAcceptsThem(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, mode...)
		phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		if !s.mapWarning() {
			t.Error("the rules show it, and there is no warning")
		}
		s.Lost(phone, media, ext, proxy)
		s.Until("the status tells of it", func() bool {
			s.Must(s.Daemon.Signal(syscall.SIGHUP)) // reads the counters
			m := s.Status().Tables.Map
			return m.Admitted == 1 && m.Passed == 0
		})
		s.Must(s.NFT("insert rule inet filter forward ct status dnat accept"))
		s.Arrives(phone, media, ext)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
		s.Until("the status tells of those too", func() bool {
			s.Must(s.Daemon.Signal(syscall.SIGHUP))
			m := s.Status().Tables.Map
			return m.Admitted == 3 && m.Passed == 2 && !s.mapWarning()
		})
	})
}

func TestAutoNFTChildrenPassAFirewallAsTheyAre(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.AutoByEvent}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, mode...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		for port := uint16(5070); port < 5080; port++ {
			s.Arrives(phone, s.PeerSocket(lab.PeerA, port), ext)
		}
		s.Must(s.Daemon.Signal(syscall.SIGHUP))
		if s.mapWarning() {
			t.Errorf("warnings: %q", s.Status().Warnings)
		}
	})
}

// mapWarning reports whether the status says that the user's firewall drops
// children.
func (s *scene) mapWarning() bool {
	s.T.Helper()
	return stage.Warned(s.Status(), "ct status dnat")
}

func TestNFTListAndStatusTellWhatCarriesWhat(t *testing.T) {
	for _, tc := range []struct {
		mode     []string
		rules    string
		ipv4     string // what carries a permission
		crowded  string // one of many on the same outside port
		ipv6     string // one of a routed subnet
		expected int
	}{
		{stage.NFT, "", "nft", "nft", "", 0},
		{stage.Auto, "", "nft", "nft", "expect", 1},
		{stage.Auto, lab.Masquerade + lab.DropPolicy, "expect", "nft", "expect", 65},
		{stage.Expect, "", "expect", "", "expect", 65},
	} {
		stage.InModes(t, [][]string{tc.mode}, func(t *testing.T, mode ...string) {
			s := newScene(t, lab.Options{IPv6: true, Rules: tc.rules})
			s.Start(stage.Flags(mode, "--subnet", lab.InsideNet6.String(), "--routed")...)
			carried := func(what, want, reason string, in, peer *lab.Socket) {
				t.Helper()
				state := "standing"
				if want == "" {
					state = "refused"
				}
				if p := s.Listed(in, peer, s.Contact(in, peer), state); p.Backend != want || state == "refused" && p.Reason != reason {
					t.Errorf("%s is carried by %q (%s), want %q (%s)", what, p.Backend, p.Reason, want, reason)
				}
			}
			phone := s.InsideSocket(0, 5060)
			for i := range 64 {
				peer := netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)})
				carried("IPv4", tc.ipv4, "", phone, s.PeerSocket(peer, 5060))
			}
			carried("the 65th on a port", tc.crowded, "peers_on_port", phone, s.PeerSocket(lab.PeerA, 5060))
			phone6 := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5060)
			carried("IPv6", tc.ipv6, "no_backend", phone6, s.Socket(s.Outside.Namespace, lab.Peer6A, 5060))
			st := s.Status()
			backend := map[string]string{stage.Auto[0]: "expect+nft"}[mode[0]]
			if st.Backend != cmp.Or(backend, tc.ipv4) || st.Permissions.Expectations != tc.expected || st.Tables.Map.On != !slices.Equal(mode, stage.Expect) {
				t.Errorf("backend %q, %d expectations, want %d; %+v", st.Backend, st.Permissions.Expectations, tc.expected, st.Tables.Map)
			}
			if n := len(s.ConntrackList("expect", "-f", "ipv4")) + len(s.ConntrackList("expect", "-f", "ipv6")); n != tc.expected {
				t.Errorf("%d expectations, want %d", n, tc.expected)
			}
		})
	}
}

// A full map refuses what is beyond; what ends makes room.
func TestNFTMapThatIsFullRefusesTheRest(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, append(mode, "--max-permissions=5", "--reconcile=1s")...)
		proxy, media := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
		var phones []*lab.Socket
		var exts []netip.AddrPort
		for i := range 8 {
			phones = append(phones, s.InsideSocket(0, uint16(6000+i)))
			exts = append(exts, s.Contact(phones[i], proxy))
			if i < 5 {
				s.Stands(phones[i], proxy, exts[i])
			} else if p := s.Listed(phones[i], proxy, exts[i], "refused"); p.Reason != "total_limit" {
				t.Errorf("reason %q", p.Reason)
			}
		}
		st := s.Status()
		if st.Permissions.Standing != 5 || st.Permissions.Refused != 3 || st.Counters.Refused["total_limit"] < 3 {
			t.Errorf("%+v, refused %v", st.Permissions, st.Counters.Refused)
		}
		if n := len(s.entries()); n != 5 {
			t.Errorf("%d elements, want 5", n)
		}
		for i, phone := range phones {
			if i < 5 {
				s.Arrives(phone, media, exts[i])
			} else {
				s.Lost(phone, media, exts[i], proxy)
			}
		}
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "6000", "--orig-port-dst", "5060")
		s.Must(err)
		s.Until("one of the others has the room", func() bool {
			st := s.Status().Permissions
			return st.Standing == 5 && st.Refused == 2
		})
		in := slices.IndexFunc(phones[5:], func(phone *lab.Socket) bool {
			return slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.Int == phone.Addr() && p.State == "standing" })
		})
		if in < 0 {
			t.Fatalf("none of the others stands\n%s", s.Dump())
		}
		s.Arrives(phones[5+in], s.PeerSocket(lab.PeerA, 5071), exts[5+in])
	})
}

// The map comes after it, so the permission stays in it and admits as soon as the forward
// is gone. It is shown as refused until then.
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

// Another user than root does not know of it before.
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

// Whom a permission led to another host before, the forward leads as soon as it is
// there, though he goes on sending. Where expectations do the work they leave its way.
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

// A forward of all ports to one host takes every child.
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
		if st := s.Status(); !stage.Warned(st, "forwards all ports") {
			t.Errorf("warnings: %q", st.Warnings)
		}
	})
}

// shared makes two hosts share an outside port: host one calls peer A, host two
// peer B and then another port of peer A.
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

// Without a daemon too: the second one's packets neither take the element over
// nor keep it alive. When it has run out, the next packet gets it.
func TestNFTSecondHostDoesNotRefreshTheFirst(t *testing.T) {
	s := play(t, lab.Options{Inside: 2}, append(stage.NFT, "--lifetime=4s")...)
	one, two, a, a2, ext := s.shared()
	s.Kill()
	last := time.Hour
	s.Until("the second host has it", func() bool {
		s.Contact(two, a2)
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

// Two hosts share an outside port towards different peers. The permission of one
// ends while its peer goes on sending from ever new ports: the last children, whose
// events come when the permission is gone, are no forward of the user's that would
// bar the other host's. Fails if a flow to where a permission led until just now
// counts as a forward.
func TestNFTEndOfAPermissionDoesNotBarItsNeighbour(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 2})
		s.Start(stage.Flags(mode, "--lifetime=2s", "--reconcile=1s", "--max-children=0")...)
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

// A one-way flow goes on sending, which would teach the kernel again.
func TestNFTRevokeHoldsWhileTheHostGoesOnSending(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		phone, talker := s.InsideSocket(0, 5060), s.InsideSocket(0, 5061)
		proxy, sink := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5062)
		ext, extTalker := s.Contact(phone, proxy), s.Contact(talker, sink)
		s.Steady(func() error { return talker.Send(sink.Addr(), "x") })
		rounds := 20
		if os.Getenv("CONENATD_GUEST") != "" {
			rounds = 5
		}
		for round := range rounds {
			// A new flow brings it back.
			sink := s.PeerSocket(lab.PeerA, uint16(20_000+round))
			s.Contact(talker, sink)
			s.Stands(talker, sink, extTalker)
			e := entryOf(talker, sink, extTalker)
			if !s.inMap(e) {
				t.Fatalf("round %d: the map has %v", round, s.entries())
			}
			if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, extTalker.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
				t.Fatalf("exit %d, %q", code, out)
			}
			s.Until("it is not in the map", func() bool { return !s.inMap(e) })
			for range 3 {
				if s.inMap(e) {
					t.Fatalf("round %d: revoked, and learned again", round)
				}
			}
		}
		if p := s.Listed(talker, sink, extTalker, "refused"); p.Reason != "revoked" {
			t.Errorf("reason %q", p.Reason)
		}
		s.Lost(talker, s.PeerSocket(lab.PeerA, 5070), extTalker, sink)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
	})
}

// Its children go with a permission, but for those that the inside host answered.
func TestNFTRevokeEndsUnansweredChildren(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		answered, ignored := s.PeerSocket(lab.PeerA, 5070), s.PeerSocket(lab.PeerA, 5071)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, answered, ext)
		s.Arrives(phone, ignored, ext)
		p := stage.Payload("answer")
		s.Must(phone.Send(answered.Addr(), p))
		_, err := answered.Expect(p)
		s.Must(err)
		s.Until("both children are listed", func() bool {
			s.Must(s.Daemon.Signal(syscall.SIGHUP)) // reads the flows
			return s.Listed(phone, proxy, ext, "standing").Answered == 1
		})
		if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, lab.PeerA.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
			t.Fatalf("exit %d, %q", code, out)
		}
		s.Until("the one that nobody answered is gone", func() bool { return !s.hasFlowFrom(ignored) })
		s.Lost(phone, ignored, ext, proxy)
		s.Arrives(phone, answered, ext)
	})
}

// What the kernel must not learn so quickly waits for the daemon.
func TestNFTBeyondTheLearnRateTheDaemonGrants(t *testing.T) {
	s := play(t, lab.Options{}, append(stage.NFT, "--learn-rate=1")...)
	phone := s.InsideSocket(0, 5060)
	for i := range 100 {
		s.Must(phone.Send(netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)}), 9), "x"))
	}
	s.Until("all stand", func() bool { return s.Status().Permissions.Standing == 100 })
	if n := len(s.entries()); n != 100 {
		t.Errorf("the map has %d elements, want 100", n)
	}
	if m := s.Status().Tables.Map; m.Limited == 0 || m.Learned == 0 || m.Learned+m.Limited != 100 {
		t.Errorf("%+v", m)
	}
}

// What the kernel learned beyond a limit goes at once, and does not come back
// while the host goes on sending.
func TestNFTLimitHoldsThoughTheKernelLearns(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Inside: 2}, append(mode, "--max-permissions-per-host=2", "--reconcile=1s", "--lifetime=30s")...)
		proxy := s.PeerSocket(lab.PeerA, 5060)
		var sent []*lab.Socket
		for i := range 6 {
			phone := s.InsideSocket(0, uint16(6000+i))
			sent = append(sent, phone)
			ext := s.Contact(phone, proxy)
			if i < 2 {
				s.Stands(phone, proxy, ext)
			} else if p := s.Listed(phone, proxy, ext, "refused"); p.Reason != "host_limit" {
				t.Errorf("reason %q", p.Reason)
			}
		}
		s.Until("the map has but two", func() bool { return len(s.entries()) == 2 })
		s.Steady(func() error {
			for _, phone := range sent {
				if err := phone.Send(proxy.Addr(), "again"); err != nil {
					return err
				}
			}
			return nil
		})
		// Over two reconciles, which try again what is refused.
		refused := s.Status().Counters.Refused["host_limit"]
		s.Until("they were tried again, twice", func() bool {
			if all := s.entries(); len(all) != 2 {
				t.Fatalf("the map has %v", all)
			}
			return s.Status().Counters.Refused["host_limit"] >= refused+8
		})
		other, free := s.InsideSocket(1, 7000), s.PeerSocket(lab.PeerB, 5060)
		ext := s.Contact(other, free)
		s.Stands(other, free, ext)
		s.Arrives(other, s.PeerSocket(lab.PeerB, 5070), ext)
	})
}

func TestNFTStopLeavesNothing(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto, stage.AutoByEvent}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5071)
		ext := s.Contact(phone, proxy)
		rules, err := s.Ruleset()
		s.Must(err)
		table := s.table()
		s.Start(stage.Flags(mode)...)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext) // a child that nobody answers
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_events", "0"))
		s.Arrives(phone, media, ext) // one that no event told of
		s.Stop()
		if got := s.table(); !slices.Equal(got, table) {
			t.Errorf("conntrack table\nbefore %q\nafter  %q", table, got)
		}
		if got, err := s.Ruleset(); err != nil || got != rules {
			t.Errorf("rule set changed: %v\n%s", err, got)
		}
	})
}

// A child that the inside host answered goes on when its permission ends with the
// daemon, as any flow does.
func TestNFTStopLeavesAnsweredChildren(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, media, ext)
		p := stage.Payload("answer")
		s.Must(phone.Send(media.Addr(), p))
		_, err := media.Expect(p)
		s.Must(err)
		s.Stop()
		s.Arrives(phone, media, ext)
		s.Lost(phone, s.PeerSocket(lab.PeerA, 5071), ext, media)
	})
}

func TestNFTStopThatKeepsLeavesTheTables(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		args := stage.Flags(mode, "--on-stop=keep", "--max-children=0")
		s.Start(args...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		before := s.tables()
		fresh := s.Steady(s.FreshPorts(phone, lab.PeerA, ext))
		s.Stop()
		if after := s.tables(); len(before) != 2 || !slices.Equal(after, before) {
			t.Errorf("tables %q, were %q", after, before)
		}
		if !s.inMap(entryOf(phone, proxy, ext)) {
			t.Errorf("the map has %v", s.entries())
		}
		s.Start(args...)
		t.Logf("the first packets of %d children arrived meanwhile", fresh())
		if n := s.Status().Counters.Granted; n != 0 {
			t.Errorf("%d permissions were granted anew, want all taken over", n)
		}
		s.Stop()
		s.Start(stage.Flags(mode)...)
		s.Stop()
		if left := s.tables(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
		if left := append(s.ConntrackList("expect"), s.Anchors()...); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

func TestNFTForeignTableIsLeftAloneAndNamed(t *testing.T) {
	s := newScene(t, lab.Options{Rules: lab.Masquerade + "table ip conenat {\n\tmap permissions {\n\t\ttype ipv4_addr : ipv4_addr\n\t}\n}\n"})
	before, err := s.Ruleset()
	s.Must(err)
	for _, mode := range [][]string{stage.NFT, stage.Auto, stage.Expect} {
		args := slices.Concat([]string{"run"}, stage.Flags(mode, "--control-socket", filepath.Join(t.TempDir(), "c.sock")))
		out, code := s.CLI(args...)
		if code != 1 || !strings.Contains(out, "table ip conenat") || !strings.Contains(out, `key "table"`) {
			t.Errorf("%v: exit %d, %q", mode, code, out)
		}
	}
	s.Start(stage.Flags(stage.NFT, "--table=conenat2")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Stop()
	if after, err := s.Ruleset(); err != nil || after != before {
		t.Errorf("the rule set is %v\n%s\nnot\n%s", err, after, before)
	}
}

// A list of the map is a walk that the daemon's own refreshes disturb: what it
// misses is not lost.
func TestNFTRefreshIsNotTakenForLoss(t *testing.T) {
	stage.OfTheDaemon(t)
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent}, func(t *testing.T, mode ...string) {
		const ports, peers = 50, 200
		s := newScene(t, lab.Options{})
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
		s.Start(stage.Flags(mode, "--max-permissions-per-host=0", "--learn-rate=100000", "--reconcile=1s", "--lifetime=6s")...)
		for port := range ports {
			in := s.InsideSocket(0, uint16(10_000+port))
			for i := range peers {
				s.Must(in.Send(netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i)}), 9), "x"))
			}
			in.Close()
		}
		began := time.Now()
		s.Until("three lifetimes passed", func() bool {
			s.Status()
			return time.Since(began) > 18*time.Second
		})
		st := s.Status()
		t.Logf("%d stand", st.Permissions.Standing)
		if len(st.Counters.Repaired) != 0 || st.Tables.Repaired != 0 {
			t.Errorf("%v and %d tables were put back, though nobody took any away", st.Counters.Repaired, st.Tables.Repaired)
		}
	})
}

// Two hundred thousand permissions, learned by the kernel or granted from events:
// all stand, all work, and all go.
func TestNFTManyPermissions(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent}, func(t *testing.T, mode ...string) {
		const peers = stage.Peers
		ports := 400
		if os.Getenv("CONENATD_GUEST") != "" {
			ports = 40
		}
		s := newScene(t, lab.Options{Inside: 2})
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
		s.Start(stage.Flags(mode, "--max-permissions-per-host=0", "--learn-rate=100000", "--event-buffer=67108864")...)
		inside := func(port int) *lab.Socket { return s.InsideSocket(port%2, uint16(10_000+port)) }
		send := func(port int, wanted func(p netip.Addr) bool) {
			in := inside(port)
			defer in.Close()
			for i := range peers {
				if p := stage.Peer(i); wanted(p) {
					s.Must(in.Send(netip.AddrPortFrom(p, 9), "x"))
				}
			}
		}

		began := time.Now()
		const atOnce = 20 // ports
		for first := 0; first < ports; first += atOnce {
			for port := first; port < first+atOnce; port++ {
				send(port, func(netip.Addr) bool { return true })
			}
			s.allStand((first+atOnce)*peers, func(known map[stage.Flow]bool) {
				for port := first; port < first+atOnce; port++ {
					send(port, func(p netip.Addr) bool { return !known[stage.Flow{Port: uint16(10_000 + port), Peer: p}] })
				}
			})
		}
		took := time.Since(began)
		st := s.Status()
		t.Logf("%d permissions in %v, %.0f in a second; %+v; %d overruns, %d learned",
			ports*peers, took.Round(time.Millisecond), float64(ports*peers)/took.Seconds(), st.Latency, st.Events.Overruns, st.Tables.Map.Learned)
		if st.Permissions.Standing != ports*peers || st.Permissions.Refused != 0 {
			t.Errorf("%+v", st.Permissions)
		}
		if n := s.CountElements(); n != ports*peers {
			t.Errorf("%d elements, want %d", n, ports*peers)
		}
		for range 100 {
			port, p := rand.N(ports), stage.Peer(rand.N(peers))
			in := inside(port)
			from := s.PeerSocket(p, 0)
			s.Arrives(in, from, netip.AddrPortFrom(s.Gateway.Addr, in.Addr().Port()))
			in.Close()
			from.Close()
		}
		began = time.Now()
		s.Stop()
		t.Logf("stopped in %v", time.Since(began).Round(time.Millisecond))
		if left := s.Leftovers(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

// allStand waits until so many permissions stand. When their number does not grow
// it calls again with what is known: a busy machine loses packets.
func (s *scene) allStand(want int, again func(known map[stage.Flow]bool)) {
	s.T.Helper()
	last := 0
	s.Until(fmt.Sprintf("%d permissions stand", want), func() bool {
		n := s.Status().Permissions.Standing
		if n < want && n == last {
			again(s.Known())
		}
		last = n
		return n == want
	})
}
