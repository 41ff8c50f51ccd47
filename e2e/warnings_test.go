package e2e

import (
	"maps"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// told waits until status and log have the warning with this text.
func (s *scene) told(text string) {
	s.T.Helper()
	s.Until("the status warns of it", func() bool {
		return stage.Warned(s.Status(), text)
	})
	s.Until("the log warns of it", func() bool { return s.logs("WARN", text) == 1 })
}

// over waits until status no longer has the warning with this text, and the log says so.
func (s *scene) over(text string) {
	s.T.Helper()
	s.Until("the status does not warn of it any more", func() bool {
		return !stage.Warned(s.Status(), text)
	})
	s.Until("the log says that it is over", func() bool { return s.logs("INFO", "no longer: ", text) == 1 })
}

// logs counts the log lines at this level that contain all texts.
func (s *scene) logs(level string, texts ...string) (n int) {
	for line := range strings.Lines(s.Daemon.Output()) {
		all := strings.Contains(line, "level="+level)
		for _, t := range texts {
			all = all && strings.Contains(line, t)
		}
		if all {
			n++
		}
	}
	return n
}

const noNAT = "no source NAT: "

// The gateway does not translate: a warning says so until it does.
//
// Fails when the rules alone do not tell, when untranslated flows are not counted, and when warnings
// are logged only at the start.
func TestMissingSourceNATIsTold(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Rules: "table ip without_nat { }"})
	s.Start("--guard", "--learn", "--subnet", lab.InsideNet.String(), "--reconcile=1s")
	if w := s.Status().Warnings; len(w) != 1 || !strings.HasPrefix(w[0], noNAT+"no rule of yours") {
		t.Errorf("warnings %q", w)
	}
	if out, _ := s.CLI("status"); !strings.HasPrefix(out, "does not work: 10.47.11.0/24: no source NAT\n") {
		t.Error(out)
	}
	peer := s.PeerSocket(lab.PeerA, 5060)
	for i := range uint16(5) {
		s.Must(s.InsideSocket(0, 5060+i).Send(peer.Addr(), "no way back"))
	}
	s.told(noNAT)
	s.Until("all are counted", func() bool {
		st := s.Status()
		return st.Counters.Skipped["untranslated"] == 5 && len(st.Warnings) == 1 &&
			strings.HasPrefix(st.Warnings[0], noNAT+"5 flows of 10.47.11.0/24 ")
	})
	s.Must(s.InsideSocket(0, 5065).Send(peer.Addr(), "no way back"))
	s.Until("one more is counted", func() bool { return s.Status().Counters.Skipped["untranslated"] == 6 })
	s.Must(s.Flush()) // or the flows from before would be named as broken
	s.Must(s.NFT(lab.Masquerade))
	s.Contact(s.InsideSocket(0, 5066), s.PeerSocket(lab.PeerA, 5061))
	s.over(noNAT)
	if n := s.logs("WARN", noNAT); n != 1 {
		t.Errorf("logged %d times\n%s", n, s.Daemon.Output())
	}
	if w := s.Status().Warnings; w == nil || len(w) > 0 {
		t.Errorf("warnings %q", w)
	}
	// The script of a firewall that forgets it: what was translated before proves nothing.
	s.Must(s.NFT("delete table ip nat"))
	s.Until("it is told again", func() bool {
		out, _ := s.CLI("status")
		return strings.HasPrefix(out, "does not work: 10.47.11.0/24: no source NAT\n")
	})
}

// One of the gateway's networks has public addresses, and a rule translates towards all
// links, so nobody can tell whether it is outside. It also has private addresses and is not
// enabled.
//
// Fails when every network that is not behind an outside link counts as inside, and when a
// translated flow alone makes its link outside.
func TestLinkThatShouldBeOutsideIsNamed(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Guest: true, Rules: natBy()})
	public := netip.MustParseAddr("198.51.200.20")
	s.IP(s.Gateway, "addr add 198.51.200.1/24 dev guest0")
	s.IP(s.Guest, "addr add 198.51.200.20/24 dev eth0")
	s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s")
	phone, peer := s.InsideSocket(0, 5060), s.Socket(s.Guest.Namespace, public, 5060)
	s.Contact(phone, peer)
	s.told("1 translated flows of enabled hosts left by guest0, which is no outside link")
	s.Contact(phone, s.Socket(s.Guest.Namespace, s.Guest.Addr, 5060))
	s.Until("both are skipped", func() bool { return s.Status().Counters.SkippedLinks["guest0"] == 2 })
	c := s.Status().Counters
	if want := map[string]uint64{"guest0": 2}; !maps.Equal(c.SkippedLinks, want) {
		t.Errorf("skipped by link: %v, want %v", c.SkippedLinks, want)
	}
	if want := map[string]uint64{"not_outside": 2}; !maps.Equal(c.Skipped, want) {
		t.Errorf("skipped: %v, want %v", c.Skipped, want)
	}
	if w := s.Status().Warnings; len(w) != 1 {
		t.Errorf("warnings %q", w)
	}
	s.IP(s.Gateway, "route add default via 198.51.200.20 dev guest0 table 102")
	s.over("left by guest0")
	again := s.Socket(s.Guest.Namespace, public, 5061)
	s.Stands(phone, again, s.Contact(phone, again))
}

// A user rule translates before ours: status must not say that mapping is on.
//
// Fails when status reports the configured value.
func TestMappingThatIsNotInForceIsTold(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Inside: 2})
	s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s", "--mapping=endpoint_independent")
	peers := []*lab.Socket{s.PeerSocket(lab.PeerA, 3074), s.PeerSocket(lab.PeerB, 3074), s.PeerSocket(lab.PeerA, 3075), s.PeerSocket(lab.PeerB, 3075)}
	one := s.InsideSocket(0, 3074)
	for _, p := range peers {
		s.Contact(one, p)
	}
	s.Until("it is in force", func() bool {
		st := s.Status()
		return st.Tables.Mapping.On && st.Subnets[0].Mapping == "endpoint_independent" && len(st.Tables.Mapping.NotApplied) == 0
	})
	s.Must(s.NFT(`table ip early {
	chain postrouting {
		type nat hook postrouting priority -199; policy accept;
		oifname "wan0" meta l4proto udp masquerade to :40000-49999 fully-random
	}
}
`))
	for i := range uint16(4) {
		in := s.InsideSocket(1, 5000+i)
		for _, p := range peers {
			s.Contact(in, p)
		}
	}
	s.told("endpoint-independent mapping is not in force: ")
	st := s.Status()
	if st.Tables.Mapping.On || st.Subnets[0].Mapping != "kernel" {
		t.Errorf("mapping %+v, subnets %+v", st.Tables.Mapping, st.Subnets)
	}
	out, _ := s.CLI("status", "--control-socket", s.Daemon.Socket)
	if !strings.Contains(out, "flows did not get their mapping: ") {
		t.Errorf("status says\n%s", out)
	}
	// Without that rule mapping is in force again once these flows are gone.
	_, err := s.Gateway.Output("nft", "delete", "table", "ip", "early")
	s.Must(err)
	_, err = s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", s.Inside(1).Addr.String())
	s.Must(err)
	s.over("endpoint-independent mapping is not in force")
	s.Until("it is in force again", func() bool { return s.Status().Tables.Mapping.On })
}

// The user forwards a phone's port to another port of the same phone, which goes on
// sending.
//
// Fails when each reconcile logs that the permission is refused.
func TestRefusalThatGoesOnIsLoggedOnce(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Rules: lab.Masquerade + `table ip forwards {
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		iifname "wan0" udp dport 5060 dnat to 10.47.11.109:5061
	}
}
`})
	s.Start("--subnet", lab.InsideNet.String(), "--backend=expect", "--reconcile=1s")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	s.Listed(phone, proxy, s.Contact(phone, proxy), "refused")
	s.Until("it was refused many times", func() bool {
		n := uint64(0)
		for _, refused := range s.Status().Counters.Refused {
			n += refused
		}
		return n >= 6
	})
	if n := s.logs("INFO", "permissions refused"); n != 1 {
		t.Errorf("logged %d times\n%s", n, s.Daemon.Output())
	}
}

// Fails when a subnet counts as served whose hosts, or whose peers, no link reaches.
func TestLinkThatDoesNotRunIsTold(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s")
	verdict := func(want string) {
		t.Helper()
		s.Until("status says "+want, func() bool {
			out, _ := s.CLI("status")
			return strings.HasPrefix(out, want+"\n")
		})
	}
	verdict("works")
	s.IP(s.Gateway, "link set lan0 down")
	s.told("no link to 10.47.11.0/24 runs: lan0")
	verdict("works") // a network without hosts is no fault
	s.IP(s.Gateway, "link set lan0 up")
	s.over("no link to 10.47.11.0/24 runs")
	s.IP(s.Outside, "link set eth0 down") // the cable is pulled: the default route stays
	verdict("does not work: 10.47.11.0/24: no outside link runs")
	s.IP(s.Outside, "link set eth0 up")
	verdict("works")
	if n := s.logs("WARN", "no outside link runs: wan0"); n > 1 {
		t.Errorf("logged %d times\n%s", n, s.Daemon.Output())
	}
}
