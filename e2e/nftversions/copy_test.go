package nftversions

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// ours are the tables that conenatd made.
var ours = regexp.MustCompile(`(?ms)^table (inet|ip) conenat \{.*?^\}\n`)

// A gateway loads at boot what was saved while conenatd ran. Without a daemon the copy
// does no harm: nobody else gets in, the gateway's own sockets are reached, and hosts
// get out. The next daemon takes the copy over, and removes it when it stops.
func TestLoadedCopyIsHarmlessAndTakenOver(t *testing.T) {
	all := eachNFT(t)
	for _, f := range features {
		switch f.name {
		case "default", "expect", "peer groups", "mapping and hairpin", "full cone":
		default:
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			original := f.play(t)
			for _, n := range all {
				if n.before(1, 0, 2) {
					continue // this version cannot load the listing
				}
				t.Run(n.String(), func(t *testing.T) {
					saved, err := n.run(original.Gateway.Namespace, "", "list", "ruleset")
					if err != nil {
						t.Fatal(err)
					}
					if n.before(1, 1, 0) {
						saved = unowned(saved) // it would keep the owner flag, but not persist
					}
					s := stage.New(t, lab.Options{Inside: 2, Rules: lab.NoRules})
					if _, err := n.run(s.Gateway.Namespace, saved, "-f", "-"); err != nil {
						t.Fatal(explain(saved, err))
					}
					copied, err := n.run(s.Gateway.Namespace, "", "list", "ruleset")
					s.Must(err)
					if !ours.MatchString(copied) {
						t.Fatalf("the copy has none of conenatd's tables:\n%s", copied)
					}
					if strings.Contains(copied, "@alive") {
						s.Must(silence(n, s))
					}
					harmless(s, original.ext)
					followsAddress(s)
					takenOver(s, f)
					left, err := n.run(s.Gateway.Namespace, "", "list", "ruleset")
					s.Must(err)
					if want := settled(ours.ReplaceAllString(copied, "")); settled(left) != want {
						t.Errorf("a stop leaves other rules:\n%s", firstDifference(want, settled(left)))
					}
				})
			}
		})
	}
}

// harmless checks a gateway with a copy of the rules and no daemon. The copy has a
// permission on ext.
func harmless(s *stage.Scene, ext netip.AddrPort) {
	s.T.Helper()
	for _, port := range []uint16{ext.Port(), 4500} {
		own := s.Socket(s.Gateway.Namespace, s.Gateway.Addr, port)
		for _, peer := range []netip.Addr{lab.PeerA, lab.PeerC} {
			s.Arrives(own, s.PeerSocket(peer, 6000+port), netip.AddrPortFrom(s.Gateway.Addr, port))
		}
		s.Must(own.Close())
	}
	exts := make(map[netip.AddrPort]bool)
	proxy, stranger := s.PeerSocket(lab.PeerB, 5062), s.PeerSocket(lab.PeerC, 3074)
	for i := range 2 {
		host := s.InsideSocket(i, 3074)
		at := s.Contact(host, proxy)
		s.Arrives(host, proxy, at)
		s.Lost(host, stranger, at, proxy)
		exts[at] = true
	}
	if len(exts) != 2 {
		s.T.Errorf("two hosts leave as %v", exts)
	}
}

// followsAddress gives the gateway another outside address, as a provider may at the next boot:
// hosts leave by that, as without conenatd.
func followsAddress(s *stage.Scene) {
	s.T.Helper()
	for _, step := range []string{
		"address del 198.51.100.1/24 dev wan0", "address add 198.51.100.77/24 dev wan0", "route replace default via 198.51.100.254",
	} {
		s.IP(s.Gateway, step)
	}
	for i := range 2 {
		host := s.InsideSocket(i, 5060)
		for _, port := range []uint16{7000, 7001} {
			proxy := s.PeerSocket(lab.PeerB, port+uint16(i)*100)
			ext := s.Contact(host, proxy)
			s.Arrives(host, proxy, ext)
			if ext.Addr().String() != "198.51.100.77" {
				s.T.Errorf("%v leaves as %v", host.Addr(), ext)
			}
		}
	}
}

// silence lets the time run out for which a copy learns by itself.
func silence(n *nft, s *stage.Scene) error {
	out, err := n.run(s.Gateway.Namespace, "", "list", "set", "ip", "conenat", "alive")
	if err == nil && !regexp.MustCompile(`elements = \{ udp( timeout 1h)? expires [0-9ms]+ \}`).MatchString(out) {
		s.T.Errorf("the copy learns for ever, or not at all:\n%s", out)
	}
	if err == nil {
		_, err = n.run(s.Gateway.Namespace, "", "delete", "element", "ip", "conenat", "alive", "{ udp }")
	}
	return err
}

// takenOver starts a daemon, checks that it works, and stops it.
func takenOver(s *stage.Scene, f feature) {
	s.T.Helper()
	s.Start(stage.Flags(f.args)...)
	phone, proxy := s.InsideSocket(0, 5070), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Must(lab.Arrives(phone, lab.Packet{From: s.PeerSocket(lab.PeerA, 5071), To: ext, Payload: stage.Payload("child")}))
	if f.name == "full cone" {
		s.Must(lab.Arrives(phone, lab.Packet{From: s.PeerSocket(lab.PeerC, 5072), To: ext, Payload: stage.Payload("stranger")}))
	} else {
		s.Lost(phone, s.PeerSocket(lab.PeerC, 5072), ext, proxy)
	}
	s.Verified()
	if st := s.Status(); stage.Warned(st, "table") {
		s.T.Errorf("warnings: %q", st.Warnings)
	}
	s.Stop()
	if left := s.Leftovers(); len(left) > 0 {
		s.T.Errorf("left: %q", left)
	}
}
