package e2e

import (
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// At boot both the LAN and the provider's link are missing. The daemon becomes ready anyway,
// says what it waits for, and serves them when they come.
//
// Fails when a start or a reload refuses the name of a missing link, or looks for inside
// networks only once.
func TestLinksMayComeAfterTheDaemon(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Rules: `table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "ppp0" masquerade
	}
}
`})
		const lan = "10.47.11.1/24 dev lan0"
		s.IP(s.Gateway, "address del "+lan)
		s.IP(s.Gateway, "link set wan0 down")
		s.Start(append(mode, "--subnet=auto", "--outside=ppp0")...)
		const noLink, noLAN = "outside link ppp0 is not there", `found no inside network`
		s.told(noLink)
		s.told(noLAN)
		if out, code := s.CLI("reload"); code != 0 {
			t.Errorf("reload: exit %d, %q", code, out)
		}

		s.IP(s.Gateway, "address add "+lan)
		s.over(noLAN)
		s.IP(s.Gateway, "link set wan0 name ppp0")
		s.LinkUp("ppp0")
		s.IP(s.Gateway, "route add 203.0.113.0/24 via 198.51.100.254 dev ppp0")
		s.over(noLink)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
		// A busy machine may report the changes above as late.
		if w := slices.DeleteFunc(s.Status().Findings, func(w control.Finding) bool { return w.ID == "changes_late" }); len(w) > 0 {
			t.Errorf("warnings %q", w)
		}

		// The LAN goes and comes back.
		s.IP(s.Gateway, "address del "+lan)
		s.Until("it is not served", func() bool { return len(s.Status().Subnets) == 0 })
		s.Until("its permission ended", func() bool { return len(s.InKernel()) == 0 })
		s.IP(s.Gateway, "address add "+lan)
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
	})
}

// A former outside link has a private network behind it and loses its default route. The
// provider's customers there do not become inside hosts.
//
// Fails when "auto" takes every private network that is not behind an outside link now.
func TestAutoDoesNotEnableALinkThatWasOutside(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.IP(s.Gateway, "link add wan2 type bridge")
	s.IP(s.Gateway, "address add 192.168.0.2/24 dev wan2")
	s.IP(s.Gateway, "link set wan2 up")
	s.IP(s.Gateway, "route add default via 192.168.0.1 dev wan2 metric 100")
	s.Start("--subnet=auto")
	s.Until("both links are outside links", func() bool { return len(s.Status().Outside) == 2 })
	s.IP(s.Gateway, "route del default via 192.168.0.1 dev wan2")
	s.Until("one of them is not any more", func() bool { return len(s.Status().Outside) == 1 })
	if out, code := s.CLI("reload"); code != 0 {
		t.Errorf("reload: exit %d, %q", code, out)
	}
	if got := s.Status().Subnets; len(got) != 1 || got[0].Prefix != lab.InsideNet {
		t.Errorf("subnets %+v", got)
	}
}

// newBridgedUplink makes a gateway whose uplink is a bridge, because "auto" ignores veth links.
// The bridge also has an address of the provider's private network, and no default route yet.
func newBridgedUplink(t *testing.T, o lab.Options) *scene {
	s := newScene(t, o)
	for _, args := range []string{
		"link set wan0 down", "address flush dev wan0", "link set wan0 name port0",
		"link add wan0 type bridge forward_delay 0", "link set port0 master wan0", "link set port0 up",
		"address add 198.51.100.1/24 dev wan0", "address add 192.168.0.2/24 dev wan0",
	} {
		s.IP(s.Gateway, args)
	}
	s.LinkUp("wan0")
	return s
}

// An uplink has an address of the provider's private network, but no default route yet. That
// network is not served, and everything works once the route is there.
//
// Fails when "auto" takes a link for a LAN although a rule, or the lack of any other uplink,
// says that it is an uplink.
func TestAutoDoesNotEnableAnUplinkWithoutItsRoute(t *testing.T) {
	served := func(s *scene) (all []string) {
		for _, n := range s.Status().Subnets {
			all = append(all, n.Prefix.String())
		}
		return all
	}
	lan, both := []string{"10.47.11.0/24"}, []string{"10.47.11.0/24", "192.168.0.0/24"}
	works := func(s *scene) {
		s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan0")
		s.Until("wan0 is an outside link", func() bool { return slices.Contains(s.Status().Outside, "wan0") })
		s.Until("the LAN is served", func() bool { return slices.Equal(served(s), lan) })
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	}
	t.Run("the only one", func(t *testing.T) {
		s := newBridgedUplink(t, lab.Options{})
		s.Start("--subnet=auto")
		if got := served(s); !slices.Equal(got, lan) {
			t.Errorf("served: %q", got)
		}
		works(s)
	})
	t.Run("the only one, and the rule is for all links", func(t *testing.T) {
		s := newBridgedUplink(t, lab.Options{Rules: strings.Replace(lab.Masquerade, `oifname "wan0" `, "", 1)})
		s.Start("--subnet=auto")
		s.told("no outside link")
		if got := served(s); len(got) > 0 {
			t.Errorf("served: %q", got)
		}
		works(s)
	})
	const gone = "*nat\n-D POSTROUTING -o wan0 -j MASQUERADE\nCOMMIT\n"
	besides := func(t *testing.T, rule, none func(s *scene) error) {
		s := newBridgedUplink(t, lab.Options{Rules: lab.NoRules})
		s.Must(rule(s))
		s.IP(s.Gateway, "link add wan2 type bridge")
		s.IP(s.Gateway, "address add 192.168.2.2/24 dev wan2")
		s.IP(s.Gateway, "link set wan2 up")
		s.IP(s.Gateway, "route add default via 192.168.2.1 dev wan2 metric 100")
		s.Start("--subnet=auto", "--reconcile=1h")
		if got := served(s); !slices.Equal(got, lan) {
			t.Errorf("served: %q", got)
		}
		// Rules come and go. Without one nothing shows what wan0 is.
		s.Must(none(s))
		s.Until("nothing tells that it is an uplink", func() bool { return slices.Equal(served(s), both) })
		s.Must(rule(s))
		s.Until("a rule tells", func() bool { return slices.Equal(served(s), lan) })
		works(s)
	}
	t.Run("beside another one", func(t *testing.T) {
		besides(t, func(s *scene) error { return s.NFT(lab.Masquerade) }, func(s *scene) error { return s.NFT("delete table ip nat") })
	})
	t.Run("beside another one, by iptables-legacy", func(t *testing.T) {
		besides(t, func(s *scene) error { return s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade) },
			func(s *scene) error { return s.IPTables(lab.IPTablesLegacy, gone) })
	})
}

// While the provider's link has no route, the daemon is killed and started again: standing
// permissions go on.
//
// Fails when "auto" does not count the hosts of standing permissions as inside hosts.
func TestAutoGoesOnServingWhileThereIsNoRoute(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		s.Start(append(mode, "--subnet=auto")...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Kill()
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5060")
		s.Must(err)
		s.IP(s.Gateway, "route del default")
		s.Start(append(mode, "--subnet=auto")...)
		if got := s.Status().Subnets; len(got) != 1 || got[0].Prefix != lab.InsideNet {
			t.Errorf("subnets %+v", got)
		}
		if n := s.Status().Tables.Repaired; n > 0 {
			t.Errorf("%d times the tables were not as they should be", n)
		}
		s.Stands(phone, proxy, ext)
		s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan0")
		s.Until("wan0 is an outside link", func() bool { return slices.Contains(s.Status().Outside, "wan0") })
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	})
}
