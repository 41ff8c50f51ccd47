package e2e

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// Source NAT to addresses that may be on no outside link.

const routedAddr = "198.51.100.200"

// ownAddresses are the ip(8) commands for each way to give the gateway such an address.
var ownAddresses = map[string][]string{
	"on no link":       {"route add blackhole 198.51.100.192/28"},
	"local route":      {"route add local 198.51.100.192/28 dev lo"},
	"loopback":         {"address add 198.51.100.200/32 dev lo"},
	"a link of no one": {"link add dummy7 type bridge", "link set dummy7 up", "address add 198.51.100.200/32 dev dummy7"},
	"outside link":     {"address add 198.51.100.200/32 dev wan0"},
}

// withAddress makes a lab whose gateway translates to routedAddr.
func withAddress(t *testing.T, commands []string) *scene {
	t.Helper()
	s := newScene(t, lab.Options{Inside: 2, Rules: strings.Replace(lab.Masquerade, "masquerade", "snat to "+routedAddr, 1)})
	for _, c := range commands {
		s.IP(s.Gateway, c)
	}
	s.IP(s.Outside, "route add "+routedAddr+"/32 via 198.51.100.1 dev eth0")
	return s
}

var flowID = regexp.MustCompile(`src=10\.47\.11\.\d+ dst=.*id=\d+`)

// insideFlows returns the flows of inside hosts, each with its identifier.
func (s *scene) insideFlows() (all []string) {
	s.T.Helper()
	for _, l := range s.ConntrackList("-p", "udp", "-o", "id") {
		if id := flowID.FindString(l); id != "" && !strings.Contains(l, "port=0 ") {
			all = append(all, strings.ReplaceAll(id, "[UNREPLIED] ", ""))
		}
	}
	slices.Sort(all)
	return all
}

// A daemon is killed, or stops and keeps everything; the next one ends no flow, and each
// host keeps its outside port.
func TestNFTRestartEndsNoFlow(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, commands := range ownAddresses {
		t.Run(name, func(t *testing.T) {
			s := withAddress(t, commands)
			hosts, exts := []*lab.Socket{s.InsideSocket(0, 3074), s.InsideSocket(1, 3074)}, make([]netip.AddrPort, 2)
			start := func() { s.Serve(mapped, "--on-stop=keep") }
			start()
			for i, host := range hosts {
				for _, port := range []uint16{3074, 443} { // this port gives no permission
					exts[i] = s.Contact(host, s.Socket(s.Outside.Namespace, lab.PeerA, port+uint16(i)))
				}
			}
			before := s.insideFlows()
			for _, stop := range []func(){s.Kill, s.Stop} {
				stop()
				start()
				if after := s.insideFlows(); !slices.Equal(after, before) {
					t.Errorf("before:\n%s\nafter:\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
				}
			}
			for i, host := range hosts {
				if got := s.Contact(host, s.PeerSocket(lab.PeerB, 5000+uint16(i))); got != exts[i] {
					t.Errorf("host %d left as %v, and leaves as %v", i, exts[i], got)
				}
			}
		})
	}
}

// Flows that are older than the daemon keep their mappings; a newcomer on the same outside
// port is moved.
func TestNFTFlowsGiveTheirMappingsWhereverTheirAddressIs(t *testing.T) {
	for name, commands := range ownAddresses {
		t.Run(name, func(t *testing.T) {
			s := withAddress(t, commands)
			one, two := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074)
			ext := s.Contact(one, s.PeerSocket(lab.PeerA, 3074))
			s.Serve(mapped)
			if got := s.Contact(two, s.PeerSocket(lab.PeerB, 3074)); !inPool(got) {
				t.Errorf("a newcomer leaves as %v, which another host has", got)
			}
			if got := s.Contact(one, s.PeerSocket(lab.PeerC, 3074)); got != ext {
				t.Errorf("it left as %v, and leaves as %v", ext, got)
			}
		})
	}
}

// A flow of the gateway itself uses the address and port of a host's mapping. Towards that
// remote endpoint alone the host gets another port; otherwise the kernel would drop its
// packets.
func TestNFTFlowsOfTheGatewayTakeTheirPortWhereverTheirAddressIs(t *testing.T) {
	for name, commands := range ownAddresses {
		if name == "on no link" {
			continue // the gateway cannot have a socket there
		}
		t.Run(name, func(t *testing.T) {
			s := withAddress(t, commands)
			addr := netip.MustParseAddr(routedAddr)
			var own *lab.Socket
			s.Must(s.Gateway.Do(func() (err error) {
				own, err = s.Gateway.Socket(addr, 40000)
				return err
			}))
			proxy := s.PeerSocket(lab.PeerA, 40000)
			s.Contact(own, proxy)
			s.Must(own.Close()) // nothing listens any more, but the flow lives
			s.Serve(mapped)
			host := s.InsideSocket(0, 40000)
			ext := s.Contact(host, s.PeerSocket(lab.PeerB, 40000))
			if ext != netip.AddrPortFrom(addr, 40000) {
				t.Fatalf("it leaves as %v", ext)
			}
			if got := s.Contact(host, proxy); got == ext {
				t.Errorf("it leaves as %v, which the gateway has", got)
			}
		})
	}
}

// An outside address goes away while no daemon runs. The next daemon ends the mappings and
// flows of that address, and no others.
func TestNFTAddressThatWentWhileNoDaemonRan(t *testing.T) {
	s := play(t, lab.Options{Inside: 2}, mapped, "--on-stop=keep")
	one, proxy := s.InsideSocket(0, 3074), s.PeerSocket(lab.PeerA, 3074)
	s.Contact(one, proxy)
	s.Contact(one, s.PeerSocket(lab.PeerB, 3074))
	s.Kill()
	for _, step := range []string{
		"address add 198.51.100.77/32 dev wan0",
		"address del 198.51.100.1/24 dev wan0",
		"route replace default via 198.51.100.254 dev wan0 onlink",
	} {
		s.IP(s.Gateway, step)
	}
	s.IP(s.Outside, "route replace 198.51.100.77/32 dev eth0")
	s.Serve(mapped)
	if got := s.Contact(one, proxy); got.String() != "198.51.100.77:3074" {
		t.Errorf("it leaves as %v", got)
	}
	if !strings.Contains(s.Daemon.Output(), "address 198.51.100.1 is gone") {
		t.Error(s.Daemon.Output())
	}
}

// The address that a rule translates to goes and comes back, as when a link is set up again or
// the router of a pair becomes the master. Without conenatd no flow ends and no host changes its
// port.
//
// Fails when an address that a rule names is taken for lost.
func TestNFTAddressThatARuleNamesMayGoForAWhile(t *testing.T) {
	s := play(t, lab.Options{Inside: 2, Rules: natChain("srcnat", "snat to 198.51.100.1")}, mapped, "--reconcile=1h")
	one, two, proxy := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074), s.PeerSocket(lab.PeerA, 3074)
	ports := []netip.AddrPort{s.Contact(one, proxy), s.Contact(two, proxy)}
	s.Arrives(two, proxy, ports[1])
	s.IP(s.Gateway, "address del 198.51.100.1/24 dev wan0")
	s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan0 onlink")
	s.Verified() // it has seen all links
	s.IP(s.Gateway, "address add 198.51.100.1/24 dev wan0")
	s.Verified()
	s.Arrives(two, proxy, ports[1])
	another := s.PeerSocket(lab.PeerB, 3074)
	for i, host := range []*lab.Socket{two, one} {
		if got := s.Contact(host, another); got != ports[1-i] {
			t.Errorf("%v had %v, and gets %v", host.Addr(), ports[1-i], got)
		}
	}
}

// The gateway gets another address while the daemon is dead. New flows leave by that address, as
// without conenatd, and each host has one port on it.
//
// Fails when the kernel goes on translating to the mappings of the address that was lost.
func TestNFTAddressThatChangesWhileTheDaemonIsDead(t *testing.T) {
	s := play(t, lab.Options{Inside: 2}, mapped)
	hosts, proxy := []*lab.Socket{s.InsideSocket(0, 3074), s.InsideSocket(1, 3074)}, s.PeerSocket(lab.PeerA, 3074)
	for _, host := range hosts {
		s.Contact(host, proxy)
	}
	s.Verified() // it knows the gateway's addresses
	s.Kill()
	for _, step := range []string{
		"address del 198.51.100.1/24 dev wan0", "address add 198.51.100.77/24 dev wan0", "route replace default via 198.51.100.254",
	} {
		s.IP(s.Gateway, step)
	}
	peers := []*lab.Socket{s.PeerSocket(lab.PeerA, 5000), s.PeerSocket(lab.PeerB, 5000), s.PeerSocket(lab.PeerB, 5001)}
	exts := map[netip.AddrPort]bool{}
	for _, host := range hosts {
		for _, peer := range peers {
			ext := s.Contact(host, peer)
			s.Must(peer.Send(ext, "answer"))
			if _, err := host.Expect("answer"); err != nil || ext.Addr().String() != "198.51.100.77" {
				t.Errorf("%v leaves as %v: %v", host.Addr(), ext, err)
			}
			exts[ext] = true
		}
	}
	if len(exts) != 2 {
		t.Errorf("two hosts leave as %v", exts)
	}
	s.Serve(mapped)
	for _, host := range hosts {
		if ext := s.Contact(host, proxy); !exts[ext] {
			t.Errorf("after a start %v leaves as %v, not as one of %v", host.Addr(), ext, exts)
		}
	}
}

// The same, but the address comes back, and a rule names it: it was never lost.
//
// Fails when the kernel ends mappings to any address that no link has.
func TestNFTAddressThatARuleNamesMayGoWhileTheDaemonIsDead(t *testing.T) {
	s := play(t, lab.Options{Inside: 2, Rules: natChain("srcnat", "masquerade")}, mapped, "--reconcile=1h")
	// From now on a rule names it.
	s.Must(s.NFT("flush chain ip nat postrouting; add rule ip nat postrouting oifname wan0 snat to 198.51.100.1"))
	s.Until("the kernel knows", func() bool {
		list, err := s.Gateway.Output("nft", "list", "set", "ip", "conenat", "masqueraded_addresses")
		return err == nil && !strings.Contains(list, "198.51.100.1") && strings.Contains(list, "10.47.11.1")
	})
	one, two, proxy := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074), s.PeerSocket(lab.PeerA, 3074)
	ports := []netip.AddrPort{s.Contact(one, proxy), s.Contact(two, proxy)}
	s.Kill()
	s.IP(s.Gateway, "address del 198.51.100.1/24 dev wan0")
	s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan0 onlink")
	another := s.PeerSocket(lab.PeerB, 3074)
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "3074") // else the kernel gives the ports of these flows
	s.Must(err)
	for i, host := range []*lab.Socket{two, one} {
		if got := s.Contact(host, another); got != ports[1-i] {
			t.Errorf("%v had %v, and gets %v", host.Addr(), ports[1-i], got)
		}
	}
}

// The gateway serves a port on an address that hosts are translated to. No mapping gets
// that port, whether the address is on an outside link or not, and whichever rule
// translates.
//
// Fails when a host keeps the port: its peers could answer only from the port asked.
func TestNFTPortServedOnAnyOutsideAddressIsTheGateways(t *testing.T) {
	t.Parallel() // mostly it waits
	for _, where := range []string{"loopback", "a link of no one", "outside link"} {
		for _, rule := range []string{"", "ip saddr map { 10.47.11.109 : " + routedAddr + " }"} {
			t.Run(where+" "+rule, func(t *testing.T) {
				s := withAddress(t, ownAddresses[where])
				if rule != "" {
					s.Must(s.NFT("flush chain ip nat postrouting; add rule ip nat postrouting oifname wan0 snat to " + rule))
				}
				own := s.Socket(s.Gateway.Namespace, netip.MustParseAddr(routedAddr), 5060)
				s.Serve(mapped, "--reconcile=1s")
				phone := s.InsideSocket(0, 5060)
				var peer *lab.Socket
				var ext netip.AddrPort
				port := uint16(20_000)
				s.Until("new flows leave by another port", func() bool {
					s.readAgain()
					port++
					peer = s.PeerSocket(lab.PeerA, port)
					ext = s.Contact(phone, peer)
					return ext.Port() != own.Addr().Port()
				})
				s.Stands(phone, peer, ext)
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
				s.Arrives(own, s.PeerSocket(lab.PeerA, 5071), own.Addr())
			})
		}
	}
}
