package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// User rules that choose outside ports, and the ports left for hosts.

// natChain is a source NAT chain with this priority, and rules for UDP that leaves by wan0.
func natChain(priority string, rules ...string) string {
	return fmt.Sprintf("table ip nat { chain postrouting { type nat hook postrouting priority %s;\noifname \"wan0\" meta l4proto udp %s; }; }\n",
		priority, strings.Join(rules, "\noifname \"wan0\" meta l4proto udp "))
}

// ports are inclusive ranges.
type ports [][2]uint16

func (p ports) has(e netip.AddrPort) bool {
	return slices.ContainsFunc(p, func(r [2]uint16) bool { return r[0] <= e.Port() && e.Port() <= r[1] })
}

// mapE are the port blocks of a MAP-E subscriber; numgen is the statement that uses them in
// turn.
var mapE = ports{{7472, 7487}, {11568, 11583}}

func numgen() string {
	var all []string
	for _, r := range mapE {
		for port := r[0]; port <= r[1]; port++ {
			all = append(all, fmt.Sprintf("%d : %d", len(all), port))
		}
	}
	return fmt.Sprintf("snat ip to 198.51.100.1 : numgen inc mod %d map { %s }", len(all), strings.Join(all, ", "))
}

// newcomer lets host 0 get an outside port, and host 1 send from that port. It checks that
// host 1 has one outside port of its own and is reached there, and returns both endpoints.
func (s *scene) newcomer() (first, second netip.AddrPort) {
	s.T.Helper()
	a, b := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
	first = s.Contact(s.InsideSocket(0, 3074), a)
	host := s.InsideSocket(1, first.Port())
	second = s.Contact(host, a)
	if other := s.Contact(host, b); other != second {
		s.T.Errorf("host 1 leaves as %v and as %v", second, other)
	}
	if second == first {
		s.T.Errorf("both leave as %v", first)
	}
	s.Arrives(host, s.PeerSocket(lab.PeerA, 5070), second)
	return first, second
}

// If another host has the port, a host gets one of the rule's ports, however the rule chooses
// and whatever its priority. Fails when the host is moved to the pool instead.
func TestNFTPortsOfARuleAreKept(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, tc := range map[string]struct {
		rules  string
		first  ports // of host 0
		second ports
	}{
		"MAP-E":             {natChain("srcnat", numgen()), mapE, mapE},
		"a range":           {natChain("srcnat", "snat to 198.51.100.1:7000-7015"), ports{{7000, 7015}}, ports{{7000, 7015}}},
		"before srcnat":     {natChain("-150", "masquerade to :7000-7015"), ports{{7000, 7015}}, ports{{7000, 7015}}},
		"behind srcnat":     {natChain("300", "masquerade to :7000-7015"), ports{{7000, 7015}}, ports{{7000, 7015}}},
		"the lowest of all": {natChain("-199", "masquerade to :7000-7015"), ports{{7000, 7015}}, ports{{7000, 7015}}},
		"a block for each host": {
			natChain("srcnat", "ip saddr 10.47.11.109 snat to 198.51.100.1:1024-2023", "ip saddr 10.47.11.110 snat to 198.51.100.1:2024-3023"),
			ports{{1024, 2023}},
			ports{{2024, 3023}},
		},
		"a map of blocks": {
			natChain("srcnat", "snat ip to ip saddr map { 10.47.11.109 : 198.51.100.1 . 1024-2023, 10.47.11.110 : 198.51.100.1 . 2024-3023 }"),
			ports{{1024, 2023}},
			ports{{2024, 3023}},
		},
		"a block for one host": {
			natChain("srcnat", "ip saddr 10.47.11.110 snat to 198.51.100.1:2024-3023", "masquerade"),
			ports{{3074, 3074}},
			ports{{2024, 3023}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 2, Rules: tc.rules}, stage.Auto[0], mapped)
			first, second := s.newcomer()
			if !tc.first.has(first) || !tc.second.has(second) {
				t.Errorf("they leave as %v and %v", first, second)
			}
			if m := s.Status().Tables.Mapping; !m.On || m.Moved > 0 {
				t.Errorf("%+v", m)
			}
		})
	}
}

// A rule for other hosts, for TCP, or for another link chooses no ports for these hosts: they
// use the pool. Fails when any rule that chooses ports turns the pool off.
func TestNFTPoolStandsBesideRulesForOthers(t *testing.T) {
	for name, rule := range map[string]string{
		"another network":     "ip saddr 192.168.122.0/24 meta l4proto udp masquerade to :1024-65535",
		"another host":        "ip saddr 10.47.11.109 meta l4proto udp masquerade to :1024-65535",
		"DNS, at random":      `oifname "wan0" udp dport 53 masquerade fully-random`,
		"one peer, at random": `oifname "wan0" ip daddr 192.0.2.1 masquerade fully-random`,
		"TCP":                 "meta l4proto tcp masquerade to :1024-65535",
		"another link":        `oifname "lan0" meta l4proto udp masquerade to :1024-65535`,
		"no packet":           "",
	} {
		t.Run(name, func(t *testing.T) {
			rules := fmt.Sprintf(`table ip nat {
				chain unused { meta l4proto udp masquerade to :1024-65535; }
				chain postrouting { type nat hook postrouting priority srcnat; %s; oifname "wan0" masquerade; }
			}`, rule)
			s := play(t, lab.Options{Inside: 2, Rules: rules}, stage.Auto[0], mapped)
			if _, second := s.newcomer(); !inPool(second) {
				t.Errorf("host 1 leaves as %v", second)
			}
		})
	}
}

// iptables rules are read as well, and the ports that they choose are kept.
func TestNFTPortsOfARuleOfIPTablesAreKept(t *testing.T) {
	t.Parallel() // mostly it waits
	for _, variant := range []string{lab.IPTablesNFT, lab.IPTablesLegacy} {
		for name, tc := range map[string]struct {
			rule string
			in   ports
		}{
			"masquerade": {"-p udp -j MASQUERADE --to-ports 7000-7015", ports{{7000, 7015}}},
			"SNAT":       {"-p udp -j SNAT --to-source 198.51.100.1:7000-7015", ports{{7000, 7015}}},
			"random":     {"-j MASQUERADE --random", ports{{1024, 65535}}},
			"randomly":   {"-j SNAT --to-source 198.51.100.1 --random-fully", ports{{1024, 65535}}},
		} {
			t.Run(variant+"/"+name, func(t *testing.T) {
				s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
				s.Must(s.IPTables(variant, "*nat\n-A POSTROUTING -o wan0 "+tc.rule+"\nCOMMIT\n"))
				s.Serve(stage.Auto[0], mapped)
				if first, second := s.newcomer(); !tc.in.has(first) || !tc.in.has(second) {
					t.Errorf("they leave as %v and %v", first, second)
				}
				if m := s.Status().Tables.Mapping; m.Moved > 0 || !s.warns("a rule of yours chooses outside ports") {
					t.Errorf("%+v; warnings %q", m, s.Status().Warnings)
				}
			})
		}
	}
}

// A host that first talks to another inside host keeps its own port there, and gets a port of
// the rule towards the outside. Fails when a hairpinned flow makes a mapping.
func TestNFTHairpinMakesNoMappingWhereARuleChoosesPorts(t *testing.T) {
	s := play(t, lab.Options{Inside: 2, Rules: natChain("srcnat", numgen())}, stage.Auto[0], mapped, "--hairpin=true")
	one, two, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5062), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(one, proxy)
	p := stage.Payload("hairpin")
	s.Must(two.Send(ext, p))
	from, err := one.Expect(p)
	s.Must(err)
	s.Must(one.Send(from, p+" answer"))
	if from, err = two.Expect(p + " answer"); err != nil || from != ext {
		t.Errorf("the answer arrives from %v (%v), want %v", from, err, ext)
	}
	for _, peer := range []*lab.Socket{proxy, s.PeerSocket(lab.PeerB, 5060)} {
		if got := s.Contact(two, peer); !mapE.has(got) {
			t.Errorf("it leaves as %v", got)
		}
	}
}

// The rule gives two ports in turn to four hosts, each with its own peer: two hosts get a port
// that another has. Each such flow is counted once; the others keep their mapping.
func TestNFTPortsThatARuleGivesTwiceAreCounted(t *testing.T) {
	s := play(t, lab.Options{Inside: 4, Rules: natChain("srcnat", "snat ip to 198.51.100.1 : numgen inc mod 2 map { 0 : 7472, 1 : 7473 }")},
		stage.Auto[0], mapped, "--reconcile=1s")
	for i := range 4 {
		host, peer := s.InsideSocket(i, 3074), s.PeerSocket(lab.PeerA, uint16(5060+i))
		for range 3 {
			s.Contact(host, peer)
		}
	}
	s.Until("the flows are seen", func() bool { return s.Status().Tables.Mapping.NotApplied["port_shared"] == 2 })
	if m := s.Status().Tables.Mapping; m.Shared != 2 || !m.On {
		t.Errorf("%+v", m)
	}
}

// A pool may be a list. Each subnet may have its own, or none: then the rule's port is shared,
// as without mappings, and counted. Single ports serve inside ports of the same parity.
func TestNFTPoolsOfSubnets(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 6})
	subnet := "[[subnet]]\nprefix = \"10.47.11.%d/32\"\nmapping = \"endpoint_independent\"\n"
	s.configured("reconcile = \"1s\"\nport_pool = [\"7472-7475\", \"11568-11569\"]\n" +
		fmt.Sprintf(subnet, 109) + fmt.Sprintf(subnet, 110) +
		fmt.Sprintf(subnet, 111) + "port_pool = [9001, 9003]\n" +
		fmt.Sprintf(subnet, 112) + "port_pool = \"none\"\n" +
		fmt.Sprintf(subnet, 113) + "port_pool = \"5061\"\n" +
		fmt.Sprintf(subnet, 114))
	contact := func(host int, port uint16) (ext netip.AddrPort) {
		t.Helper()
		in := s.InsideSocket(host, port)
		for i, addr := range []netip.Addr{lab.PeerA, lab.PeerB} { // own remote endpoints, so that a port can be shared
			got := s.Contact(in, s.PeerSocket(addr, 20_000+100*uint16(host)+port%100))
			if i > 0 && got != ext {
				t.Errorf("host %d leaves as %v and as %v", host, ext, got)
			}
			ext = got
		}
		s.Arrives(in, s.PeerSocket(lab.PeerA, 30_000+100*uint16(host)+port%100), ext)
		return ext
	}
	own := map[uint16]netip.AddrPort{}
	for _, port := range []uint16{3074, 3075, 3077, 3079, 3081} {
		if own[port] = contact(0, port); own[port].Port() != port {
			t.Fatalf("host 0 leaves as %v", own[port])
		}
	}
	var got []uint16
	for _, x := range []struct {
		host int
		port uint16
	}{
		{1, 3074},
		{5, 3074},
		{1, 3075},
		{5, 3075},
		{1, 3077},
		{2, 3075},
		{2, 3077},
		{4, 3079},
	} {
		got = append(got, contact(x.host, x.port).Port())
	}
	slices.Sort(got)
	if want := []uint16{5061, 7472, 7473, 7474, 7475, 9001, 9003, 11569}; !slices.Equal(got, want) {
		t.Errorf("hosts get the ports %d of the pools, want %d", got, want)
	}
	before := s.Status().Tables.Mapping
	in := s.InsideSocket(3, 3081)
	if ext := s.Contact(in, s.PeerSocket(lab.PeerB, 40_000)); ext != own[3081] {
		t.Errorf("without a pool it leaves as %v", ext)
	}
	if m := s.Status().Tables.Mapping; m.Shared != before.Shared+1 || m.PoolUsedUp != 0 || m.Moved != uint64(len(got)) {
		t.Errorf("%+v, before %+v", m, before)
	}
}

// A chain with conenatd's own priority runs first and translates our hosts: status names it
// and says that mapping is not in force, before any flow shows it. A chain for other hosts is
// named only; a chain behind ours changes nothing.
func TestNFTChainBeforeMappingsEndsThem(t *testing.T) {
	const named = "chain ip first c has the priority of conenatd's own, -199, and comes before it: mapping is not in force"
	for name, tc := range map[string]struct {
		before     bool
		statement  string
		ends, says bool
	}{
		"younger":            {false, "masquerade fully-random", true, true},
		"younger, of others": {false, "ip saddr 192.168.122.0/24 masquerade fully-random", false, true},
		"older":              {true, "masquerade fully-random", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			rival := fmt.Sprintf("table ip first { chain c { type nat hook postrouting priority -199; oifname \"wan0\" meta l4proto udp %s; }; }", tc.statement)
			s := newScene(t, lab.Options{})
			if tc.before {
				s.Must(s.NFT(rival))
			}
			s.Serve(stage.Auto[0], mapped, "--reconcile=1s")
			if !tc.before {
				s.Must(s.NFT(rival))
			}
			if tc.says {
				s.Until("it is told", func() bool { return s.warns(named) })
			}
			s.Until("status knows", func() bool { return s.Status().Tables.Mapping.On != tc.ends })
			phone, exts := s.InsideSocket(0, 5060), map[netip.AddrPort]bool{}
			for i := range uint16(8) {
				exts[s.Contact(phone, s.PeerSocket(lab.PeerB, 6000+i))] = true
			}
			if st := s.Status(); (len(exts) > 1) != tc.ends || st.Tables.Mapping.On == tc.ends || s.warns("chain ip first c") != tc.says {
				t.Errorf("it leaves as %v; %+v; warnings %q", exts, st.Tables.Mapping, st.Warnings)
			}
			if tc.ends { // a rival that is made again would come first again; without it mapping works
				s.Must(s.NFT("delete table ip first"))
				s.Until("it is in force", func() bool { return !s.warns("chain ip first c") })
			}
		})
	}
}

// A mapping from before the rule that chooses ports ends with its flows: the next flow leaves
// by a port of the rule. Flows already on such a port go on. Fails when the next flow gets the
// old mapping whatever the rules say now.
func TestNFTMappingsLeavePortsThatNoRuleGivesNow(t *testing.T) {
	t.Parallel() // mostly it waits
	const plain, block = "masquerade", "masquerade to :7000-7015"
	for name, tc := range map[string]struct {
		before, after string
		in            ports
		stays         uint16
		stopped       bool // the daemon is stopped while the rules change
	}{
		"a range":       {plain, block, ports{{7000, 7015}}, 7005, false},
		"of SNAT":       {plain, "snat to 198.51.100.1:7000-7015", ports{{7000, 7015}}, 7005, false},
		"another range": {"masquerade to :9000-9015", block, ports{{7000, 7015}}, 0, false},
		"MAP-E":         {plain, numgen(), mapE, 0, false},
		"a block for each host": {
			plain,
			"ip saddr 10.47.11.109 masquerade to :7000-7015;\noifname \"wan0\" ip saddr 10.47.11.110 meta l4proto udp masquerade to :7000-7015;\noifname \"wan0\" masquerade",
			ports{{7000, 7015}},
			7005, false,
		},
		"while stopped": {plain, block, ports{{7000, 7015}}, 7005, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 2, Rules: natChain("srcnat", tc.before)}, stage.Auto[0], mapped, "--reconcile=1h")
			peer, other := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
			hosts := []*lab.Socket{s.InsideSocket(0, 3074), s.InsideSocket(1, 3074)}
			for _, h := range hosts {
				if ext := s.Contact(h, peer); tc.in.has(ext) {
					t.Fatalf("it leaves as %v before", ext)
				}
			}
			var stays *lab.Socket
			var legal []string
			if tc.stays != 0 {
				stays = s.InsideSocket(0, tc.stays)
				s.Contact(stays, peer)
				legal = s.flowOf(stays)
			}
			if tc.stopped {
				s.Stop()
			}
			s.Must(s.NFT("delete table ip nat\n" + natChain("srcnat", tc.after)))
			if tc.stopped {
				s.Serve(stage.Auto[0], mapped, "--reconcile=1h")
			}
			for i, h := range hosts {
				s.Until("its flow ended", func() bool { return len(s.flowOf(h)) == 0 })
				first := s.Contact(h, peer)
				if second := s.Contact(h, other); second != first || !tc.in.has(first) {
					t.Errorf("it leaves as %v and as %v", first, second)
				}
				s.Arrives(h, s.PeerSocket(lab.PeerA, 6000+uint16(i)), first)
			}
			if tc.stays != 0 && (len(legal) != 1 || !slices.Equal(s.flowOf(stays), legal)) {
				t.Errorf("the flow %q is %q now", legal, s.flowOf(stays))
			}
		})
	}
}

// flowOf returns the IDs of the conntrack entries of an inside endpoint.
func (s *scene) flowOf(in *lab.Socket) (ids []string) {
	s.T.Helper()
	for _, line := range s.ConntrackList("-p", "udp", "--orig-src", in.Addr().Addr().String(), "--orig-port-src", itoa(in.Addr().Port()), "-o", "id") {
		_, id, ok := strings.Cut(line, " id=")
		if !ok {
			s.T.Fatalf("no identifier in %q", line)
		}
		ids = append(ids, id)
	}
	return ids
}

// A reload changes the pool. A mapping on a port of the old pool ends; one on a port of both
// pools stays, and so does one outside any pool. Fails when mappings outlive their pool.
func TestNFTMappingsLeaveAPoolThatChanges(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 3})
	subnet := "reconcile = \"1h\"\nport_pool = %s\n[[subnet]]\nprefix = \"10.47.11.0/24\"\nmapping = \"endpoint_independent\"\n"
	write := s.configured(fmt.Sprintf(subnet, `["7472-7475", "11568"]`))
	peer := s.PeerSocket(lab.PeerA, 5060)
	first, both, one := s.InsideSocket(0, 3074), s.InsideSocket(1, 3074), s.InsideSocket(2, 3074)
	own := s.Contact(first, peer)
	var exts []netip.AddrPort
	for _, h := range []*lab.Socket{both, one} {
		exts = append(exts, s.Contact(h, peer))
	}
	if exts[1] == exts[0] || own.Port() != 3074 {
		t.Fatalf("they leave as %v and %v", own, exts)
	}
	stay := []*lab.Socket{first, both}
	legal := [][]string{s.flowOf(first), s.flowOf(both)}
	write(fmt.Sprintf(subnet, fmt.Sprintf(`[%d, "9000-9015"]`, exts[0].Port())))
	if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
		t.Fatalf("exit %d, %q", code, out)
	}
	s.Until("its flow ended", func() bool { return len(s.flowOf(one)) == 0 })
	for i, want := range legal {
		if got := s.flowOf(stay[i]); len(want) != 1 || !slices.Equal(got, want) {
			t.Errorf("host %d: the flow %q is %q now", i, want, got)
		}
	}
	ext := s.Contact(one, s.PeerSocket(lab.PeerB, 5060))
	if ext.Port() < 9000 || ext.Port() > 9015 {
		t.Errorf("it leaves as %v", ext)
	}
	s.Arrives(one, s.PeerSocket(lab.PeerB, 5070), ext)
}

// Rules that only root may read may choose ports: a warning says so where there may be some.
// Fails when nobody is told that pool ports may be outside those of the rules.
func TestRulesThatOnlyRootMayReadMayChoosePorts(t *testing.T) {
	const told = `set port_pool = "none"`
	for name, tc := range map[string]struct{ asRoot, mapped bool }{"as root": {true, true}, "as another user": {false, true}, "without mapping": {false, false}} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{})
			s.Must(s.IPTables(lab.IPTablesLegacy, "*nat\nCOMMIT\n"))
			if !tc.asRoot {
				s.Exe = s.unprivileged()
			}
			flags := []string{stage.Auto[0]}
			if tc.mapped {
				flags = append(flags, mapped)
			}
			s.Serve(flags...)
			if got := s.warns(told); got != (tc.mapped && !tc.asRoot) {
				t.Errorf("warnings %q", s.Status().Warnings)
			}
		})
	}
}
