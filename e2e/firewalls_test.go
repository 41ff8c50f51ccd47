package e2e

import (
	"regexp"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// noise matches the parts of a listing that are not the user's or change by
// themselves: our tables, counters and the time.
var noise = regexp.MustCompile(`(?ms)^table (inet|ip) conenat \{.*?^\}\n|^#[^\n]*$|\[\d+:\d+\]`)

// A firewall with a drop policy needs no rule for conenatd, whichever tool wrote
// it, and not a byte of it changes.
func TestFirewallsArePassedAndUntouched(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
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
			s.Must(tc.set(s))
			list := func() string {
				out, err := s.Gateway.Output(tc.saved[0], tc.saved[1:]...)
				s.Must(err)
				return noise.ReplaceAllString(out, "")
			}
			before := list()
			s.Start("--subnet", lab.InsideNet.String())
			one, two, proxy := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074), s.PeerSocket(lab.PeerA, 3074)
			stranger := s.PeerSocket(lab.PeerB, 3074)
			extOne, extTwo := s.Contact(one, proxy), s.Contact(two, proxy)
			s.Stands(one, proxy, extOne)
			s.Stands(two, proxy, extTwo)
			media := s.PeerSocket(lab.PeerA, 5070)
			s.Arrives(one, media, extOne)
			s.Arrives(two, media, extTwo)
			s.Lost(one, stranger, extOne, proxy)
			s.Lost(two, stranger, extTwo, proxy)
			p := stage.Payload("reply to child")
			s.Must(one.Send(media.Addr(), p))
			_, err := media.Expect(p)
			s.Must(err)
			guest := s.Socket(s.Guest.Namespace, s.Guest.Addr, 3074)
			s.Lost(guest, s.PeerSocket(lab.PeerA, 5071), s.Contact(guest, proxy), proxy)
			if during := list(); during != before {
				t.Errorf("while it runs the rules are\n%s\nnot\n%s", during, before)
			}
			s.Stop()
			if after := list(); after != before {
				t.Errorf("after it the rules are\n%s\nnot\n%s", after, before)
			}
		})
	}
}
