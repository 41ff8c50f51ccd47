package e2e

import (
	"regexp"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// noise is what a listing has that is not the user's or changes by itself: our
// own tables, counters and the time.
var noise = regexp.MustCompile(`(?ms)^table (inet|ip) conenat \{.*?^\}\n|^#[^\n]*$|\[\d+:\d+\]`)

// Whatever language the user's firewall is written in: with a drop policy it
// needs no rule for conenatd, and not a byte of it changes.
func TestFirewallsArePassedAndUntouched(t *testing.T) {
	needsExpect(t)
	for _, tc := range []struct {
		name  string
		set   func(*scene) error
		saved []string // the command that lists the rules
	}{
		{
			name:  "nftables",
			set:   func(s *scene) error { return s.NFT(lab.Masquerade + lab.DropPolicy) },
			saved: []string{"nft", "-s", "list", "ruleset"},
		},
		{
			name: "iptables-nft",
			set: func(s *scene) error {
				return s.IPTables(lab.IPTablesNFT, lab.IPTablesMasquerade+lab.IPTablesDropPolicy)
			},
			saved: []string{"iptables-nft-save"},
		},
		{
			name: "iptables-legacy",
			set: func(s *scene) error {
				return s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+lab.IPTablesDropPolicy)
			},
			saved: []string{"iptables-legacy-save"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newScene(t, lab.Options{Rules: lab.NoRules, Inside: 2, Guest: true})
			s.must(tc.set(s))
			list := func() string {
				out, err := s.Gateway.Output(tc.saved[0], tc.saved[1:]...)
				s.must(err)
				return noise.ReplaceAllString(out, "")
			}
			before := list()
			s.start("--subnet", lab.InsideNet.String())
			one, two, proxy := s.inside(0, 3074), s.inside(1, 3074), s.peer(lab.PeerA, 3074)
			stranger := s.peer(lab.PeerB, 3074)
			extOne, extTwo := s.contact(one, proxy), s.contact(two, proxy)
			s.stands(one, proxy, extOne)
			s.stands(two, proxy, extTwo)
			media := s.peer(lab.PeerA, 5070)
			s.arrives(one, media, extOne)
			s.arrives(two, media, extTwo)
			s.lost(one, stranger, extOne, proxy)
			s.lost(two, stranger, extTwo, proxy)
			p := payload("reply to child")
			s.must(one.Send(media.Addr(), p))
			_, err := media.Expect(p)
			s.must(err)
			guest := s.socket(s.Guest.Namespace, s.Guest.Addr, 3074)
			s.lost(guest, s.peer(lab.PeerA, 5071), s.contact(guest, proxy), proxy)
			if during := list(); during != before {
				t.Errorf("while it runs the rules are\n%s\nnot\n%s", during, before)
			}
			s.stop()
			if after := list(); after != before {
				t.Errorf("after it the rules are\n%s\nnot\n%s", after, before)
			}
		})
	}
}
