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

// Which backend carries permissions in auto, and that it and the user's rules do not get in
// each other's way.

// carried waits until backend by carries the subnet. It returns the reason, with the chain
// that drops flows.
func (s *scene) carried(by string) (why string) {
	s.T.Helper()
	s.Until("the subnet is carried by "+by, func() bool {
		c := s.Status().Subnets[0].Carried
		why = strings.TrimSpace(c.Why + " " + c.Chain)
		return c.By == by
	})
	return why
}

// The user's firewall decides which backend carries permissions, and may change. After each
// change children arrive, those of the earlier permission too.
func TestAutoFollowsTheFirewall(t *testing.T) {
	const strict, open = `flush chain inet filter forward
add rule inet filter forward ct state established,related accept
add rule inet filter forward iifname "lan0" accept
`, `insert rule inet filter forward ct status dnat accept
`
	s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, append(stage.Auto, "--peer-group=203.0.113.0/29")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	port := uint16(6000)
	for i, step := range []struct{ rules, by, why string }{
		{"", "expect+nft", "related_accepted inet filter forward"},
		{open, "nft", "dnat_accepted"},
		{strict, "expect+nft", "related_accepted inet filter forward"},
		{open, "nft", "dnat_accepted"},
	} {
		if step.rules != "" {
			s.Must(s.NFT(step.rules))
		}
		if why := s.carried(step.by); why != step.why {
			t.Errorf("step %d: because %q, want %q", i, why, step.why)
		}
		s.Until("all permissions are carried so", func() bool {
			ps := s.List()
			for _, p := range ps {
				if p.State != "standing" || p.Backend != step.by {
					return false
				}
			}
			return len(ps) == 1
		})
		port++
		s.Arrives(phone, s.PeerSocket(lab.PeerA, port), ext)
		s.Arrives(phone, s.PeerSocket(lab.PeerB, port), ext) // another address of the peer group
		if s.mapWarning() {
			t.Errorf("step %d: warnings %q", i, s.Status().Warnings)
		}
	}
}

// A start in auto does not warn of a chain that would drop what another backend carries.
//
// Fails when the start's warnings are made before it is known which backends are in use.
func TestAutoStartsWithoutAFalseWarning(t *testing.T) {
	stage.NeedsExpect(t)
	s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, stage.Auto...)
	s.carried("expect+nft")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	s.Stands(phone, proxy, s.Contact(phone, proxy))
	if out := s.Daemon.Output(); strings.Contains(out, "your firewall drops") {
		t.Error(out)
	}
}

// If the forward chain lets no child pass, a warning says so before any child is lost.
func TestAutoTellsOfAFirewallThatDropsAll(t *testing.T) {
	for _, mode := range [][]string{stage.Auto, stage.Expect, stage.NFT} {
		s := play(t, lab.Options{Rules: lab.Masquerade + strings.Replace(lab.DropPolicy, "established,related accept", "established accept", 2)}, mode...)
		w := s.Status().Findings
		if !slices.ContainsFunc(w, func(w control.Finding) bool {
			return w.ID == "children_dropped" && strings.Contains(w.Text, "inet filter forward") && strings.Contains(w.Text, "ct status dnat") &&
				strings.Contains(w.Text, "ct label 126") != slices.Equal(mode, stage.Expect)
		}) {
			t.Errorf("%v: warnings %q", mode, w)
		}
		s.Must(s.NFT("insert rule inet filter forward ct status dnat accept"))
		s.Until("the warning is gone", func() bool { return !s.mapWarning() })
		s.Stop()
	}
}

const tftpHelper = `table ip h {
	ct helper tftp { type "tftp" protocol udp; }
	chain p {
		type filter hook prerouting priority 0;
		iifname "lan0" udp dport 69 ct helper set "tftp"
	}
}
`

// A conntrack helper of the user's works as it does without conenatd, even where expectations
// carry the subnet: we make no expectation for the helper's hosts.
func TestHelperOfTheUsersWorks(t *testing.T) {
	stage.NeedsExpect(t)
	for _, mode := range [][]string{stage.Auto, stage.Expect} {
		t.Run(mode[0][2:], func(t *testing.T) {
			s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy + tftpHelper}, append(mode, "--reconcile=1s")...)
			phone, server := s.InsideSocket(0, 2070), s.PeerSocket(lab.PeerA, 69)
			for i := range 3 {
				const request = "\x00\x01boot.cfg\x00octet\x00"
				s.Must(phone.Send(server.Addr(), request))
				ext, err := server.Expect(request)
				s.Must(err)
				transfer, data := s.PeerSocket(lab.PeerA, uint16(3000+i)), fmt.Sprintf("\x00\x03\x00\x01%d", i)
				s.Must(transfer.Send(ext, data))
				_, err = phone.Expect(data)
				s.Must(err)
				if mode[0] == stage.Expect[0] {
					if p := s.Listed(phone, server, ext, "refused"); p.Reason != "helper" {
						t.Errorf("reason %q", p.Reason)
					}
				} else if p := s.Listed(phone, server, ext, "standing"); p.Backend != "nft" {
					t.Errorf("it stands by %q", p.Backend)
				}
				for range 2 { // each reload reads the tables again
					if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
						t.Fatalf("exit %d, %q", code, out)
					}
				}
				if out, code := s.CLI("status", "--verify", "--control-socket", s.Daemon.Socket); code != 0 {
					t.Errorf("exit %d, %q", code, out)
				}
			}
		})
	}
}

// A chain in another hook drops what the forward chain would accept. Lost children reveal it;
// once the chain is gone, that evidence no longer counts.
//
// Fails when the chains that are read alone decide, and when evidence outlives the rules.
func TestAutoSeesWhatOtherHooksDrop(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
	s := play(t, lab.Options{Rules: lab.Masquerade + `table inet f { chain c { type filter hook postrouting priority filter
		oifname "lan0" ct state new meta l4proto udp drop
	}; }
`}, append(stage.Auto, "--reconcile=1s")...)
	if why := s.carried("nft"); why != "dnat_accepted" {
		t.Fatalf("at first because %q", why)
	}
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	c := s.losesChildren(ext, "expectations carry", func(c control.Carried) bool { return c.By == "expect+nft" })
	if c.Why != "related_accepted" || c.Chain != "" || len(c.Evidence) == 0 || c.Evidence[0].By != "nft" || c.Evidence[0].Passed != 0 {
		t.Errorf("carried %+v", c)
	}
	s.getsInByWhatCarries(phone, proxy, ext)
}

// getsInByWhatCarries checks that children get in by an expectation while a chain of table f
// drops those of the map, and by the map once the table is gone.
func (s *scene) getsInByWhatCarries(phone, proxy *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	s.Until("it stands by an expectation", func() bool {
		by := s.Listed(phone, proxy, ext, "standing").Backend
		return by != "nft" && by == s.Status().Subnets[0].Carried.By
	})
	drain(phone) // the last packet before may have come in
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	if s.mapWarning() {
		s.T.Errorf("warnings %q", s.Status().Warnings)
	}
	s.Must(s.NFT("delete table inet f"))
	s.carried("nft")
	s.Until("it stands in the map", func() bool { return s.Listed(phone, proxy, ext, "standing").Backend == "nft" })
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
}

// A routing rule or a chain drops children of one subnet that the forward hook accepts. What is
// lost before the forward hook may be another subnet's, but not if children of that one pass.
//
// Fails when the evidence of one subnet counts for another.
func TestAutoJudgesEachSubnetByItsOwnChildren(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.NeedsExpect(t)
	for name, drops := range map[string]string{
		"routing": "ip rule add to 10.47.11.109 iif wan0 ipproto udp sport 6000-6999 blackhole",
		"postrouting": "nft 'table inet f { chain c { type filter hook postrouting priority filter; " +
			"ip daddr 10.47.11.109 ct state new meta l4proto udp drop; }; }'",
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2, Rules: lab.Masquerade})
			_, err := s.Gateway.Output("sh", "-c", drops)
			s.Must(err)
			s.Start("--backend=auto", "--reconcile=1s", "--subnet=10.47.11.109/32", "--subnet=10.47.11.110/32")
			proxy := s.PeerSocket(lab.PeerA, 5060)
			phone, other := s.InsideSocket(0, 5060), s.InsideSocket(1, 5062)
			ext, otherExt := s.Contact(phone, proxy), s.Contact(other, proxy)
			s.Stands(phone, proxy, ext)
			s.Stands(other, proxy, otherExt)
			port := uint16(7000)
			s.losesChildren(ext, "expectations carry", func(c control.Carried) bool {
				if port++; port%2 == 0 && name == "routing" {
					s.Arrives(other, s.PeerSocket(lab.PeerA, port), otherExt)
				}
				return c.By == "expect+nft"
			})
			drain(phone) // the last of them may have come in
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
			if c := s.Status().Subnets[1].Carried; c.By != "nft" || c.Why != "dnat_accepted" {
				t.Errorf("the other subnet has %+v", c)
			}
			s.Arrives(other, s.PeerSocket(lab.PeerA, 5073), otherExt)
		})
	}
}

// losesChildren lets peer A send to ext from one port after another until status says what is
// wanted of the subnet's carrier, and returns that.
func (s *scene) losesChildren(ext netip.AddrPort, what string, wanted func(control.Carried) bool) (c control.Carried) {
	s.T.Helper()
	port := uint16(6000)
	s.Until(what, func() bool {
		port++
		from, err := s.Outside.Socket(lab.PeerA, port)
		s.Must(err)
		defer from.Close()
		s.Must(from.Send(ext, "lost"))
		c = s.Status().Subnets[0].Carried
		return wanted(c)
	})
	return c
}

// A chain drops the children of both backends. When it is gone both pass, and the map
// carries.
//
// Fails when the backend that was tried last is kept for ever.
func TestAutoTellsOfOtherHooksThatDropAll(t *testing.T) {
	stage.NeedsExpect(t)
	s := play(t, lab.Options{Rules: lab.Masquerade + `table inet f { chain c { type filter hook postrouting priority filter
		oifname "lan0" ct state new,related meta l4proto udp drop
	}; }
`}, append(stage.Auto, "--reconcile=1s")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.losesChildren(ext, "both kinds of children are lost", func(c control.Carried) bool { return c.Why == "both_dropped" })
	const text = "your firewall drops the flows of peers into subnet 10.47.11.0/24: a chain of another hook than prerouting and forward"
	s.told(text)
	s.Must(s.NFT("delete table inet f"))
	s.over(text)
	if why := s.carried("nft"); why != "dnat_accepted" {
		t.Errorf("because %q", why)
	}
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
}

// Without the expect backend no child gets in. The rules of the forward hook do not show it.
//
// Fails when lost children cause no warning, and when the warning outlives the rules.
func TestNFTChildrenThatOtherHooksDropAreTold(t *testing.T) {
	s := play(t, lab.Options{Rules: lab.Masquerade + "table inet f { chain c { type filter hook postrouting priority filter; " +
		`oifname "lan0" ct state new meta l4proto udp drop; }; }` + "\n"}, append(stage.NFT, "--reconcile=1s")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	for i := range uint16(4) {
		s.Must(s.PeerSocket(lab.PeerA, 6000+i).Send(ext, "lost"))
	}
	const text = "your firewall drops the flows of peers into subnet 10.47.11.0/24: a chain of another hook than prerouting and forward"
	s.told(text)
	s.Must(s.NFT("delete table inet f"))
	s.over(text)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
}
