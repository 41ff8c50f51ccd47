package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Rules of iptables-legacy are known before any flow shows them, and changes at once:
// the reconcile is an hour away.

// iptables runs iptables-legacy with these words in the gateway.
func (s *scene) iptables(words string) {
	s.T.Helper()
	s.iptablesOf(lab.IPTablesLegacy, words)
}

// iptablesOf runs a variant of iptables in the gateway, with the words as its arguments.
func (s *scene) iptablesOf(variant, words string) {
	s.T.Helper()
	_, err := s.Gateway.Output(variant, strings.Fields(words)...)
	s.Must(err)
}

func TestAutoFollowsTheFirewallOfIPTablesLegacy(t *testing.T) {
	const dnat = "FORWARD -m conntrack --ctstate DNAT -j ACCEPT"
	const drops = "related_accepted iptables-legacy filter FORWARD"
	const accepts = "dnat_accepted"
	s := newScene(t, lab.Options{Rules: lab.NoRules})
	s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+lab.IPTablesDropPolicy))
	s.Start(stage.Flags(stage.Auto, "--reconcile=1h")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	for i, step := range []struct{ rule, by, why string }{
		{"", "expect+nft", drops},
		{"-I " + dnat, "nft", accepts},
		{"-D " + dnat, "expect+nft", drops},
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

// A firewall that does not accept RELATED lets no child pass; accepting DNATed flows
// repairs that.
func TestAutoTellsOfIPTablesLegacyThatDropsAll(t *testing.T) {
	s := newScene(t, lab.Options{Rules: lab.NoRules})
	s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+strings.ReplaceAll(lab.IPTablesDropPolicy, ",RELATED", "")))
	s.Start(stage.Flags(stage.Auto, "--reconcile=1h")...)
	if st := s.Status(); !stage.Warned(st, ": iptables-legacy filter FORWARD; ") {
		t.Errorf("warnings %q", st.Warnings)
	}
	s.iptables("-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT")
	s.Until("the warning is gone", func() bool { return !s.mapWarning() })
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
}

// Forwards of each kind; nobody has used them yet.
const legacyForwards = `*nat
:forwards - [0:0]
-A PREROUTING -i wan0 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.110
-A PREROUTING -i wan0 -p udp --dport 6000:6010 -j DNAT --to-destination 10.47.11.110
-A PREROUTING -d 198.51.100.1 -p udp -m multiport --dports 7000,7010:7020 -j DNAT --to-destination 10.47.11.110
-A PREROUTING -s 203.0.113.0/24 -p udp --dport 8000 -j DNAT --to-destination 10.47.11.110
-A PREROUTING ! -i lan0 -j forwards
-A forwards -p tcp --dport 9001 -j DNAT --to-destination 10.47.11.110
-A forwards -p udp --dport 9000 -m comment --comment "of Bob" -j DNAT --to-destination 10.47.11.110
-A forwards -p udp --dport 5353 -j REDIRECT --to-ports 5354
COMMIT
`

func TestLegacyForwardsWinBeforeTheirFirstFlow(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.Expect, stage.NFT}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
		s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+legacyForwards))
		s.Start(stage.Flags(mode, "--reconcile=1h")...)
		proxy, media := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
		for _, port := range []uint16{5060, 6000, 6010, 7000, 7015, 8000, 9000} {
			phone, server := s.InsideSocket(0, port), s.InsideSocket(1, port)
			ext := s.Contact(phone, proxy)
			// The map stays open for peers that the forward does not match.
			s.hidden(phone, proxy, ext, port != 8000 || slices.Equal(mode, stage.Expect))
			s.Arrives(server, media, ext)
			s.Arrives(phone, proxy, ext) // its own flow
		}
		phone, own := s.InsideSocket(0, 5353), s.Socket(s.Gateway.Namespace, s.Gateway.Addr, 5354)
		ext := s.Contact(phone, proxy)
		s.hidden(phone, proxy, ext, true)
		s.Arrives(own, media, ext)
		for _, port := range []uint16{5061, 6011, 7001, 9001} { // of no forward
			phone := s.InsideSocket(0, port)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)
			s.Arrives(phone, media, ext)
		}
	})
}

// A forward that comes later wins at once: the permission ends, or waits behind it in
// the map.
func TestLegacyForwardThatComesLaterWins(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.Expect, stage.NFT}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
		s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade))
		s.Start(stage.Flags(mode, "--reconcile=1h")...)
		phone, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.iptables("-t nat -A PREROUTING -i wan0 -p udp --dport 5060 -j DNAT --to-destination 10.47.11.110")
		s.hidden(phone, proxy, ext, true)
		s.Arrives(server, s.PeerSocket(lab.PeerA, 5070), ext)
	})
}

// A rule that chooses outside ports keeps every host on them, even if it comes later.
func TestLegacyRuleThatChoosesPortsIsLeftNewcomers(t *testing.T) {
	const first, last = 7472, 7487
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
	s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade))
	s.Start("--subnet", lab.InsideNet.String(), stage.Auto[0], mapped, "--reconcile=1h")
	if s.warns("port_pool is not used") {
		t.Errorf("warnings: %q", s.Status().Warnings)
	}
	s.iptables(fmt.Sprintf("-t nat -R POSTROUTING 1 -o wan0 -p udp -j MASQUERADE --to-ports %d-%d", first, last))
	s.Until("the rule is known", func() bool {
		return s.warns("a rule of yours chooses outside ports (iptables-legacy nat POSTROUTING rule 1)")
	})
	a, b := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
	owned := s.Contact(s.InsideSocket(0, 3074), a)
	newcomer := s.InsideSocket(1, owned.Port())
	for _, peer := range []*lab.Socket{a, b} {
		if ext := s.Contact(newcomer, peer); ext.Port() < first || ext.Port() > last {
			t.Errorf("a newcomer leaves as %v", ext)
		}
	}
}

// The unit starts the daemon as another user than root, which may read the rules all the same:
// forwards win before their first flow, what the forward chain drops is known, and doctor does
// not say that it cannot read them.
//
// Fails when the unit does not put its user into the group of root.
func TestLegacyRulesAreReadByTheUserOfTheUnit(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
	s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade+legacyForwards+strings.ReplaceAll(lab.IPTablesDropPolicy, ",RELATED", "")))
	s.Exe = s.unitsUser()
	s.Start(stage.Flags(stage.Auto, mapped, "--reconcile=1h")...)
	if st := s.Status(); !stage.Warned(st, ": iptables-legacy filter FORWARD; ") || stage.Warned(st, "only root") {
		t.Errorf("warnings %q", st.Warnings)
	}
	if out, code := s.CLI("doctor"); code != 2 || !strings.Contains(out, "iptables-legacy -I FORWARD") || strings.Contains(out, "only root") {
		t.Errorf("doctor: exit %d, %s", code, out)
	}
	s.iptables("-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT")
	s.Until("the warning is gone", func() bool { return !s.mapWarning() })
	phone, server, proxy := s.InsideSocket(0, 6005), s.InsideSocket(1, 6005), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.hidden(phone, proxy, ext, true)
	s.Arrives(server, s.PeerSocket(lab.PeerA, 5070), ext)
}
