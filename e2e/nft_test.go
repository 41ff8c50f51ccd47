package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// The map of permissions (--backend=nft, and auto), with and without the kernel
// filling it by itself (--learn).

var (
	nft         = []string{"--backend=nft"}
	nftByEvent  = []string{"--backend=nft", "--learn=false"}
	auto        = []string{"--backend=auto"}
	autoByEvent = []string{"--backend=auto", "--learn=false"}
	expects     = []string{"--backend=expect"}
)

// inModes runs a test once in each mode.
func inModes(t *testing.T, modes [][]string, test func(t *testing.T, mode ...string)) {
	t.Helper()
	if os.Getenv("CONENATD_GUEST") != "" {
		modes = modes[:1] // an emulated machine has no time for all
	}
	for _, mode := range modes {
		t.Run(strings.ReplaceAll(strings.Join(mode, " "), "--", ""), func(t *testing.T) { test(t, mode...) })
	}
}

// subnet puts what every daemon needs before the flags of a mode.
func subnet(mode []string, more ...string) []string {
	return slices.Concat([]string{"--subnet", lab.InsideNet.String()}, mode, more)
}

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

var entryLine = regexp.MustCompile(`(\S+) \. (\S+) \. (\d+)(?: limit rate \S+ burst \d+ packets)?(?: timeout \S+)?(?: expires (\S+))? : (\S+) \. (\d+) \. `)

// entries are what "nft list map" shows, with the time that each has left.
// Without a map there are none.
func (s *scene) entries() map[entry]time.Duration {
	s.t.Helper()
	out, err := s.Gateway.Output("nft", "list", "map", "ip", "conenat", "permissions")
	if err != nil && strings.Contains(err.Error(), "No such file") {
		return nil
	}
	s.must(err)
	all := map[entry]time.Duration{}
	for _, m := range entryLine.FindAllStringSubmatch(out, -1) {
		var left time.Duration
		if m[4] != "" { // else it never ends
			left, err = time.ParseDuration(m[4])
			s.must(err)
		}
		all[entry{
			peer: netip.MustParseAddr(m[1]),
			ext:  netip.MustParseAddrPort(m[2] + ":" + m[3]),
			in:   netip.MustParseAddrPort(m[5] + ":" + m[6]),
		}] = left
	}
	return all
}

// inMap reports whether the map has an element.
func (s *scene) inMap(e entry) bool {
	s.t.Helper()
	_, ok := s.entries()[e]
	return ok
}

// tables are the names of the tables of conenatd's that there are.
func (s *scene) tables() (names []string) {
	s.t.Helper()
	out, err := s.Gateway.Output("nft", "list", "tables")
	s.must(err)
	for line := range strings.Lines(out) {
		if strings.Contains(line, "conenat") {
			names = append(names, strings.TrimSpace(line))
		}
	}
	return names
}

// steady calls once again and again beside the test, until stop, which returns
// how often it did. An error ends it and fails the test.
func (s *scene) steady(once func() error) (stop func() int) {
	s.t.Helper()
	end, ended := make(chan struct{}), make(chan error, 1)
	n := 0
	go func() {
		for {
			select {
			case <-end:
				ended <- nil
				return
			default:
			}
			if err := once(); err != nil {
				ended <- err
				return
			}
			n++
		}
	}()
	stop = sync.OnceValue(func() int {
		close(end)
		if err := <-ended; err != nil {
			s.t.Errorf("after %d that went well: %v", n, err)
		}
		return n
	})
	s.t.Cleanup(func() { stop() })
	return stop
}

// freshPorts returns a function that sends one packet from a port of the peer
// that it never used before, and sees it arrive at in.
func (s *scene) freshPorts(in *lab.Socket, peer netip.Addr, ext netip.AddrPort) func() error {
	port := uint16(10_000)
	return func() error {
		if port++; port == 0 {
			return errors.New("all ports are used")
		}
		from, err := s.Outside.Socket(peer, port)
		if err != nil {
			return err
		}
		defer from.Close()
		p := payload("from a fresh port")
		if err := from.Send(ext, p); err != nil {
			return err
		}
		_, err = in.Expect(p)
		return err
	}
}

// onOnePort returns a function that sends one packet from a port of the peer,
// always the same, and sees it arrive at in.
func (s *scene) onOnePort(in, from *lab.Socket, ext netip.AddrPort) func() error {
	return func() error {
		p := payload("on an existing child")
		if err := from.Send(ext, p); err != nil {
			return err
		}
		_, err := in.Expect(p)
		return err
	}
}

// quickAnswers lets an inside host ask n times, each time from a fresh port, a
// peer that answers from another port before the asker's packet has left the
// peer's softirq. It returns how many answers got through. A fence tells when an
// answer is lost.
func (s *scene) quickAnswers(n int) (through int) {
	s.t.Helper()
	s.reflect(7000, 7001)
	s.reflect(7002, 7002)
	asked, fence := netip.AddrPortFrom(lab.PeerA, 7000), netip.AddrPortFrom(lab.PeerB, 7002)
	for i := range n {
		in := s.inside(0, uint16(10_000+i))
		err := lab.Lost(in,
			lab.Packet{From: in, To: asked, Payload: payload("question")},
			lab.Packet{From: in, To: fence, Payload: payload("fence")})
		switch {
		case err == nil:
		case strings.HasPrefix(err.Error(), "lose packet"):
			through++
		default:
			s.t.Fatalf("question %d: %v\n%s", i, err, s.dump())
		}
		s.must(in.Close())
	}
	return through
}

func TestNFTLearnsBeforeTheQuickestAnswer(t *testing.T) {
	inModes(t, [][]string{nft, auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, append(mode, "--learn-rate=100000")...)
		if n := s.quickAnswers(1000); n != 1000 {
			t.Errorf("%d of 1,000 answers got through", n)
		}
	})
}

// What the kernel does not learn depends on who is quicker. This only shows the
// difference.
func TestNFTWithoutLearningLosesTheQuickestAnswers(t *testing.T) {
	inModes(t, [][]string{nftByEvent, autoByEvent, expects}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		t.Logf("%d of 1,000 answers got through", s.quickAnswers(1000))
	})
}

// What stands goes on without a daemon, and more comes; the next one takes all
// over. Meanwhile no packet of the peer's is lost, from whatever port.
func TestNFTOutlivesTheDaemonAndIsTakenOver(t *testing.T) {
	inModes(t, [][]string{nft, auto, nftByEvent, autoByEvent}, func(t *testing.T, mode ...string) {
		learns := !slices.Contains(mode, "--learn=false")
		s := newScene(t, lab.Options{Inside: 3})
		args := subnet(mode, "--max-children=0")
		s.start(args...)
		proxy := s.peer(lab.PeerA, 5060)
		one, two, three := s.inside(0, 5060), s.inside(1, 5061), s.inside(2, 5062)
		extOne, extTwo := s.contact(one, proxy), s.contact(two, proxy)
		s.stands(one, proxy, extOne)
		s.stands(two, proxy, extTwo)
		media := s.peer(lab.PeerA, 5070)
		s.arrives(one, media, extOne)
		sameChild := s.steady(s.onOnePort(one, media, extOne))
		freshChild := s.steady(s.freshPorts(two, lab.PeerA, extTwo))

		s.kill()
		extThree := s.contact(three, proxy)
		if learns {
			s.arrives(three, s.peer(lab.PeerA, 5071), extThree)
		}
		before := s.entries()
		if _, learned := before[entryOf(three, proxy, extThree)]; len(before) < 2 || learned != learns {
			t.Errorf("without a daemon the map has %v", before)
		}

		s.start(args...)
		standing := s.list()
		s.stands(three, proxy, extThree)
		s.arrives(three, s.peer(lab.PeerA, 5072), extThree)
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
		if n := s.status().Counters.Granted; int(n) != 3-len(before) {
			t.Errorf("%d permissions were granted anew, want all taken over that stood", n)
		}
	})
}

func TestNFTRunsOutWithoutADaemon(t *testing.T) {
	inModes(t, [][]string{nft, auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, append(mode, "--lifetime=4s")...)
		phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
		ext := s.contact(phone, proxy)
		s.stands(phone, proxy, ext)
		s.kill()
		later := s.peer(lab.PeerB, 5060)
		s.contact(phone, later)
		if !s.inMap(entryOf(phone, later, ext)) {
			t.Errorf("without a daemon nothing is learned: %v", s.entries())
		}
		s.until("all has run out", func() bool { return len(s.entries()) == 0 && len(s.conntrack("expect")) == 0 })
		fence := s.peer(lab.PeerC, 5060)
		s.contact(phone, fence)
		for _, peer := range []netip.Addr{lab.PeerA, lab.PeerB} {
			s.lost(phone, s.peer(peer, 5070), ext, fence)
		}
	})
}

// A firewall that drops what it does not know lets expected children pass. Those
// that only the map admitted it drops, and the user is told what would mend that.
func TestNFTChildrenPassAFirewallThatAcceptsThem(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, mode...)
		phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5070)
		ext := s.contact(phone, proxy)
		s.stands(phone, proxy, ext)
		if s.mapWarning() {
			t.Error("there is a warning before there is a child")
		}
		s.lost(phone, media, ext, proxy)
		s.until("the status tells of it", func() bool {
			s.must(s.d.Signal(syscall.SIGHUP)) // reads the counters
			m := s.status().Tables.Map
			return s.mapWarning() && m.Admitted == 1 && m.Passed == 0
		})
		s.must(s.NFT("insert rule inet filter forward ct status dnat accept"))
		s.arrives(phone, media, ext)
		s.arrives(phone, s.peer(lab.PeerA, 5071), ext)
		s.until("the status tells of those too", func() bool {
			s.must(s.d.Signal(syscall.SIGHUP))
			m := s.status().Tables.Map
			return m.Admitted == 3 && m.Passed == 2
		})
	})
}

func TestAutoNFTChildrenPassAFirewallAsTheyAre(t *testing.T) {
	inModes(t, [][]string{auto, autoByEvent}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, mode...)
		phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
		ext := s.contact(phone, proxy)
		s.stands(phone, proxy, ext)
		for port := uint16(5070); port < 5080; port++ {
			s.arrives(phone, s.peer(lab.PeerA, port), ext)
		}
		s.must(s.d.Signal(syscall.SIGHUP))
		if s.mapWarning() {
			t.Errorf("warnings: %q", s.status().Warnings)
		}
	})
}

// mapWarning reports whether the status says that the user's firewall drops
// children.
func (s *scene) mapWarning() bool {
	s.t.Helper()
	return slices.ContainsFunc(s.status().Warnings, func(w string) bool { return strings.Contains(w, "ct status dnat") })
}

func TestNFTListAndStatusTellWhatCarriesWhat(t *testing.T) {
	for _, tc := range []struct {
		mode     []string
		ipv4     string // what carries a permission
		crowded  string // one of many on the same outside port
		ipv6     string // one of a routed subnet
		expected int
	}{
		{nft, "nft", "nft", "", 0},
		{auto, "expect and nft", "nft", "expect", 65},
		{expects, "expect", "", "expect", 65},
	} {
		inModes(t, [][]string{tc.mode}, func(t *testing.T, mode ...string) {
			s := newScene(t, lab.Options{IPv6: true})
			s.start(subnet(mode, "--subnet", lab.InsideNet6.String(), "--routed")...)
			carried := func(what, want, reason string, in, peer *lab.Socket) {
				t.Helper()
				state := "standing"
				if want == "" {
					state = "refused"
				}
				if p := s.listed(in, peer, s.contact(in, peer), state); p.Backend != want || state == "refused" && p.Reason != reason {
					t.Errorf("%s is carried by %q (%s), want %q (%s)", what, p.Backend, p.Reason, want, reason)
				}
			}
			phone := s.inside(0, 5060)
			for i := range 64 {
				peer := netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)})
				carried("IPv4", tc.ipv4, "", phone, s.peer(peer, 5060))
			}
			carried("the 65th on a port", tc.crowded, "too many peers on this port", phone, s.peer(lab.PeerA, 5060))
			phone6 := s.socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5060)
			carried("IPv6", tc.ipv6, "no backend carries it", phone6, s.socket(s.Outside.Namespace, lab.Peer6A, 5060))
			st := s.status()
			if st.Backend != tc.ipv4 || st.Permissions.Expectations != tc.expected || st.Tables.Map.On != (tc.ipv4 != "expect") {
				t.Errorf("backend %q, %d expectations, want %d; %+v", st.Backend, st.Permissions.Expectations, tc.expected, st.Tables.Map)
			}
			if n := len(s.conntrack("expect", "-f", "ipv4")) + len(s.conntrack("expect", "-f", "ipv6")); n != tc.expected {
				t.Errorf("%d expectations, want %d", n, tc.expected)
			}
		})
	}
}

// A full map refuses what is beyond; what ends makes room.
func TestNFTMapThatIsFullRefusesTheRest(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent, auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, append(mode, "--max-permissions=5", "--reconcile=1s")...)
		proxy, media := s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5070)
		var phones []*lab.Socket
		var exts []netip.AddrPort
		for i := range 8 {
			phones = append(phones, s.inside(0, uint16(6000+i)))
			exts = append(exts, s.contact(phones[i], proxy))
			if i < 5 {
				s.stands(phones[i], proxy, exts[i])
			} else if p := s.listed(phones[i], proxy, exts[i], "refused"); p.Reason != "limit of all permissions" {
				t.Errorf("reason %q", p.Reason)
			}
		}
		st := s.status()
		if st.Permissions.Standing != 5 || st.Permissions.Refused != 3 || st.Counters.Refused["limit of all permissions"] < 3 {
			t.Errorf("%+v, refused %v", st.Permissions, st.Counters.Refused)
		}
		if n := len(s.entries()); n != 5 {
			t.Errorf("%d elements, want 5", n)
		}
		for i, phone := range phones {
			if i < 5 {
				s.arrives(phone, media, exts[i])
			} else {
				s.lost(phone, media, exts[i], proxy)
			}
		}
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "6000", "--orig-port-dst", "5060")
		s.must(err)
		s.until("one of the others has the room", func() bool {
			st := s.status().Permissions
			return st.Standing == 5 && st.Refused == 2
		})
		in := slices.IndexFunc(phones[5:], func(phone *lab.Socket) bool {
			return slices.ContainsFunc(s.list(), func(p control.Permission) bool { return p.Int == phone.Addr() && p.State == "standing" })
		})
		if in < 0 {
			t.Fatalf("none of the others stands\n%s", s.dump())
		}
		s.arrives(phones[5+in], s.peer(lab.PeerA, 5071), exts[5+in])
	})
}

func TestNFTForwardOfTheUsersWins(t *testing.T) {
	for name, load := range map[string]func(s *scene) error{
		"nft": func(s *scene) error { return s.NFT(lab.Masquerade + forward) },
		"iptables-legacy": func(s *scene) error {
			return s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+`*nat
-A PREROUTING -i wan0 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.110
COMMIT
`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			inModes(t, [][]string{nft, nftByEvent}, func(t *testing.T, mode ...string) {
				s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
				s.must(load(s))
				s.start(subnet(mode)...)
				phone, server, proxy := s.inside(0, 5060), s.inside(1, 5060), s.peer(lab.PeerA, 5060)
				ext := s.contact(phone, proxy)
				s.until("it is listed", func() bool { return len(s.list()) == 1 })
				// Before anybody used the forward, which iptables-legacy does not show.
				s.arrives(server, s.peer(lab.PeerA, 5070), ext)
				if p := s.listed(phone, proxy, ext, "refused"); p.Reason != "outside port is forwarded" {
					t.Errorf("reason %q", p.Reason)
				}
				s.until("it is not in the map", func() bool { return !s.inMap(entryOf(phone, proxy, ext)) })
				s.arrives(server, s.peer(lab.PeerA, 5071), ext)
				s.arrives(phone, proxy, ext) // its own flow
			})
		})
	}
}

func TestNFTForwardThatIsUsedFirstWins(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent, auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
		s.must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+`*nat
-A PREROUTING -i wan0 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.110
COMMIT
`))
		s.start(subnet(mode)...)
		phone, server, proxy := s.inside(0, 5060), s.inside(1, 5060), s.peer(lab.PeerA, 5060)
		s.arrives(server, s.peer(lab.PeerC, 9), netip.AddrPortFrom(s.Gateway.Addr, 5060))
		ext := s.contact(phone, proxy)
		if p := s.listed(phone, proxy, ext, "refused"); p.Reason != "outside port is forwarded" {
			t.Errorf("reason %q", p.Reason)
		}
		s.arrives(server, s.peer(lab.PeerA, 5070), ext)
		s.until("it is not in the map", func() bool { return !s.inMap(entryOf(phone, proxy, ext)) })
	})
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
	inModes(t, [][]string{nft, nftByEvent, auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Inside: 2, Rules: lab.Masquerade + dmz}, mode...)
		phone, server, proxy := s.inside(0, 5060), s.inside(1, 5060), s.peer(lab.PeerA, 5060)
		ext := s.contact(phone, proxy)
		if p := s.listed(phone, proxy, ext, "refused"); p.Reason != "outside port is forwarded" {
			t.Errorf("reason %q", p.Reason)
		}
		s.arrives(server, s.peer(lab.PeerA, 5070), ext)
		s.arrives(phone, proxy, ext)
		if w := s.status().Warnings; !slices.ContainsFunc(w, func(w string) bool { return strings.Contains(w, "forwards all ports") }) {
			t.Errorf("warnings: %q", w)
		}
	})
}

// shared makes two hosts share an outside port: host one calls peer A, host two
// peer B and then another port of peer A.
func (s *scene) shared() (one, two, a, a2 *lab.Socket, ext netip.AddrPort) {
	s.t.Helper()
	one, two = s.inside(0, 3074), s.inside(1, 3074)
	a, a2 = s.peer(lab.PeerA, 3074), s.peer(lab.PeerA, 3075)
	b := s.peer(lab.PeerB, 3074)
	ext = s.contact(one, a)
	s.stands(one, a, ext)
	if other := s.contact(two, b); other != ext {
		s.t.Fatalf("ports are not shared: %v %v", ext, other)
	}
	if other := s.contact(two, a2); other != ext {
		s.t.Fatalf("ports are not shared: %v %v", ext, other)
	}
	return one, two, a, a2, ext
}

func TestNFTSecondHostWaitsForTheFirst(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent, auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Inside: 2}, mode...)
		one, two, a, a2, ext := s.shared()
		s.listed(two, a2, ext, "waiting")
		s.arrives(one, s.peer(lab.PeerA, 5070), ext)
		if e := s.entries(); len(e) != 2 || !s.inMap(entryOf(one, a, ext)) {
			t.Errorf("the map has %v", e)
		}
		if n := s.status().Counters.Conflicts; n != 1 {
			t.Errorf("%d conflicts counted, want 1", n)
		}
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", "10.47.11.109", "--orig-port-src", "3074", "--orig-port-dst", "3074")
		s.must(err)
		s.stands(two, a2, ext)
		if !s.inMap(entryOf(two, a2, ext)) {
			t.Errorf("the map has %v", s.entries())
		}
		s.arrives(two, s.peer(lab.PeerA, 5071), ext)
	})
}

// Without a daemon too: the second one's packets neither take the element over
// nor keep it alive. When it has run out, the next packet gets it.
func TestNFTSecondHostDoesNotRefreshTheFirst(t *testing.T) {
	s := play(t, lab.Options{Inside: 2}, append(nft, "--lifetime=4s")...)
	one, two, a, a2, ext := s.shared()
	s.kill()
	last := time.Hour
	s.until("the second host has it", func() bool {
		s.contact(two, a2)
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
	s.arrives(two, s.peer(lab.PeerA, 5070), ext)
}

// Two hosts share an outside port towards different peers. The permission of one
// ends while its peer goes on sending from ever new ports: the last children, whose
// events come when the permission is gone, are no forward of the user's that would
// bar the other host's. Fails if a flow to where a permission led until just now
// counts as a forward.
func TestNFTEndOfAPermissionDoesNotBarItsNeighbour(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent, auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 2})
		s.start(subnet(mode, "--lifetime=2s", "--reconcile=1s", "--max-children=0")...)
		one, two := s.inside(0, 3074), s.inside(1, 3074)
		a, b := s.peer(lab.PeerA, 3074), s.peer(lab.PeerB, 3074)
		ext := s.contact(two, b)
		if other := s.contact(one, a); other != ext {
			t.Fatalf("ports are not shared: %v %v", ext, other)
		}
		s.stands(one, a, ext)
		s.stands(two, b, ext)
		s.steady(func() error { return two.Send(b.Addr(), "x") })
		port := uint16(10_000)
		s.steady(func() error {
			from, err := s.Outside.Socket(lab.PeerA, port)
			if err != nil {
				return err
			}
			defer from.Close()
			port = max(port+1, 10_000)
			return from.Send(ext, "x")
		})
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", "10.47.11.109", "--orig-port-src", "3074", "--orig-port-dst", "3074")
		s.must(err)
		s.until("the permission of the one has ended", func() bool {
			return !slices.ContainsFunc(s.list(), func(p control.Permission) bool { return p.Int == one.Addr() })
		})
		if n := s.status().Counters.Refused["outside port is forwarded"]; n != 0 {
			t.Errorf("the other host's was refused %d times, as if the port were forwarded", n)
		}
		s.stands(two, b, ext)
	})
}

// A one-way flow goes on sending, which would teach the kernel again.
func TestNFTRevokeHoldsWhileTheHostGoesOnSending(t *testing.T) {
	inModes(t, [][]string{nft, auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		phone, talker := s.inside(0, 5060), s.inside(0, 5061)
		proxy, sink := s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5062)
		ext, extTalker := s.contact(phone, proxy), s.contact(talker, sink)
		s.steady(func() error { return talker.Send(sink.Addr(), "x") })
		rounds := 20
		if os.Getenv("CONENATD_GUEST") != "" {
			rounds = 5
		}
		for round := range rounds {
			// A new flow brings it back.
			sink := s.peer(lab.PeerA, uint16(20_000+round))
			s.contact(talker, sink)
			s.stands(talker, sink, extTalker)
			e := entryOf(talker, sink, extTalker)
			if !s.inMap(e) {
				t.Fatalf("round %d: the map has %v", round, s.entries())
			}
			if out, code := s.cli("revoke", "--control-socket", s.d.Socket, extTalker.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
				t.Fatalf("exit %d, %q", code, out)
			}
			s.until("it is not in the map", func() bool { return !s.inMap(e) })
			for range 3 {
				if s.inMap(e) {
					t.Fatalf("round %d: revoked, and learned again", round)
				}
			}
		}
		if p := s.listed(talker, sink, extTalker, "refused"); p.Reason != "revoked by command" {
			t.Errorf("reason %q", p.Reason)
		}
		s.lost(talker, s.peer(lab.PeerA, 5070), extTalker, sink)
		s.arrives(phone, s.peer(lab.PeerA, 5071), ext)
	})
}

// Its children go with a permission, but for those that the inside host answered.
func TestNFTRevokeEndsUnansweredChildren(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent, auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
		answered, ignored := s.peer(lab.PeerA, 5070), s.peer(lab.PeerA, 5071)
		ext := s.contact(phone, proxy)
		s.stands(phone, proxy, ext)
		s.arrives(phone, answered, ext)
		s.arrives(phone, ignored, ext)
		p := payload("answer")
		s.must(phone.Send(answered.Addr(), p))
		_, err := answered.Expect(p)
		s.must(err)
		s.until("both children are listed", func() bool {
			s.must(s.d.Signal(syscall.SIGHUP)) // reads the flows
			return s.listed(phone, proxy, ext, "standing").Answered == 1
		})
		if out, code := s.cli("revoke", "--control-socket", s.d.Socket, lab.PeerA.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
			t.Fatalf("exit %d, %q", code, out)
		}
		s.until("the one that nobody answered is gone", func() bool { return !s.hasFlowFrom(ignored) })
		s.lost(phone, ignored, ext, proxy)
		s.arrives(phone, answered, ext)
	})
}

// What the kernel must not learn so quickly waits for the daemon.
func TestNFTBeyondTheLearnRateTheDaemonGrants(t *testing.T) {
	s := play(t, lab.Options{}, append(nft, "--learn-rate=1")...)
	phone := s.inside(0, 5060)
	for i := range 100 {
		s.must(phone.Send(netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)}), 9), "x"))
	}
	s.until("all stand", func() bool { return s.status().Permissions.Standing == 100 })
	if n := len(s.entries()); n != 100 {
		t.Errorf("the map has %d elements, want 100", n)
	}
	if m := s.status().Tables.Map; m.Limited == 0 || m.Learned == 0 || m.Learned+m.Limited != 100 {
		t.Errorf("%+v", m)
	}
}

// What the kernel learned beyond a limit goes at once, and does not come back
// while the host goes on sending.
func TestNFTLimitHoldsThoughTheKernelLearns(t *testing.T) {
	inModes(t, [][]string{nft, auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Inside: 2}, append(mode, "--max-permissions-per-host=2", "--reconcile=1s", "--lifetime=30s")...)
		proxy := s.peer(lab.PeerA, 5060)
		var sent []*lab.Socket
		for i := range 6 {
			phone := s.inside(0, uint16(6000+i))
			sent = append(sent, phone)
			ext := s.contact(phone, proxy)
			if i < 2 {
				s.stands(phone, proxy, ext)
			} else if p := s.listed(phone, proxy, ext, "refused"); p.Reason != "limit per inside host" {
				t.Errorf("reason %q", p.Reason)
			}
		}
		s.until("the map has but two", func() bool { return len(s.entries()) == 2 })
		s.steady(func() error {
			for _, phone := range sent {
				if err := phone.Send(proxy.Addr(), "again"); err != nil {
					return err
				}
			}
			return nil
		})
		// Over two reconciles, which try again what is refused.
		refused := s.status().Counters.Refused["limit per inside host"]
		s.until("they were tried again, twice", func() bool {
			if all := s.entries(); len(all) != 2 {
				t.Fatalf("the map has %v", all)
			}
			return s.status().Counters.Refused["limit per inside host"] >= refused+8
		})
		other, free := s.inside(1, 7000), s.peer(lab.PeerB, 5060)
		ext := s.contact(other, free)
		s.stands(other, free, ext)
		s.arrives(other, s.peer(lab.PeerB, 5070), ext)
	})
}

func TestNFTStopLeavesNothing(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent, auto, autoByEvent}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5071)
		ext := s.contact(phone, proxy)
		rules, err := s.Ruleset()
		s.must(err)
		table := s.table()
		s.start(subnet(mode)...)
		s.arrives(phone, s.peer(lab.PeerA, 5070), ext) // a child that nobody answers
		s.must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_events", "0"))
		s.arrives(phone, media, ext) // one that no event told of
		s.stop()
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
	inModes(t, [][]string{nft, auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5070)
		ext := s.contact(phone, proxy)
		s.stands(phone, proxy, ext)
		s.arrives(phone, media, ext)
		p := payload("answer")
		s.must(phone.Send(media.Addr(), p))
		_, err := media.Expect(p)
		s.must(err)
		s.stop()
		s.arrives(phone, media, ext)
		s.lost(phone, s.peer(lab.PeerA, 5071), ext, media)
	})
}

func TestNFTStopThatKeepsLeavesTheTables(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent, auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		args := subnet(mode, "--on-stop=keep", "--max-children=0")
		s.start(args...)
		phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
		ext := s.contact(phone, proxy)
		s.stands(phone, proxy, ext)
		before := s.tables()
		fresh := s.steady(s.freshPorts(phone, lab.PeerA, ext))
		s.stop()
		if after := s.tables(); len(before) != 2 || !slices.Equal(after, before) {
			t.Errorf("tables %q, were %q", after, before)
		}
		if !s.inMap(entryOf(phone, proxy, ext)) {
			t.Errorf("the map has %v", s.entries())
		}
		s.start(args...)
		t.Logf("the first packets of %d children arrived meanwhile", fresh())
		if n := s.status().Counters.Granted; n != 0 {
			t.Errorf("%d permissions were granted anew, want all taken over", n)
		}
		s.stop()
		s.start(subnet(mode)...)
		s.stop()
		if left := s.tables(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
		if left := append(s.conntrack("expect"), s.anchors()...); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

func TestNFTForeignTableIsLeftAloneAndNamed(t *testing.T) {
	s := newScene(t, lab.Options{Rules: lab.Masquerade + "table ip conenat {\n\tmap permissions {\n\t\ttype ipv4_addr : ipv4_addr\n\t}\n}\n"})
	before, err := s.Ruleset()
	s.must(err)
	for _, mode := range [][]string{nft, auto, expects} {
		args := slices.Concat([]string{"run"}, subnet(mode, "--control-socket", filepath.Join(t.TempDir(), "c.sock")))
		out, code := s.cli(args...)
		if code != 1 || !strings.Contains(out, "table ip conenat") || !strings.Contains(out, `key "table"`) {
			t.Errorf("%v: exit %d, %q", mode, code, out)
		}
	}
	s.start(subnet(nft, "--table=conenat2")...)
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	s.arrives(phone, s.peer(lab.PeerA, 5070), ext)
	s.stop()
	if after, err := s.Ruleset(); err != nil || after != before {
		t.Errorf("the rule set is %v\n%s\nnot\n%s", err, after, before)
	}
}

// A list of the map is a walk that the daemon's own refreshes disturb: what it
// misses is not lost.
func TestNFTRefreshIsNotTakenForLoss(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent}, func(t *testing.T, mode ...string) {
		const ports, peers = 50, 200
		s := newScene(t, lab.Options{})
		s.must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
		s.start(subnet(mode, "--max-permissions-per-host=0", "--learn-rate=100000", "--reconcile=1s", "--lifetime=6s")...)
		for port := range ports {
			in := s.inside(0, uint16(10_000+port))
			for i := range peers {
				s.must(in.Send(netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i)}), 9), "x"))
			}
			in.Close()
		}
		began := time.Now()
		s.until("three lifetimes passed", func() bool {
			s.status()
			return time.Since(began) > 18*time.Second
		})
		st := s.status()
		t.Logf("%d stand", st.Permissions.Standing)
		if st.Counters.Repaired != 0 || st.Tables.Repaired != 0 {
			t.Errorf("%d permissions and %d tables were put back, though nobody took any away", st.Counters.Repaired, st.Tables.Repaired)
		}
	})
}

// Two hundred thousand permissions, learned by the kernel or granted from events:
// all stand, all work, and all go.
func TestNFTManyPermissions(t *testing.T) {
	inModes(t, [][]string{nft, nftByEvent}, func(t *testing.T, mode ...string) {
		const peers = 500
		ports := 400
		if os.Getenv("CONENATD_GUEST") != "" {
			ports = 40
		}
		s := newScene(t, lab.Options{Inside: 2})
		s.must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
		s.start(subnet(mode, "--max-permissions-per-host=0", "--learn-rate=100000", "--event-buffer=67108864")...)
		peer := func(i int) netip.Addr {
			if i < peers/2 {
				return netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i)})
			}
			return netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i - peers/2)})
		}
		inside := func(port int) *lab.Socket { return s.inside(port%2, uint16(10_000+port)) }
		send := func(port int, wanted func(p netip.Addr) bool) {
			in := inside(port)
			defer in.Close()
			for i := range peers {
				if p := peer(i); wanted(p) {
					s.must(in.Send(netip.AddrPortFrom(p, 9), "x"))
				}
			}
		}

		began := time.Now()
		const atOnce = 20 // ports
		for first := 0; first < ports; first += atOnce {
			for port := first; port < first+atOnce; port++ {
				send(port, func(netip.Addr) bool { return true })
			}
			s.allStand((first+atOnce)*peers, func(known map[pair]bool) {
				for port := first; port < first+atOnce; port++ {
					send(port, func(p netip.Addr) bool { return !known[pair{uint16(10_000 + port), p}] })
				}
			})
		}
		took := time.Since(began)
		st := s.status()
		t.Logf("%d permissions in %v, %.0f in a second; %+v; %d overruns, %d learned",
			ports*peers, took.Round(time.Millisecond), float64(ports*peers)/took.Seconds(), st.Latency, st.Events.Overruns, st.Tables.Map.Learned)
		if st.Permissions.Standing != ports*peers || st.Permissions.Refused != 0 {
			t.Errorf("%+v", st.Permissions)
		}
		if n := s.countEntries(); n != ports*peers {
			t.Errorf("%d elements, want %d", n, ports*peers)
		}
		for range 100 {
			port, p := rand.N(ports), peer(rand.N(peers))
			in := inside(port)
			from := s.peer(p, 0)
			s.arrives(in, from, netip.AddrPortFrom(s.Gateway.Addr, in.Addr().Port()))
			in.Close()
			from.Close()
		}
		began = time.Now()
		s.stop()
		t.Logf("stopped in %v", time.Since(began).Round(time.Millisecond))
		if left := s.leftovers(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

// countEntries is len(s.entries()) for so many that nft takes too long.
func (s *scene) countEntries() (n int) {
	s.t.Helper()
	c, err := nfnl.Dial(s.Gateway.FD())
	s.must(err)
	defer c.Close()
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSETELEM, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, c.NextSeq(1), unix.AF_INET)
	e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, "conenat")
	e.Str(unix.NFTA_SET_ELEM_LIST_SET, "permissions")
	e.End()
	err = c.Exchange(&e, func(_ uint32, refused error) { s.t.Error(refused) }, func(_ uint16, body []byte) {
		const header = 4 // struct nfgenmsg
		list, err := netlink.NewAttributeDecoder(body[header:])
		s.must(err)
		for list.Next() {
			if list.Type() == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				list.Nested(func(elements *netlink.AttributeDecoder) error {
					n += elements.Len()
					return nil
				})
			}
		}
		s.must(list.Err())
	})
	s.must(err)
	return n
}

type pair struct {
	port uint16 // inside
	peer netip.Addr
}

// allStand waits until so many permissions stand. When their number does not grow
// it calls again with what is known: a busy machine loses packets.
func (s *scene) allStand(want int, again func(known map[pair]bool)) {
	s.t.Helper()
	last := 0
	s.until(fmt.Sprintf("%d permissions stand", want), func() bool {
		n := s.status().Permissions.Standing
		if n < want && n == last {
			known := map[pair]bool{}
			for _, p := range s.list() {
				known[pair{p.Int.Port(), p.Peer}] = true
			}
			again(known)
		}
		last = n
		return n == want
	})
}
