package e2e

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// The map of permissions (--backend=nft, and auto), filled by the kernel itself (--learn)
// or by the daemon alone.

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

// entries are the elements in both maps, of addresses and of ports, as "nft list map"
// shows them, with the time left for each. Without the maps it is nil.
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
		if m[4] != "" { // an element without a timeout has no "expires"
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

// hasMap reports whether there is a map of permissions, empty or not.
func (s *scene) hasMap() bool {
	s.T.Helper()
	out, err := s.Gateway.Output("nft", "list", "maps")
	s.Must(err)
	return strings.Contains(out, "map permissions {")
}

// tables are the names of conenatd's tables in the kernel.
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

// quickAnswers lets an inside host send n questions, each from a fresh port. The peer
// answers from another port, in the softirq that delivers the question. It returns how
// many answers got through; a fence shows when one is lost.
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

// Without learning, the answer races with the daemon, so this test only logs the
// difference.
func TestNFTWithoutLearningLosesTheQuickestAnswers(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFTByEvent, stage.AutoByEvent, stage.Expect}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		t.Logf("%d of 1,000 answers got through", s.quickAnswers(1000))
	})
}

// Without a daemon permissions stay, and the kernel learns new ones; the next daemon takes
// over all of them. Meanwhile no packet of the peer's is lost, from whatever port.
func TestNFTOutlivesTheDaemonAndIsTakenOver(t *testing.T) {
	t.Parallel() // mostly it waits
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
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, append(mode, "--lifetime=8s")...)
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

// A firewall that accepts only established and related flows drops children that only the
// map admitted. The user is told which rule would let them pass.
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
		{stage.Auto, lab.Masquerade + lab.DropPolicy, "expect+nft", "nft", "expect", 65},
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

// At max_permissions new permissions are refused; when one ends, another takes its place.
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

// Flows beyond the learn rate are granted by the daemon.
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

// What the kernel learned beyond a limit is removed at once, and does not come back while
// the host goes on sending.
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
		// Two reconciles must retry what is refused.
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

// A host that asks for more than it may have, with hundreds of peers, does not keep anybody from
// listing the ruleset, which nft starts anew at each transaction.
//
// Fails when what is refused costs a transaction for each flow.
func TestNFTHostAtItsLimitDisturbsNoListing(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		const limit, more, most = 50, 500, 20
		s := play(t, lab.Options{}, append(mode, "--events=all", "--learn-rate=100000", "--max-permissions-per-host", fmt.Sprint(limit))...)
		send := func(from, to int) {
			for i := from; i < to; i++ {
				in := s.InsideSocket(0, uint16(6000+i))
				s.Must(in.Send(netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(10 + i%200)}), 9), "x"))
				in.Close()
			}
		}
		refused := func() uint64 { return s.Status().Counters.Refused["host_limit"] }
		send(0, limit+1)
		s.Until("the limit is reached", func() bool { return refused() > 0 })
		before := s.generation()
		send(limit+1, limit+1+more)
		s.Until("the others are refused", func() bool { return refused() > more })
		if n := s.generation() - before; n > most {
			t.Errorf("%d transactions for %d flows", n, more)
		}
	})
}

// generation returns the generation of the ruleset, which each transaction increments.
func (s *scene) generation() uint32 {
	c, err := nfnl.Dial(s.Gateway.FD())
	s.Must(err)
	defer c.Close()
	id, err := nfnl.Generation(c)
	s.Must(err)
	return id
}

// The daemon's own refreshes disturb a listing of the map, so that the listing misses some
// elements. They do not count as lost.
func TestNFTRefreshIsNotTakenForLoss(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.OfTheDaemon(t)
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent}, func(t *testing.T, mode ...string) {
		const ports, peers = 50, 200
		s := newScene(t, lab.Options{})
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
		s.Start(stage.Flags(mode, "--max-permissions-per-host=0", "--learn-rate=100000", "--reconcile=1s", "--lifetime=10s")...)
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
			return time.Since(began) > 30*time.Second
		})
		st := s.Status()
		t.Logf("%d stand", st.Permissions.Standing)
		if len(st.Counters.Repaired) != 0 || st.Tables.Repaired != 0 {
			t.Errorf("%v and %d tables were put back, though nobody took any away", st.Counters.Repaired, st.Tables.Repaired)
		}
	})
}
