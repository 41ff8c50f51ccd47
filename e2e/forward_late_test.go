package e2e

import (
	"net/netip"
	"regexp"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// ends are the ways in which a daemon ends and leaves its permissions.
var ends = map[string]func(s *scene){
	"kill": (*scene).kill,
	"upgrade": func(s *scene) {
		s.Must(s.Daemon.Signal(syscall.SIGUSR1))
		s.Until("the daemon ends", func() bool {
			_, code := s.CLI("status")
			return code != 0
		})
		s.Kill() // reaps it
	},
	"on_stop keep": (*scene).stop,
}

// tableFlags are the flags of a table that belongs to a daemon, which nft 1.0.6 cannot load.
var tableFlags = regexp.MustCompile(`(?m)^\tflags .*\n`)

// leads sends from one socket until its packets arrive at another.
func (s *scene) leads(from, to *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	s.Until("the forward leads it", func() bool {
		s.Must(from.Send(ext, "taken over"))
		_, _, err := to.Recv(50 * time.Millisecond)
		return err == nil
	})
}

// A forward is added while no daemon runs. The next daemon ends the unanswered child that the
// permission admitted before, so that the forward gets the peer's next packet. An answered one
// goes on, as while a daemon runs.
//
// Fails when children that the first dump shows stay.
func TestNFTForwardAddedWhileNoDaemonRunsTakesUnansweredChildren(t *testing.T) {
	t.Parallel() // mostly it waits
	flushed := func(rules string) func(s *scene) error {
		return func(s *scene) error { return s.NFT("flush ruleset\n" + lab.Masquerade + rules) }
	}
	const to = "table ip forwards { chain pre { type nat hook prerouting priority dstnat; "
	for name, tc := range map[string]struct {
		end  string
		load func(s *scene) error
	}{
		"kill":            {"kill", func(s *scene) error { return s.NFT(forward) }},
		"upgrade":         {"upgrade", func(s *scene) error { return s.NFT(forward) }},
		"on_stop keep":    {"on_stop keep", func(s *scene) error { return s.NFT(forward) }},
		"iptables-nft":    {"kill", inPrerouting(lab.IPTablesNFT, "--dport 5060 -j DNAT --to-destination 10.47.11.110")},
		"iptables-legacy": {"kill", inPrerouting(lab.IPTablesLegacy, "--dport 5060 -j DNAT --to-destination 10.47.11.110")},
		// A firewall script takes conenatd's tables away, too.
		"flushed":                 {"kill", flushed(forward)},
		"flushed, upgrade":        {"upgrade", flushed(forward)},
		"flushed, all ports":      {"kill", flushed(to + `iifname "wan0" dnat to 10.47.11.110; }; }`)},
		"flushed, one source":     {"kill", flushed(to + `ip saddr 203.0.113.0/24 udp dport 5060 dnat to 10.47.11.110; }; }`)},
		"flushed, not understood": {"kill", flushed(to + `udp dport & 1 != 1 dnat to 10.47.11.110; }; }`)},
		"loaded from a copy": {"kill", func(s *scene) error {
			saved, err := s.Ruleset()
			s.Must(err)
			return s.NFT("flush ruleset\n" + tableFlags.ReplaceAllString(saved, "") + forward)
		}},
	} {
		for _, answered := range []bool{false, true} {
			if answered && name != "kill" && name != "flushed" {
				continue
			}
			if answered {
				name += ", answered"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				stage.InModes(t, [][]string{stage.Auto}, func(t *testing.T, mode ...string) {
					s := newScene(t, lab.Options{Inside: 2})
					args := append(slices.Clone(mode), "--reconcile=1h", "--max-children=0")
					if tc.end == "on_stop keep" {
						args = append(args, "--on-stop=keep")
					}
					s.Serve(args...)
					phone, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
					ext := s.Contact(phone, proxy)
					s.Stands(phone, proxy, ext)
					media := s.PeerSocket(lab.PeerA, 5070)
					s.Arrives(phone, media, ext)
					if answered {
						s.Contact(phone, media)
					}
					ends[tc.end](s)
					s.Must(tc.load(s))
					s.Arrives(phone, media, ext) // by the kernel's flow alone
					s.Serve(args...)
					if answered {
						s.Arrives(phone, media, ext)
						s.Arrives(server, s.PeerSocket(lab.PeerA, 5071), ext)
						return
					}
					s.leads(media, server, ext)
					s.Verified()
				})
			})
		}
	}
}

// An expectation comes before every rule, and so do its children of IPv6.
//
// Fails when an unanswered child of an expectation stays.
func TestForwardOfIPv6AddedWhileNoDaemonRunsTakesUnansweredChildren(t *testing.T) {
	ownMode(t)
	t.Parallel() // mostly it waits
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, lab.Options{IPv6: true, Inside: 2, Rules: lab.NoRules + `table ip6 nat {
	chain pre { type nat hook prerouting priority dstnat; }
	chain post { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }
}
`})
			args := []string{"--subnet", lab.InsideNet6.String(), "--reconcile=1h"}
			if name == "on_stop keep" {
				args = append(args, "--on-stop=keep")
			}
			s.Start(args...)
			phone, server := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5060), s.Socket(s.Inside(1).Namespace, s.Inside(1).Addr6, 5060)
			proxy, media := s.Socket(s.Outside.Namespace, lab.Peer6A, 5060), s.Socket(s.Outside.Namespace, lab.Peer6A, 5070)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)
			s.Arrives(phone, media, ext)
			end(s)
			s.Must(s.NFT(`add rule ip6 nat pre iifname "wan0" udp dport 5060 dnat to ` + server.Addr().Addr().String()))
			s.Arrives(phone, media, ext) // by the kernel's flow alone
			s.Start(args...)
			s.leads(media, server, ext)
			s.Verified()
		})
	}
}

// So does a rule for what inside hosts send to a port of the peer that has spoken first, which must
// see their next packet, also if the host answered the child.
//
// Fails when children that began before the start stay.
func TestNFTRuleAddedWhileNoDaemonRunsSeesWhatHostsSend(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, tc := range map[string]struct {
		rules string
		seen  func(s *scene, phone, proxy *lab.Socket) bool
	}{
		"redirect": {redirected, redirectedTo},
		"helper":   {sipHelped, helped},
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, [][]string{stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
				s := play(t, lab.Options{}, append(slices.Clone(mode), "--reconcile=1h")...)
				phone, proxy := s.InsideSocket(0, 4444), s.Socket(s.Gateway.Namespace, netip.IPv4Unspecified(), 5099)
				peer, sip := s.PeerSocket(lab.PeerA, 5061), s.PeerSocket(lab.PeerA, 5060)
				ext := s.Contact(phone, peer)
				s.Stands(phone, peer, ext)
				s.Arrives(phone, sip, ext)
				s.Contact(phone, sip) // the child is answered
				s.Kill()
				s.Must(s.NFT(tc.rules))
				s.Contact(phone, sip) // by the kernel's flow alone
				s.Serve(append(slices.Clone(mode), "--reconcile=1h")...)
				s.Until("the rules see what the phone sends", func() bool { return tc.seen(s, phone, proxy) })
			})
		})
	}
}
