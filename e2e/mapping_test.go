package e2e

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Endpoint-independent mapping (RFC 4787 REQ-1 to REQ-4) and hairpinning (REQ-9).

const mapped = "--mapping=endpoint_independent"

// firstAddress finds the gateway's outside address in a list.
var firstAddress = regexp.MustCompile(`\b198\.51\.100\.1\b`)

func inPool(e netip.AddrPort) bool { return e.Port() >= 61000 }

// consoles opens a socket on one source port on each of n hosts; each talks to three
// remotes.
func (s *scene) consoles(n int) (hosts []*lab.Socket, exts []netip.AddrPort) {
	s.T.Helper()
	const port = 3074
	remotes := []*lab.Socket{s.PeerSocket(lab.PeerA, port), s.PeerSocket(lab.PeerA, 3075), s.PeerSocket(lab.PeerB, port)}
	for i := range n {
		hosts = append(hosts, s.InsideSocket(i, port))
		exts = append(exts, netip.AddrPort{})
	}
	for round := range len(remotes) {
		for i, host := range hosts {
			ext := s.Contact(host, remotes[(round+i)%len(remotes)])
			if exts[i].IsValid() && ext != exts[i] {
				s.T.Errorf("host %d leaves as %v and as %v", i, exts[i], ext)
			}
			exts[i] = ext
		}
	}
	return hosts, exts
}

// Each host has an outside port that no other host has, and any port of its peers
// reaches it there. Fails with the kernel's own mapping.
func TestNFTConsolesOnOneSourcePort(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.NFTByEvent, stage.Expect}, func(t *testing.T, mode ...string) {
		for _, n := range []int{2, 10} {
			s := play(t, lab.Options{Inside: n}, append(mode, mapped)...)
			hosts, exts := s.consoles(n)
			s.Until("all permissions stand", func() bool { return s.Status().Permissions.Standing == 2*n })
			owners := map[netip.AddrPort]int{}
			for i, ext := range exts {
				if j, taken := owners[ext]; taken {
					t.Errorf("hosts %d and %d share %v", i, j, ext)
				}
				owners[ext] = i
				if (ext.Port() == 3074) != (i == 0) || i > 0 && (!inPool(ext) || ext.Port()%2 != 0) {
					t.Errorf("host %d leaves as %v", i, ext)
				}
				for k, addr := range []netip.Addr{lab.PeerA, lab.PeerB} {
					s.Arrives(hosts[i], s.PeerSocket(addr, uint16(20_000+2*i+k)), ext)
				}
			}
			if m := s.Status().Tables.Mapping; !m.On || m.Moved != uint64(n-1) {
				t.Errorf("%+v", m)
			}
			s.Stop()
			if left := s.Leftovers(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		}
	})
}

// The user's rule gives the first flow a random port; later flows keep it.
func TestNFTMappingMendsRandomPorts(t *testing.T) {
	for _, how := range []string{"random", "fully-random"} {
		t.Run(how, func(t *testing.T) {
			s := play(t, lab.Options{Rules: strings.Replace(lab.Masquerade, "masquerade", "masquerade "+how, 1)}, stage.Auto[0], mapped)
			phone := s.InsideSocket(0, 5060)
			ext := s.Contact(phone, s.PeerSocket(lab.PeerA, 5060))
			for port := uint16(5061); port < 5066; port++ {
				if got := s.Contact(phone, s.PeerSocket(lab.PeerB, port)); got != ext {
					t.Errorf("it leaves as %v and as %v", ext, got)
				}
			}
		})
	}
}

// Without mappings each flow has another outside port: status counts that and warns.
func TestNFTRandomPortsAreSeen(t *testing.T) {
	for _, tc := range []struct {
		how, mapping string
		random       bool
	}{
		{"", "kernel", false},
		{" to :50000-59999", "kernel", false}, // another port, but always the same
		{" random", "kernel", true},
		{" fully-random", "kernel", true},
		{" random", "endpoint_independent", false},
	} {
		t.Run(tc.how+" "+tc.mapping, func(t *testing.T) {
			s := play(t, lab.Options{Rules: strings.ReplaceAll(lab.MasqueradeRange(50000, 59999), " to :50000-59999", tc.how)},
				stage.Auto[0], "--mapping="+tc.mapping)
			phone, exts := s.InsideSocket(0, 5060), map[netip.AddrPort]bool{}
			const flows = 12
			for i := range flows {
				exts[s.Contact(phone, s.PeerSocket(netip.AddrFrom4([4]byte{203, 0, 113, byte(50 + i)}), 5060))] = true
			}
			s.Until("all are known", func() bool { return s.Status().Permissions.Standing == flows })
			st := s.Status()
			c := st.Counters
			if tc.random && c.Remapped < flows-2 || !tc.random && c.Remapped > 0 || tc.mapping == "kernel" && c.Compared != flows-1 {
				t.Errorf("%d of %d remapped; %d outside endpoints", c.Remapped, c.Compared, len(exts))
			}
			warned := stage.Warned(st, "random or fully-random")
			if warned != tc.random {
				t.Errorf("warnings: %q", st.Warnings)
			}
		})
	}
}

// A mapping lives as long as its flows, and at most a lifetime longer. Fails when the
// reconcile does not refresh the mappings of living flows.
func TestNFTMappingLivesAsLongAsItsFlows(t *testing.T) {
	t.Parallel() // mostly it waits
	s := play(t, lab.Options{Inside: 2}, stage.Auto[0], mapped, "--lifetime=6s", "--reconcile=1s")
	one, two, proxy := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074), s.PeerSocket(lab.PeerA, 3074)
	ext := s.Contact(one, proxy)
	p := stage.Payload("answered: no packet of it meets the rules any more")
	s.Must(proxy.Send(ext, p))
	_, err := one.Expect(p)
	s.Must(err)
	s.Must(one.Send(proxy.Addr(), p))
	if _, err := proxy.Expect(p); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	s.Until("two lifetimes passed", func() bool { s.Status(); return time.Since(began) > 13*time.Second })
	if other := s.Contact(two, proxy); !inPool(other) {
		t.Errorf("the second host leaves as %v while the first has the port", other)
	}
	for _, host := range []string{"10.47.11.109", "10.47.11.110"} {
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", host)
		s.Must(err)
	}
	s.Until("no mapping stands", func() bool {
		out, err := s.Gateway.Output("nft", "list", "set", "ip", "conenat", "owned") // the last to go
		s.Must(err)
		return !strings.Contains(out, "elements")
	})
	if got := s.Contact(two, proxy); got.Port() != 3074 {
		t.Errorf("a lifetime later the second host leaves as %v", got)
	}
}

// Existing flows give mappings: at the start, when a reload turns mappings on, and
// after somebody deleted the tables.
func TestNFTMappingsOfFlowsThatAreThere(t *testing.T) {
	stands := func(s *scene) bool {
		kept, err := s.Gateway.Output("nft", "list", "map", "ip", "conenat", "kept_wan0")
		if err != nil || !strings.Contains(kept, "10.47.11.109 . 3074") || !firstAddress.MatchString(kept) {
			return false
		}
		// Newcomers get a port of the pool once this map has the address, too.
		addresses, err := s.Gateway.Output("nft", "list", "map", "ip", "conenat", "addresses_wan0")
		return err == nil && firstAddress.MatchString(addresses)
	}
	const plain = "reconcile = \"1h\"\n[[subnet]]\nprefix = \"10.47.11.0/24\"\n"
	const withMappings = plain + "mapping = \"endpoint_independent\"\n"
	for name, begin := range map[string]func(*scene){
		"start": func(s *scene) { s.configured(withMappings) },
		"reload": func(s *scene) {
			s.configured(plain)(withMappings)
			if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
				s.T.Fatalf("exit %d, %q", code, out)
			}
		},
		"delete table": func(s *scene) {
			s.configured(withMappings)
			s.Until("it stands", func() bool { return stands(s) })
			owned := s.owned()
			if err := s.NFT("delete table ip conenat"); (err != nil) != owned {
				s.T.Fatalf("owned %v, %v", owned, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2})
			one, two, proxy := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074), s.PeerSocket(lab.PeerA, 3074)
			s.Contact(one, proxy)
			begin(s)
			s.Until("the mapping stands", func() bool { return stands(s) })
			if ext := s.Contact(two, s.PeerSocket(lab.PeerB, 3074)); !inPool(ext) {
				t.Errorf("the second host leaves as %v", ext)
			}
		})
	}
}

// The gateway and an inside host talk to one remote from the same port: neither's
// packets are dropped, whoever comes first.
func TestNFTMappingAndTheGatewaysOwnFlows(t *testing.T) {
	for _, gatewayFirst := range []bool{true, false} {
		t.Run(fmt.Sprintf("gateway first: %v", gatewayFirst), func(t *testing.T) {
			s := play(t, lab.Options{Inside: 1}, stage.Auto[0], mapped)
			host, resolver, other := s.InsideSocket(0, 40000), s.PeerSocket(lab.PeerA, 5300), s.PeerSocket(lab.PeerB, 5300)
			ext := s.Contact(host, other)
			own := s.Socket(s.Gateway.Namespace, s.Gateway.Addr, ext.Port())
			if gatewayFirst {
				s.Contact(own, resolver)
			}
			got := s.Contact(host, resolver)
			if (got == ext) == gatewayFirst {
				t.Errorf("the host leaves as %v, its mapping is %v", got, ext)
			}
			s.Contact(own, resolver)
			if again := s.Contact(host, s.PeerSocket(lab.PeerB, 5301)); again != ext {
				t.Errorf("towards another remote it leaves as %v, want %v", again, ext)
			}
		})
	}
}

func TestNFTHairpin(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{Inside: 2}, append(mode, mapped, "--hairpin=true")...)
		one, two, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5062), s.PeerSocket(lab.PeerA, 5060)
		extOne, extTwo := s.Contact(one, proxy), s.Contact(two, proxy)
		for _, way := range []struct {
			from, to *lab.Socket
			ext, as  netip.AddrPort
		}{{two, one, extOne, extTwo}, {one, two, extTwo, extOne}} {
			p := stage.Payload("hairpin")
			s.Must(way.from.Send(way.ext, p))
			from, err := way.to.Expect(p)
			s.Must(err)
			if from != way.as {
				t.Errorf("it arrives from %v, want the sender's outside endpoint %v", from, way.as)
			}
			s.Must(way.to.Send(from, p+" answer"))
			if from, err = way.from.Expect(p + " answer"); err != nil || from != way.ext {
				t.Errorf("the answer arrives from %v (%v), want %v", from, err, way.ext)
			}
		}
		s.Stands(one, proxy, extOne)
		s.Arrives(one, s.PeerSocket(lab.PeerA, 5070), extOne)
	})
}

// When an outside address goes away, its mappings end at once.
func TestNFTMappingsEndWithTheirAddress(t *testing.T) {
	s := play(t, lab.Options{}, stage.Auto[0], mapped, "--reconcile=1h")
	phone, proxy, another := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
	s.Contact(phone, proxy)
	s.Contact(phone, another) // translated by the mapping
	mappings := func() string {
		out, err := s.Gateway.Output("nft", "list", "map", "ip", "conenat", "kept_wan0")
		s.Must(err)
		return out
	}
	if !firstAddress.MatchString(mappings()) {
		t.Fatal(mappings())
	}
	for _, step := range []string{
		"address add 198.51.100.77/32 dev wan0",
		"address del 198.51.100.1/24 dev wan0",
		"route replace default via 198.51.100.254 dev wan0 onlink",
	} {
		_, err := s.Gateway.Output("ip", strings.Fields(step)...)
		s.Must(err)
	}
	s.Until("the mappings are gone", func() bool { return !firstAddress.MatchString(mappings()) })
	_, err := s.Outside.Output("ip", "route", "replace", "198.51.100.77/32", "dev", "eth0")
	s.Must(err)
	s.Until("the new address is in use", func() bool {
		return s.Contact(phone, another).Addr().String() == "198.51.100.77"
	})
}

// Sixty newcomers want one of the 32 even ports of the pool. Those that find none are
// counted, status warns of them, and they still get through.
func TestNFTPoolThatIsUsedUp(t *testing.T) {
	const hosts, ports, even = 4, 20, 32
	s := play(t, lab.Options{Inside: hosts}, stage.Auto[0], mapped, "--port-pool=61000-61063")
	remotes := []*lab.Socket{s.PeerSocket(lab.PeerA, 3074), s.PeerSocket(lab.PeerB, 3074)}
	for i := range hosts {
		for port := range uint16(ports) {
			host := s.InsideSocket(i, 3000+2*port)
			for _, remote := range remotes {
				ext := s.Contact(host, remote)
				if i == hosts-1 {
					s.Arrives(host, s.PeerSocket(remote.Addr().Addr(), 4000+port), ext)
				}
			}
		}
	}
	if m := s.Status().Tables.Mapping; m.Moved > even || m.PoolUsedUp < (hosts-1)*ports-even {
		t.Errorf("%+v", m)
	}
	if !s.warns("port_pool 61000-61063 had no port") {
		t.Errorf("warnings: %q", s.Status().Warnings)
	}
}

// Another NAT chain with conenatd's own priority may run first: a warning names it.
func TestNFTChainBeforeMappingsIsNamed(t *testing.T) {
	s := play(t, lab.Options{}, stage.Auto[0], mapped)
	const want = "chain ip first c has the priority of conenatd's own"
	if s.warns(want) {
		t.Errorf("warnings: %q", s.Status().Warnings)
	}
	s.Must(s.NFT(`table ip first { chain c { type nat hook postrouting priority -199; }; }`))
	s.Until("it is warned of", func() bool { return s.warns(want) })
}

// A rule that chooses outside ports keeps every host on them (MAP-E, RFC 7422),
// whether it is there at the start or comes later. Fails when newcomers are moved to
// the pool.
func TestNFTRuleThatChoosesPortsIsLeftNewcomers(t *testing.T) {
	const first, last = 7472, 7487
	for name, rules := range map[string]string{
		"a range":   lab.MasqueradeRange(first, last),
		"at random": strings.ReplaceAll(lab.MasqueradeRange(first, last), "-7487", "-7487 random"),
	} {
		t.Run(name, func(t *testing.T) {
			for _, before := range []bool{true, false} {
				s := newScene(t, lab.Options{Inside: 2, Rules: rules})
				if !before {
					s.Must(s.NFT("flush ruleset\n" + lab.Masquerade))
				}
				s.Start("--subnet", lab.InsideNet.String(), stage.Auto[0], mapped)
				if !before {
					s.Must(s.NFT("delete table ip nat\n" + rules))
				}
				s.Until("the rule is known", func() bool { return s.warns("port_pool is not used, for a rule of yours chooses outside ports") })
				a, b := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
				owned := s.Contact(s.InsideSocket(0, 3074), a)
				newcomer := s.InsideSocket(1, owned.Port())
				for _, peer := range []*lab.Socket{a, b} {
					if ext := s.Contact(newcomer, peer); ext.Port() < first || ext.Port() > last {
						t.Errorf("known from the start %v: a newcomer leaves as %v", before, ext)
					}
				}
			}
		})
	}
}
