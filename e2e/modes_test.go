package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// toml is a configuration for one mode; its flags become keys.
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

// The mode changes again and again: no first packet of a child is lost, nor one of an
// existing child, and a backend that the new mode lacks leaves nothing behind.
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
		expected := backend == "expect" // in auto the map carries all, because the firewall accepts its children
		s.Until(fmt.Sprintf("%v is in force", mode), func() bool {
			st := s.Status()
			return st.Tables.Map.On == hasMap && st.Tables.Map.Learn == (hasMap && learns) && strings.HasPrefix(st.Backend, "expect") == hasExpect
		})
		// The other backend's permissions are removed at the end of the change.
		s.Until("the other backend is gone", func() bool {
			return s.hasMap() == hasMap &&
				(len(s.ConntrackList("expect")) > 0) == expected && (len(s.Anchors()) > 0) == expected
		})
		for _, p := range s.List() {
			if p.State != "standing" {
				t.Errorf("from %v to %v: %+v", way[i], mode, p)
			}
		}
		// One more permission, granted in this mode.
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

// Permissions that fit only into the map are refused while there are only
// expectations, and listed so. When the map is back, they stand again.
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

// Many peers on a few ports find no room for expectations there. Permissions on other
// ports still get theirs. Fails when each attempt tries the same permissions.
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
		return s.Listed(phone, proxy, ext, "standing").Backend == "expect+nft"
	})
}

// A change of the mode does not list a large map. Expectations are still made as far
// as there is room, and stay when the map goes. Fails when compare completes only
// permissions that it found in a list.
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

// A daemon takes over what a daemon in another mode left.
func TestMendAnotherModeTakesOver(t *testing.T) {
	t.Parallel() // mostly it waits
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
				if !hasMap { // in auto the map carries all, because the firewall accepts its children
					expectations = 2
				}
				s.Until("both stand by the new mode alone", func() bool {
					return len(s.ConntrackList("expect")) == expectations && (len(s.entries()) == 2) == hasMap && s.hasMap() == hasMap
				})
				s.Stop()
				if left := s.Leftovers(); len(left) > 0 {
					t.Errorf("left: %q", left)
				}
			})
		}
	}
}

// A mode with less room takes over as many of the map's permissions as fit, and lists
// the rest as refused.
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
