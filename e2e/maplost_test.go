package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// Some permissions can only be carried by the map. A forward chain that accepts RELATED flows
// alone drops what the map admits, so these permissions admit nobody, and conenatd must say so.

// childrenDropped returns the finding about children that are dropped, nil if there is none.
func (s *scene) childrenDropped(about string) *control.Finding {
	s.T.Helper()
	all := s.Status().Findings
	i := slices.IndexFunc(all, func(f control.Finding) bool { return f.ID == dropped && f.About == about })
	if i < 0 {
		return nil
	}
	return &all[i]
}

// tellsOfLostChildren checks that verdict, warning, log and doctor say which chain drops the
// children of the subnet or group about, and of which kind they are. A packet of peer to in, by
// its permission on ext, is indeed lost. Then it applies doctor's line, and all of this is over.
func (s *scene) tellsOfLostChildren(about, kind, verdict string, in, peer *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	var f *control.Finding
	s.Until("there is a warning about "+about, func() bool { f = s.childrenDropped(about); return f != nil })
	for _, part := range []string{"inet filter forward", kind, "ct status dnat"} {
		if !strings.Contains(f.Text, part) {
			s.T.Errorf("the warning does not name %q: %s", part, f.Text)
		}
	}
	if strings.Contains(f.Text, "backend = ") {
		s.T.Errorf("another backend would not help: %s", f.Text)
	}
	s.told(f.Text)
	if got := s.verdict(); !strings.HasPrefix(got, verdict) {
		s.T.Errorf("verdict %q, want %q", got, verdict)
	}
	if p := s.listedFor(in, ext); p.State != "standing" || p.Reason != "dropped" || p.Backend != "nft" {
		s.T.Errorf("list has %+v", p)
	}
	s.Lost(in, s.PeerSocket(lab.PeerA, 7000), ext, peer)
	out, code := s.CLI("doctor")
	const line = `nft 'insert rule inet filter forward iifname "wan0" ct label 126 accept'`
	if code != 2 || !strings.Contains(out, line) {
		s.T.Fatalf("doctor: exit %d: %s", code, out)
	}
	_, err := s.Gateway.Output("sh", "-c", line)
	s.Must(err)
	s.over(f.Text)
	s.Until("doctor and verdict are content", func() bool {
		_, code := s.CLI("doctor")
		return code < 2 && s.verdict() == "works"
	})
	if p := s.listedFor(in, ext); p.State != "standing" || p.Reason != "" {
		s.T.Errorf("afterwards list has %+v", p)
	}
	s.Arrives(in, s.PeerSocket(lab.PeerA, 7001), ext)
}

// listedFor returns the permission of in on ext that has children of peer A.
func (s *scene) listedFor(in *lab.Socket, ext netip.AddrPort) (found control.Permission) {
	s.T.Helper()
	s.Until("there is a permission on "+ext.String(), func() bool {
		for _, found = range s.List() {
			if found.Int == in.Addr() && found.Ext == ext && (found.Peer == lab.PeerA || found.Peers.Contains(lab.PeerA)) {
				return true
			}
		}
		return false
	})
	return found
}

// Only the map can let everybody in. The configuration alone makes it certain that nobody gets
// in, so the warning is there before any flow.
//
// Fails when expectations are said to carry a subnet with endpoint-independent filtering, and
// when auto is advised where it does not help.
func TestOpenSubnetBehindRelatedAloneIsTold(t *testing.T) {
	stage.NeedsExpect(t)
	for _, mode := range [][]string{stage.Auto, stage.NFT} {
		t.Run(mode[0][2:], func(t *testing.T) {
			s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, append(mode, "--filtering=endpoint_independent", "--reconcile=1s")...)
			if s.childrenDropped(lab.InsideNet.String()) == nil {
				t.Errorf("no warning before a flow: %q", s.Status().Warnings)
			}
			if c := s.Status().Subnets[0].Carried; c.By != "nft" || c.Chain != "inet filter forward" {
				t.Errorf("carried %+v", c)
			}
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, proxy)
			s.tellsOfLostChildren(lab.InsideNet.String(), "endpoint_independent",
				"does not work: 10.47.11.0/24: your firewall drops the flows of peers into subnet 10.47.11.0/24", phone, proxy, ext)
		})
	}
}

// Only the map can admit a group of more than 16 addresses. Other peers have expectations.
//
// Fails when a group is not told of before its first flow, and when it is told of although the
// firewall lets just this group in.
func TestLargeGroupBehindRelatedAloneIsTold(t *testing.T) {
	stage.NeedsExpect(t)
	group := netip.PrefixFrom(lab.PeerA, 24).Masked()
	about := lab.InsideNet.String() + " peer_groups"
	s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, append(stage.Auto, "--peer-group="+group.String(), "--reconcile=1s")...)
	if s.childrenDropped(about) == nil {
		t.Errorf("no warning before a flow: %q", s.Status().Warnings)
	}
	phone, proxy, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerC, 5060)
	ext := s.Contact(phone, proxy)
	s.standsFor(group, phone, ext)
	s.Contact(phone, other)
	if p := s.Listed(phone, other, ext, "standing"); p.Backend != "expect+nft" || p.Reason != "" {
		t.Errorf("list has %+v", p)
	}
	s.Arrives(phone, s.PeerSocket(lab.PeerC, 7000), ext)
	s.tellsOfLostChildren(about, group.String(), "works in part: your firewall drops the flows of peers into subnet 10.47.11.0/24", phone, proxy, ext)
}

// The user lets in just the group that the map admits.
//
// Fails when the group is judged by what the firewall does with other peers.
func TestLargeGroupThatTheFirewallLetsInIsNotLost(t *testing.T) {
	stage.NeedsExpect(t)
	group := netip.PrefixFrom(lab.PeerA, 24).Masked()
	s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy + "add rule inet filter forward ip saddr " + group.String() + " ct status dnat accept\n"},
		append(stage.Auto, "--peer-group="+group.String(), "--reconcile=1s")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.standsFor(group, phone, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 7000), ext)
	if p := s.listedFor(phone, ext); p.Reason != "" {
		t.Errorf("list has %+v", p)
	}
	if got := s.verdict(); got != "works" || s.mapWarning() {
		t.Errorf("verdict %q, warnings %q", got, s.Status().Warnings)
	}
}

// A rule of the user's forwards an outside port for addresses of a named set, so no expectation
// stands on that port, for any peer.
//
// Fails when a permission without an expectation is not told of, and when it is still told of
// although the rule is gone.
func TestConditionalForwardBehindRelatedAloneIsTold(t *testing.T) {
	stage.NeedsExpect(t)
	const forward = `table ip fw { set sip { type ipv4_addr; }; chain pre { type nat hook prerouting priority dstnat; iifname "wan0" udp dport 5060 ip saddr @sip dnat to 10.47.11.110; }; }
`
	about := lab.InsideNet.String() + " forwarded"
	begin := func(t *testing.T) (s *scene, phone, proxy *lab.Socket, ext netip.AddrPort) {
		s = play(t, lab.Options{Inside: 2, Rules: lab.Masquerade + lab.DropPolicy + forward}, append(stage.Auto, "--reconcile=1s")...)
		phone, proxy, free := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.InsideSocket(0, 5061)
		freeExt := s.Contact(free, proxy)
		s.Stands(free, proxy, freeExt)
		s.Arrives(free, s.PeerSocket(lab.PeerA, 6998), freeExt)
		if f := s.childrenDropped(about); f != nil {
			t.Errorf("without a permission on that port: %v", f)
		}
		return s, phone, proxy, s.Contact(phone, proxy)
	}
	t.Run("the firewall changes", func(t *testing.T) {
		s, phone, proxy, ext := begin(t)
		s.tellsOfLostChildren(about, "outside port is forwarded", "works in part: your firewall drops the flows of peers into subnet 10.47.11.0/24", phone, proxy, ext)
	})
	t.Run("the forward ends", func(t *testing.T) {
		s, phone, proxy, ext := begin(t)
		var f *control.Finding
		s.Until("there is a warning", func() bool { f = s.childrenDropped(about); return f != nil })
		s.told(f.Text)
		s.Must(s.NFT("delete table ip fw"))
		s.over(f.Text)
		s.Until("it has an expectation", func() bool {
			p := s.Listed(phone, proxy, ext, "standing")
			return p.Backend == "expect+nft" && p.Reason == ""
		})
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 6999), ext)
	})
}

// The rules do not tell what becomes of children, and what became of them does.
//
// Fails when lost children that only the map can admit are not told of, or without a name for
// what loses them.
func TestWhatOnlyTheMapAdmitsIsToldByEvidence(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
	const chain, policy = "table inet f { chain c { type filter hook ", " priority filter; iifname \"wan0\" meta l4proto udp ct state new "
	group := netip.PrefixFrom(lab.PeerA, 24).Masked().String()
	hooks := map[string]struct{ rules, dropper string }{
		"another hook":       {chain + "postrouting" + policy + "drop; }; }\n", "a chain of another hook than prerouting and forward"},
		"an unknown matcher": {chain + "forward" + policy + "meta mark 0 drop; }; }\n", "a rule that conenatd cannot judge"},
	}
	for kind, tc := range map[string]struct{ flag, about, names, peers string }{
		"group": {"--peer-group=" + group, lab.InsideNet.String() + " peer_groups", group, group},
		"open":  {"--filtering=endpoint_independent", lab.InsideNet.String(), "endpoint_independent", "0.0.0.0/0"},
	} {
		for hook, how := range hooks {
			t.Run(kind+", "+hook, func(t *testing.T) {
				s := play(t, lab.Options{Rules: lab.Masquerade + how.rules}, append(stage.Auto, tc.flag, "--reconcile=1s")...)
				phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
				ext := s.Contact(phone, proxy)
				s.standsFor(netip.MustParsePrefix(tc.peers), phone, ext)
				var f *control.Finding
				s.losesChildren(ext, "there is a warning", func(control.Carried) bool { f = s.childrenDropped(tc.about); return f != nil })
				if !strings.Contains(f.Text, how.dropper) || !strings.Contains(f.Text, tc.names) {
					t.Errorf("it does not name %q and %q: %s", how.dropper, tc.names, f.Text)
				}
				s.told(f.Text)
				s.Must(s.NFT("delete table inet f"))
				s.over(f.Text)
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 7001), ext)
			})
		}
	}
}

// Each subnet has its own rules, and only what goes into one of them is lost.
//
// Fails when a warning is about the other subnet, or about one that is not translated.
func TestNFTLostChildrenAreToldForEachSubnet(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{Guest: true, IPv6: true, Rules: lab.Masquerade + `table inet filter {
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
		iifname { "lan0", "guest0" } accept
		oifname "guest0" ct status dnat accept
	}
}
`})
	group := netip.PrefixFrom(lab.PeerA, 24).Masked()
	s.configured("reconcile = \"1s\"\npeer_groups = [\"" + group.String() + "\"]\n" +
		"[[subnet]]\nprefix = \"10.47.11.0/24\"\n[[subnet]]\nprefix = \"10.47.12.0/24\"\n[[subnet]]\nprefix = \"2001:db8:47::/64\"\nrouted = true\n")
	var about []string
	for _, f := range s.Status().Findings {
		if f.ID == dropped {
			about = append(about, f.About)
		}
	}
	if want := fmt.Sprint([]string{lab.InsideNet.String() + " peer_groups"}); fmt.Sprint(about) != want {
		t.Errorf("warnings about %q, want %s", about, want)
	}
	proxy := s.PeerSocket(lab.PeerA, 5060)
	phone, guest := s.InsideSocket(0, 5060), s.Socket(s.Guest.Namespace, s.Guest.Addr, 5061)
	ext, guestExt := s.Contact(phone, proxy), s.Contact(guest, proxy)
	s.standsFor(group, phone, ext)
	s.standsFor(group, guest, guestExt)
	s.Arrives(guest, s.PeerSocket(lab.PeerA, 7000), guestExt)
	s.Lost(phone, s.PeerSocket(lab.PeerA, 7001), ext, proxy)
	if a, b := s.listedFor(phone, ext).Reason, s.listedFor(guest, guestExt).Reason; a != "dropped" || b != "" {
		t.Errorf("list has the reasons %q and %q", a, b)
	}
}

// A rule of the user's gives all packets of an outside port to another host, so there is nothing
// that the map could admit, and nothing that the firewall should let in.
//
// Fails when status warns of that permission, and when it does not warn although a rule leaves the packets
// of some peers to the map.
func TestForwardOfAllPacketsBehindRelatedAloneIsNotTold(t *testing.T) {
	stage.NeedsExpect(t)
	const (
		start = "table ip fw { set sip { type ipv4_addr; }; chain pre { type nat hook prerouting priority dstnat; iifname \"wan0\" udp dport 5060 "
		end   = "dnat to 10.47.11.110; }; }\n"
	)
	s := play(t, lab.Options{Inside: 2, Rules: lab.Masquerade + lab.DropPolicy +
		"add rule inet filter forward ip daddr 10.47.11.110 udp dport 5060 accept\n" + start + end}, append(stage.Auto, "--reconcile=1s")...)
	phone, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5061)
	ext := s.Contact(phone, proxy)
	if p := s.Listed(phone, proxy, ext, "refused"); p.Reason != "forwarded" {
		t.Errorf("list has %+v", p)
	}
	s.Arrives(server, s.PeerSocket(lab.PeerA, 7000), ext)
	about := lab.InsideNet.String() + " forwarded"
	if f := s.childrenDropped(about); f != nil || s.verdict() != "works" {
		t.Errorf("verdict %q, finding %+v", s.verdict(), f)
	}
	s.Must(s.NFT("delete table ip fw\n" + start + "ip saddr @sip " + end))
	s.Until("a forward of some is told of", func() bool { return s.childrenDropped(about) != nil })
	s.Must(s.NFT("delete table ip fw\n" + start + end))
	s.Until("a forward of all is not", func() bool { return s.childrenDropped(about) == nil && s.verdict() == "works" })
}
