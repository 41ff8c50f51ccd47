package e2e

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Chains of prerouting drop packets before they become children.

// early makes a table f with a chain of prerouting that drops what a match selects.
func early(priority, match string) string {
	return "table inet f { chain c { type filter hook prerouting priority " + priority + `; iifname "wan0" ` + match + " drop; }; }\n"
}

// A gateway drops new flows early, against floods. Expectations carry its subnet from the
// beginning, and the map as soon as the chain is gone.
//
// Fails when the forward hook alone decides: no child is there to tell, however many are lost.
func TestAutoSeesWhatPreroutingDrops(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
	for name, tc := range map[string]struct{ rules, chain, by string }{
		"new":                {early("mangle", "ct state new"), "inet f c", "expect"},
		"new to other ports": {early("mangle", "ct state new fib daddr type local udp dport != { 53, 443 }"), "inet f c", "expect"},
		"behind NAT":         {early("filter", "ct state new"), "inet f c", "expect+nft"},
		"NAT chain":          {`table inet f { chain c { type nat hook prerouting priority dstnat; iifname "wan0" drop; }; }` + "\n", "inet f c", "expect"},
	} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Rules: lab.Masquerade + tc.rules}, append(stage.Auto, "--reconcile=1s")...)
			if why := s.carried(tc.by); why != "related_accepted "+tc.chain {
				t.Errorf("because %q", why)
			}
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			s.getsInByWhatCarries(phone, proxy, s.Contact(phone, proxy))
		})
	}
}

// A chain of prerouting drops both kinds. The warning names it before any child is lost, and
// says what helps there, as doctor does with its line.
//
// Fails when the warning is missing, and when it advises what no packet has before NAT.
func TestAutoTellsOfPreroutingThatDropsAll(t *testing.T) {
	stage.NeedsExpect(t)
	const warned = "your firewall drops the flows of peers into subnet 10.47.11.0/24: inet f c; "
	t.Run("behind conntrack", func(t *testing.T) {
		s := play(t, lab.Options{Rules: lab.Masquerade + early("mangle", "ct state != established")}, append(stage.Auto, "--reconcile=1s")...)
		const text = warned + "let it accept 'ct state related'"
		s.told(text)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Lost(phone, s.PeerSocket(lab.PeerA, 7000), ext, proxy)
		if out, _ := s.CLI("explain", "203.0.113.5", ext.String()); !strings.Contains(out, "inet f c drops") {
			t.Errorf("explain: %s", out)
		}
		out, code := s.CLI("doctor")
		const line = `nft 'insert rule inet f c iifname "wan0" meta l4proto udp ct state related accept'`
		if code != 2 || !strings.Contains(out, line) {
			t.Fatalf("doctor: exit %d: %s", code, out)
		}
		_, err := s.Gateway.Output("sh", "-c", line)
		s.Must(err)
		s.over(text)
		s.getsInByWhatCarries(phone, proxy, ext)
	})
	t.Run("before conntrack", func(t *testing.T) {
		s := play(t, lab.Options{Rules: lab.Masquerade + early("raw", "ip saddr != { 203.0.113.5 }")}, append(stage.Auto, "--reconcile=1s")...)
		const text = warned + "there, before conntrack,"
		s.told(text)
		if out, _ := s.CLI("doctor"); strings.Contains(out, "insert rule") {
			t.Errorf("doctor: %s", out)
		}
		s.Must(s.NFT("delete table inet f"))
		s.over(text)
	})
	t.Run("the map alone", func(t *testing.T) {
		s := play(t, lab.Options{Rules: lab.Masquerade + early("mangle", "ct state new")}, append(stage.NFT, "--reconcile=1s")...)
		const text = warned + "there, before NAT,"
		s.told(text)
		s.Must(s.NFT("delete table inet f"))
		s.over(text)
	})
}
