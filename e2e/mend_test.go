package e2e

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Others change our tables, and reloads change the configuration, while packets
// come.

// owned reports whether we own the tables (Linux 6.9 or later), so that others
// cannot change them.
func (s *scene) owned() bool {
	s.T.Helper()
	out, err := s.Gateway.Output("nft", "list", "table", "ip", "conenat")
	s.Must(err)
	return strings.Contains(out, "flags owner")
}

// reloadRules is what "systemctl reload nftables" does.
const reloadRules = "flush ruleset\n" + lab.Masquerade

// TestMendWhatSomebodyChanged changes the tables by hand. If they are owned, the
// kernel refuses the change or skips them; otherwise the daemon repairs them.
// Either way permissions stay, children get in, and existing flows go on.
func TestMendWhatSomebodyChanged(t *testing.T) {
	t.Parallel() // mostly it waits
	for _, tc := range []struct {
		name   string
		change string // rules; %s is the element of a permission
		rules  bool   // the change affects rules, not only permissions
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

// The same for a rule that is deleted by its handle.
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

// meddle changes the tables and waits until children get in, and until the map and
// the rules are as before.
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
		slices.Sort(ours) // a table that was made again is listed last
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
		// A child that came now would go elsewhere, and so look like a forward of
		// the user's.
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

// The host sends all the time. When a reload excludes its flow, the kernel stops
// learning it; when the exclusion ends, the kernel learns it again.
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

// A reload that changes the limit removes no permission.
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
			// A map of another size would start empty, so the reload is refused.
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

// While no daemon runs nobody owns the tables. The next daemon repairs whatever
// others changed.
func TestMendAtTheStart(t *testing.T) {
	t.Parallel() // mostly it waits
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
