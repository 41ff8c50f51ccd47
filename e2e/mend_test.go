package e2e

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Other hands on the tables, and a configuration that changes while packets come.

// owned reports whether the kernel (Linux 6.9) keeps others from changing the
// tables.
func (s *scene) owned() bool {
	s.T.Helper()
	out, err := s.Gateway.Output("nft", "list", "table", "ip", "conenat")
	s.Must(err)
	return strings.Contains(out, "flags owner")
}

// reloadRules is what "systemctl reload nftables" does.
const reloadRules = "flush ruleset\n" + lab.Masquerade

// TestMendWhatSomebodyChanged changes the tables by hand. Where they are owned
// the kernel refuses, or passes them by; else they are put back. In either case
// what stands stands, children get in, and what is there goes on.
func TestMendWhatSomebodyChanged(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change string // rules; %s is the element of a permission
		rules  bool   // it is one of the rules, not of the permissions alone
	}{
		{"flush ruleset", reloadRules, true},
		{"delete table ip", "delete table ip conenat", true},
		{"delete table inet", "delete table inet conenat", true},
		{"delete both tables", "delete table ip conenat\ndelete table inet conenat", true},
		{"flush table", "flush table ip conenat", true},
		{"flush chain admit", "flush chain ip conenat admit", true},
		{"flush chain admitted", "flush chain ip conenat admitted", true},
		{"flush chain learn", "flush chain ip conenat learn", true},
		{"flush chain guard", "flush chain inet conenat guard", true},
		{"insert rule", "insert rule ip conenat admit drop", true},
		{"flush set of learn", "flush set ip conenat subnets", true},
		{"flush map", "flush map ip conenat permissions", false},
		{"delete element", "delete element ip conenat permissions { %s }", false},
		{
			"change element", "delete element ip conenat permission_ports { %[1]s }\n" +
				"add element ip conenat permission_ports { %[1]s : 9 }", false,
		},
		{
			"add element", "add element ip conenat permission_ports { 203.0.113.99 . 198.51.100.1 . 5060 : 5060 }\n" +
				"add element ip conenat permissions { 203.0.113.99 . 198.51.100.1 . 5060 : 10.47.11.109 }", false,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			modes := [][]string{stage.NFT, stage.Auto, stage.NFTByEvent}
			if strings.HasSuffix(tc.name, "learn") {
				modes = modes[:2]
			}
			stage.InModes(t, modes, func(t *testing.T, mode ...string) {
				s := play(t, lab.Options{Inside: 2}, append(mode, "--max-children=0")...)
				phone, other := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061)
				a, b := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
				ext := s.Contact(phone, a)
				s.Contact(phone, b)
				s.Stands(phone, a, ext)
				s.Stands(phone, b, ext)
				child, extOther := s.PeerSocket(lab.PeerA, 5070), s.Contact(other, a)
				s.Stands(other, a, extOther)
				s.Arrives(other, child, extOther)
				want := s.entries()
				if len(want) != 3 {
					t.Fatalf("the map has %v", want)
				}
				key, _, _ := strings.Cut(entryOf(phone, a, ext).String(), " :")
				change := strings.ReplaceAll(strings.ReplaceAll(tc.change, "%[1]s", key), "%s", key)
				s.meddle(change, tc.rules, phone, ext, want)
				s.Arrives(other, child, extOther)
			})
		})
	}
}

// A rule is deleted by its handle.
func TestMendRuleThatSomebodyDeleted(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, append(mode, "--max-children=0")...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		out, err := s.Gateway.Output("nft", "--handle", "list", "chain", "ip", "conenat", "admitted")
		s.Must(err)
		_, rule, _ := strings.Cut(out, `counter name "admitted"`)
		_, handle, ok := strings.Cut(rule, "handle ")
		if !ok {
			t.Fatalf("no rule that admits in\n%s", out)
		}
		change := "delete rule ip conenat admitted handle " + strings.Fields(handle)[0]
		s.meddle(change, true, phone, ext, s.entries())
	})
}

var volatile = regexp.MustCompile(`\s*elements = \{[^}]*\}`)

// meddle changes the tables and waits until all is as before: children get in,
// the map has what it had, and the rules are the same.
func (s *scene) meddle(change string, ofRules bool, in *lab.Socket, ext netip.AddrPort, want map[entry]time.Duration) {
	s.T.Helper()
	owned := s.owned()
	list := func() string {
		s.T.Helper()
		all, err := s.Ruleset()
		s.Must(err)
		var ours []string
		for _, table := range noise.FindAllString(all, -1) {
			ours = append(ours, volatile.ReplaceAllString(table, ""))
		}
		slices.Sort(ours) // a table that was made again comes last
		return strings.Join(ours, "")
	}
	rules := list()
	began := time.Now()
	err := s.NFT(change)
	if owned {
		if refused := err != nil && strings.Contains(err.Error(), "Operation not permitted"); !refused && !strings.HasPrefix(change, "flush ruleset") {
			s.T.Errorf("the kernel does not refuse to change a table that is owned: %v", err)
		}
		s.Arrives(in, s.PeerSocket(lab.PeerA, 6000), ext)
	} else {
		s.Must(err)
	}
	first := s.PeerSocket(lab.PeerA, 6001)
	var have map[entry]time.Duration
	same := func() bool {
		have = s.entries()
		for e := range want {
			if _, ok := have[e]; !ok {
				return false
			}
		}
		return len(have) == len(want)
	}
	leadsElsewhere := strings.HasPrefix(change, "delete element") && strings.Contains(change, "add element")
	if leadsElsewhere && !owned {
		// A child that came meanwhile would look like a forward of the user's.
		s.Until("the map is as it was", same)
	}
	if !s.GetsIn(in, first, ext) {
		s.Until("children get in", func() bool {
			from, err := s.Outside.Socket(lab.PeerA, 0)
			s.Must(err)
			defer from.Close()
			return s.GetsIn(in, from, ext)
		})
	}
	children := time.Since(began)
	s.Until("one whose first packet was too early gets in too", func() bool { return s.GetsIn(in, first, ext) })
	s.Until("the map is as it was", same)
	permissions := time.Since(began)
	defer func() {
		if s.T.Failed() {
			s.T.Log(cmp.Diff(rules, list()))
		}
	}()
	s.Until("the rules are as they were", func() bool { return list() == rules })
	s.T.Logf("owned: %v; a child got in after %v; the permissions were complete after %v, the rules after %v",
		owned, children.Round(time.Millisecond), permissions.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	if owned {
		s.Must(s.Daemon.Signal(syscall.SIGHUP))
		if st := s.Status(); st.Tables.Repaired != 0 || len(st.Counters.Repaired) != 0 {
			s.T.Errorf("%d repairs of tables and %v counted", st.Tables.Repaired, st.Counters.Repaired)
		}
		return
	}
	s.Until("the repair is counted", func() bool {
		st := s.Status()
		return !ofRules || st.Tables.Repaired > 0
	})
}

// toml is a configuration for one mode, with the flags of it as keys.
func toml(mode []string) string {
	text := "max_children = 0\nreconcile = \"1s\"\n"
	for _, flag := range mode {
		key, value, _ := strings.Cut(strings.TrimPrefix(flag, "--"), "=")
		if key == "backend" {
			value = strconv.Quote(value)
		}
		text += fmt.Sprintf("%s = %s\n", key, value)
	}
	return text + fmt.Sprintf("[[subnet]]\nprefix = %q\n", lab.InsideNet)
}

// From each mode to each other one: not one first packet of a child is lost, nor
// one of an existing child, and what the new mode does not have is gone.
func TestMendNothingIsLostBetweenModes(t *testing.T) {
	way := [][]string{stage.Auto, stage.NFT, stage.Expect, stage.NFT, stage.Auto, stage.Expect, stage.Auto, stage.AutoByEvent, stage.NFTByEvent, stage.Auto}
	s := newScene(t, lab.Options{Inside: 3})
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
	write := s.configured(toml(way[0]))
	proxy, media := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5070)
	one, two, three := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061), s.InsideSocket(2, 5062)
	extOne, extTwo, extThree := s.Contact(one, proxy), s.Contact(two, media), s.Contact(three, proxy)
	s.Stands(one, proxy, extOne)
	s.Stands(two, media, extTwo)
	s.Stands(three, proxy, extThree)
	child := s.PeerSocket(lab.PeerB, 5071)
	s.Arrives(two, child, extTwo)
	fresh := s.Steady(s.FreshPorts(one, lab.PeerA, extOne))
	same := s.Steady(s.OnOnePort(two, child, extTwo))
	for i, mode := range way[1:] {
		write(toml(mode))
		s.Must(s.Daemon.Signal(syscall.SIGHUP))
		learns, backend := !slices.Contains(mode, "--learn=false"), strings.TrimPrefix(mode[0], "--backend=")
		hasMap, hasExpect := backend != "expect", backend != "nft"
		expected := backend == "expect" // in auto the map carries all, for the firewall accepts it
		s.Until(fmt.Sprintf("%v is in force", mode), func() bool {
			st := s.Status()
			return st.Tables.Map.On == hasMap && st.Tables.Map.Learn == (hasMap && learns) && strings.HasPrefix(st.Backend, "expect") == hasExpect
		})
		// What is left of the other backend goes at the end of the change.
		s.Until("the other backend is gone", func() bool {
			return slices.Contains(s.tables(), "table ip conenat") == hasMap &&
				(len(s.ConntrackList("expect")) > 0) == expected && (len(s.Anchors()) > 0) == expected
		})
		for _, p := range s.List() {
			if p.State != "standing" {
				t.Errorf("from %v to %v: %+v", way[i], mode, p)
			}
		}
		// One more, of this mode.
		in, peer := s.InsideSocket(0, uint16(6000+i)), s.PeerSocket(lab.PeerC, uint16(6000+i))
		ext := s.Contact(in, peer)
		s.Stands(in, peer, ext)
		s.Arrives(in, s.PeerSocket(lab.PeerC, uint16(7000+i)), ext)
		s.Arrives(three, s.PeerSocket(lab.PeerA, uint16(7000+i)), extThree)
	}
	t.Logf("%d changes; %d first packets of children and %d others arrived", len(way)-1, fresh(), same())
	if n := s.Status().Tables.Repaired; n != 0 {
		t.Errorf("%d repairs counted, though nobody else changed the tables", n)
	}
	if n := len(s.List()); n != 3+len(way)-1 {
		t.Errorf("%d permissions, want %d\n%s", n, 3+len(way)-1, s.Dump())
	}
	s.Stop()
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// What only the map had room for is refused by expectations alone, and listed so;
// when the map is back, so are they.
func TestMendPermissionsBeyondTheRoomForExpectations(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	write := s.configured(toml(stage.NFT))
	phone := s.InsideSocket(0, 5060)
	var ext netip.AddrPort
	for i := range 70 {
		peer := s.PeerSocket(netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)}), 5060)
		ext = s.Contact(phone, peer)
		s.Stands(phone, peer, ext)
	}
	port := uint16(20_000)
	change := func(mode []string, standing int) {
		t.Helper()
		write(toml(mode))
		if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
			t.Fatalf("exit %d, %q", code, out)
		}
		s.Until(fmt.Sprintf("%d stand with %v", standing, mode), func() bool { return s.Status().Permissions.Standing == standing })
		port++
		for _, p := range s.List() {
			if p.State == "standing" {
				s.Arrives(phone, s.PeerSocket(p.Peer, port), ext)
			} else if p.Reason == "" {
				t.Errorf("refused without a reason: %+v", p)
			}
		}
	}
	change(stage.Expect, 64)
	change(stage.NFTByEvent, 70)
	change(stage.Auto, 70)
	change(stage.Expect, 64)
	change(stage.Auto, 70)
	change(stage.NFT, 70)
}

// Many peers on a few ports find no room for expectations there. That does not keep
// those on other ports from theirs. Fails if the same ones are tried each time.
func TestMendCrowdedPortsDoNotTakeTheTurnOfOthers(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.Masquerade + lab.DropPolicy})
	config := func(mode []string) string {
		return "max_permissions_per_host = 0\nlearn_rate = 100000\n" + toml(mode)
	}
	write := s.configured(config(stage.NFT))
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
	const ports, peers = 16, 250 // more than there may be expectations in a lab
	for port := range ports {
		in := s.InsideSocket(0, uint16(10_000+port))
		for i := range peers {
			s.Must(in.Send(netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i)}), 9), "x"))
		}
		in.Close()
		// The burst of all ports would overflow the backlog of a slow machine.
		s.Until("nearly all of the port stand", func() bool { return s.Status().Permissions.Standing > (port+1)*peers*9/10 })
	}
	phone, proxy := s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	write(config(stage.Auto))
	if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
		t.Fatalf("exit %d, %q", code, out)
	}
	s.Until("the last one has an expectation too", func() bool {
		return s.Listed(phone, proxy, ext, "standing").Backend == "expect"
	})
}

// A large map is not listed at a change of the mode. What there is room for becomes an
// expectation all the same, and these stay when the map goes. Fails when compare
// completes only what it found in a list.
func TestMendLargeMapGetsItsExpectations(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy})
	config := func(mode []string) string {
		return "max_permissions_per_host = 0\nlearn_rate = 100000\n" + toml(mode)
	}
	write := s.configured(config(stage.NFT))
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
	const large, peers, room = 1 << 15, 250, 3000
	for port := uint16(10_000); s.Status().Permissions.Standing <= large; port++ {
		in := s.InsideSocket(0, port)
		for i := range peers {
			s.Must(in.Send(netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i)}), 9), "x"))
		}
		in.Close()
	}
	change := func(mode []string) {
		t.Helper()
		write(config(mode))
		if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
			t.Fatalf("exit %d, %q", code, out)
		}
	}
	change(stage.Auto)
	s.Until("there are expectations", func() bool { return s.Status().Permissions.Expectations > room })
	change(stage.Expect)
	if p := s.Status().Permissions; p.Standing <= room {
		t.Errorf("%+v", p)
	}
}

// A daemon of one mode takes over what one of another mode left.
func TestMendAnotherModeTakesOver(t *testing.T) {
	modes := [][]string{stage.Auto, stage.NFT, stage.Expect}
	for _, from := range modes {
		for _, to := range modes {
			if from[0] == to[0] {
				continue
			}
			t.Run(from[0][10:]+" to "+to[0][10:], func(t *testing.T) {
				s := newScene(t, lab.Options{Inside: 2})
				s.Start(stage.Flags(from)...)
				held, lingering := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061)
				a, b := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
				extHeld, extLingering := s.Contact(held, a), s.Contact(lingering, b)
				s.Stands(held, a, extHeld)
				s.Stands(lingering, b, extLingering)
				s.Kill()
				_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5061", "--orig-port-dst", "5060")
				s.Must(err)
				s.Start(stage.Flags(to)...)
				s.Stands(held, a, extHeld)
				s.Stands(lingering, b, extLingering)
				s.Arrives(held, s.PeerSocket(lab.PeerA, 5070), extHeld)
				s.Arrives(lingering, s.PeerSocket(lab.PeerB, 5070), extLingering)
				hasMap, expectations := to[0] != stage.Expect[0], 0
				if !hasMap { // in auto the map carries all, for the firewall accepts it
					expectations = 2
				}
				s.Until("both stand by the new mode alone", func() bool {
					return len(s.ConntrackList("expect")) == expectations && (len(s.entries()) == 2) == hasMap && slices.Contains(s.tables(), "table ip conenat") == hasMap
				})
				s.Stop()
				if left := s.Leftovers(); len(left) > 0 {
					t.Errorf("left: %q", left)
				}
			})
		}
	}
}

// Of what the map had, as many stand as there is room for, and the list says so.
func TestMendModeWithLessRoomTakesOver(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	s.Start(stage.Flags(stage.NFT)...)
	phone := s.InsideSocket(0, 5060)
	var ext netip.AddrPort
	for i := range 70 {
		peer := s.PeerSocket(netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)}), 5060)
		ext = s.Contact(phone, peer)
		s.Stands(phone, peer, ext)
	}
	s.Kill()
	s.Start(stage.Flags(stage.Expect)...)
	s.Until("64 stand, 6 are refused", func() bool {
		p := s.Status().Permissions
		return p.Standing == 64 && p.Refused == 6
	})
	for _, p := range s.List() {
		if p.State == "standing" {
			s.Arrives(phone, s.PeerSocket(p.Peer, 5070), ext)
		}
	}
}

// The kernel stops to learn what is not allowed any more, though the host goes on
// sending, and learns it when it is.
func TestMendExclusionsOfANewConfiguration(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		write := s.configured(toml(mode))
		talker, sink := s.InsideSocket(0, 5061), s.PeerSocket(lab.PeerA, 5062)
		ext := s.Contact(talker, sink)
		s.Stands(talker, sink, ext)
		e := entryOf(talker, sink, ext)
		s.Steady(func() error { return talker.Send(sink.Addr(), "x") })
		for key, value := range map[string]string{
			"exclude_peers": `["203.0.113.5/32"]`, "exclude_peer_ports": "[5062]", "exclude_ports": "[5061]",
		} {
			write(key + " = " + value + "\n" + toml(mode))
			if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
				t.Fatalf("exit %d, %q", code, out)
			}
			s.Until("it is not in the map", func() bool { return !s.inMap(e) })
			for range 5 {
				if s.inMap(e) {
					t.Fatalf("%s: it was learned again", key)
				}
			}
			s.Until("it is not listed", func() bool { return len(s.List()) == 0 })
			write(toml(mode))
			if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
				t.Fatalf("exit %d, %q", code, out)
			}
			s.Stands(talker, sink, ext)
			s.Until("it is in the map again", func() bool { return s.inMap(e) })
		}
	})
}

// More room, or less, takes nothing from what stands.
func TestMendLimitThatAReloadChanges(t *testing.T) {
	for _, mode := range [][]string{stage.NFT, stage.Auto} {
		stage.InModes(t, [][]string{mode}, func(t *testing.T, mode ...string) {
			s := newScene(t, lab.Options{Inside: 2})
			write := s.configured(toml(mode))
			one, two, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061), s.PeerSocket(lab.PeerA, 5060)
			extOne, extTwo := s.Contact(one, proxy), s.Contact(two, proxy)
			s.Stands(one, proxy, extOne)
			s.Stands(two, proxy, extTwo)
			fresh := s.Steady(s.FreshPorts(one, lab.PeerA, extOne))
			for _, size := range []int{1000, 500, 2000} {
				write(fmt.Sprintf("max_permissions = %d\n%s", size, toml(mode)))
				if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
					t.Fatalf("exit %d, %q", code, out)
				}
				if n := s.Status().Permissions.Limit; n != size {
					t.Errorf("the limit is %d, want %d", n, size)
				}
				if n := len(s.entries()); n != 2 {
					t.Errorf("the map has %d permissions, want 2", n)
				}
			}
			// A map of another size would begin empty.
			write("max_permissions = 2000000\n" + toml(mode))
			if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code == 0 || !strings.Contains(out, "max_permissions: the map of permissions has 1048576 places") {
				t.Errorf("exit %d, %q", code, out)
			}
			if n := len(s.entries()); n != 2 {
				t.Errorf("the map has %d permissions, want 2", n)
			}
			s.Arrives(two, s.PeerSocket(lab.PeerA, 5070), extTwo)
			t.Logf("the first packets of %d children arrived", fresh())
			s.Kill()
			s.Start(append(stage.Flags(mode), "--max-permissions=2000000")...)
			if n := len(s.entries()); n != 2 {
				t.Errorf("after a restart the map has %d permissions, want 2", n)
			}
		})
	}
}

// While no daemon runs nobody owns the tables. Whatever somebody did to them, the
// next one puts it right.
func TestMendAtTheStart(t *testing.T) {
	for name, change := range map[string]string{
		"flush ruleset": reloadRules, "delete table ip": "delete table ip conenat",
		"delete table inet": "delete table inet conenat", "flush chain": "flush chain ip conenat admit",
		"flush map": "flush map ip conenat permissions", "insert rule": "insert rule ip conenat admit drop",
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
				s := newScene(t, lab.Options{})
				s.Start(stage.Flags(mode)...)
				phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
				ext := s.Contact(phone, proxy)
				s.Stands(phone, proxy, ext)
				s.Kill()
				s.Must(s.NFT(change))
				s.Start(stage.Flags(mode)...)
				s.Stands(phone, proxy, ext)
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
				if !s.inMap(entryOf(phone, proxy, ext)) {
					t.Errorf("the map has %v", s.entries())
				}
				s.Stop()
				if left := s.Leftovers(); len(left) > 0 {
					t.Errorf("left: %q", left)
				}
			})
		})
	}
}
