package e2e

import (
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// What the rules of iptables-legacy say is known before any flow shows it, and at once
// when they change: the next reconcile is too far off to help.

// iptables runs iptables-legacy with these words in the gateway.
func (s *scene) iptables(words string) {
	s.T.Helper()
	_, err := s.Gateway.Output(lab.IPTablesLegacy, strings.Fields(words)...)
	s.Must(err)
}

func TestAutoFollowsTheFirewallOfIPTablesLegacy(t *testing.T) {
	const dnat = "FORWARD -m conntrack --ctstate DNAT -j ACCEPT"
	const drops = "iptables-legacy filter FORWARD drops DNATed flows and accepts RELATED"
	const accepts = "your firewall accepts flows with ct status dnat"
	s := newScene(t, lab.Options{Rules: lab.NoRules})
	s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+lab.IPTablesDropPolicy))
	s.Start(stage.Flags(stage.Auto, "--reconcile=1h")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	for i, step := range []struct{ rule, by, why string }{
		{"", "expect", drops},
		{"-I " + dnat, "nft", accepts},
		{"-D " + dnat, "expect", drops},
	} {
		if step.rule != "" {
			s.iptables(step.rule)
		}
		if why := s.carried(step.by); why != step.why {
			t.Errorf("step %d: because %q, want %q", i, why, step.why)
		}
		s.Until("the permission is carried so", func() bool {
			ps := s.List()
			return len(ps) == 1 && ps[0].State == "standing" && ps[0].Backend == step.by
		})
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 6000+uint16(i)), ext)
	}
}

// A firewall that knows no RELATED lets no child pass, and accepting what is DNATed
// mends that.
func TestAutoTellsOfIPTablesLegacyThatDropsAll(t *testing.T) {
	s := newScene(t, lab.Options{Rules: lab.NoRules})
	s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+strings.ReplaceAll(lab.IPTablesDropPolicy, ",RELATED", "")))
	s.Start(stage.Flags(stage.Auto, "--reconcile=1h")...)
	if w := s.Status().Warnings; !slices.ContainsFunc(w, func(w string) bool { return strings.Contains(w, ": iptables-legacy filter FORWARD; ") }) {
		t.Errorf("warnings %q", w)
	}
	s.iptables("-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT")
	s.Until("the warning is gone", func() bool { return !s.mapWarning() })
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
}
