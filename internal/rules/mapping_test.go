package rules_test

import (
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

func TestTwoHostsOnOneSourcePortHaveOneOutsidePortEach(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	peers := m.peers()
	one, two := m.host(0, 3074), m.host(1, 3074)
	m.maps(one, m.ext(3074), peers...)
	ext := m.contact(two, peers[0])
	if !inPool(ext) || ext.Addr() != m.Gateway.Addr || ext.Port()%2 != 0 {
		t.Errorf("the second host got %v, want an even port of the pool", ext)
	}
	m.maps(two, ext, peers...)
	m.maps(one, m.ext(3074), m.peer(lab.PeerB, 9))
	if c := count(t, m.tables); c.Moved != 1 || c.LeftToRules != 0 {
		t.Errorf("%+v", c)
	}
	// All hosts have the first host's address until another one is seen.
	if list := m.listSet("map", "addresses_wan0"); !strings.Contains(list, "0.0.0.0 : 198.51.100.1") || strings.Contains(list, "10.47.11.1") {
		t.Error(list)
	}
}

func TestTenHostsOnOneSourcePort(t *testing.T) {
	const hosts = 10
	m := newMapper(t, lab.Options{Inside: hosts}, mapping)
	peers := m.peers()
	var all [hosts]*lab.Socket
	exts, seen := [hosts]netip.AddrPort{}, map[netip.AddrPort]bool{}
	for i := range all {
		all[i] = m.host(i, 3074)
		exts[i] = m.contact(all[i], peers[i%3])
		if seen[exts[i]] {
			t.Errorf("%v is given twice", exts[i])
		}
		seen[exts[i]] = true
	}
	for i, in := range all {
		m.maps(in, exts[i], peers...)
	}
	if len(m.mappings()) != hosts {
		t.Errorf("mappings: %v", m.mappings())
	}
}

// With conntrack alone the second host would get port 3074, and the next flow of the first
// host might get any other port.
func TestAMappingOutlivesItsFlows(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2, Rules: randomly("random")}, mapping)
	peers := m.peers()
	one := m.host(0, 3074)
	ext := m.contact(one, peers[0])
	for range 5 {
		m.forget(one)
		m.maps(one, ext, peers...)
	}
}

func TestAnOwnedPortIsNotGivenAwayWhenItsFlowsAreGone(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, mapping)
	peer := m.peer(lab.PeerA, 3074)
	one, two := m.host(0, 3074), m.host(1, 3074)
	m.maps(one, m.ext(3074), peer)
	m.forget(one)
	if ext := m.contact(two, peer); !inPool(ext) {
		t.Errorf("the second host got %v", ext)
	}
	m.maps(one, m.ext(3074), peer)
}

func TestRandomPortsStayTheSame(t *testing.T) {
	for _, how := range []string{"random", "fully-random"} {
		t.Run(how, func(t *testing.T) {
			m := newMapper(t, lab.Options{Inside: 2, Rules: randomly(how)}, mapping)
			peers := m.peers()
			for i := range 2 {
				in := m.host(i, 3074)
				ext := m.contact(in, peers[0])
				m.maps(in, ext, peers...)
			}
		})
	}
}

// Both hosts share the port as before there were mappings. The flows are not answered yet,
// so their packets reach the rules.
func TestASecondHostNeitherTakesOverNorRefreshesAMapping(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, guard)
	peers := m.peers()
	one, two := m.host(0, 3074), m.host(1, 3074)
	again := func(in, peer *lab.Socket) {
		t.Helper()
		if ext, err := in.Contact(peer); ext != m.ext(3074) || err != nil {
			t.Error(ext, err)
		}
	}
	again(one, peers[0])
	again(two, peers[1])
	set(t, m.tables, mapping)
	again(one, peers[0])
	p := mapped(one, m.ext(3074))
	m.holds(p)
	before := m.mappings()[p]
	again(two, peers[1])
	m.holds(p)
	if after := m.mappings()[p]; after > before {
		t.Errorf("%v left, and %v after the second host sent", before, after)
	}
	// That flow uses the port towards peers[1]: the first host's packets must not be lost.
	if ext := m.contact(one, peers[1]); ext == m.ext(3074) {
		t.Error("two flows have one outside port towards one peer")
	}
	m.maps(one, m.ext(3074), peers[2])
	ext := m.contact(two, peers[2])
	if !inPool(ext) {
		t.Errorf("the second host got %v", ext)
	}
	m.maps(one, m.ext(3074), peers[0])
	m.holds(p, mapped(two, ext))
}

func TestOnlyOwnFlowsRefreshAMapping(t *testing.T) {
	m := newMapper(t, lab.Options{}, mapping)
	in := m.host(0, 3074)
	p := mapped(in, m.ext(3074))
	m.maps(in, m.ext(3074), m.peer(lab.PeerA, 3074))
	k := m.kept()
	k.SetLifetime(time.Minute)
	k.Keep([]elements.Mapping{p}, func(_ int, err error) { t.Error(err) })
	if left := m.mappings()[p]; left > time.Minute {
		t.Errorf("%v left of a minute", left)
	}
	m.maps(in, m.ext(3074), m.peer(lab.PeerB, 3074))
	if left := m.mappings()[p]; left < 4*time.Minute {
		t.Errorf("%v left after a new flow", left)
	}
	if list := m.listSet("set", "owned"); !strings.Contains(list, "expires 5m") && !strings.Contains(list, "expires 4m") {
		t.Error(list)
	}
}

// Packets of host two use the second uplink, or do not.
func TestTwoOutsideLinksDoNotMixAddresses(t *testing.T) {
	d := withMapping(func(d *rules.Desired, _ *rules.MappingConfig) { d.OutsideLinks = []string{"wan0", "wan1"} })
	m := newMapper(t, lab.Options{Inside: 2, Rules: `table ip nat { chain postrouting {
		type nat hook postrouting priority srcnat; oifname { "wan0", "wan1" } masquerade; }; }`}, d)
	const second = "198.51.100.129"
	for _, step := range []struct {
		at   *lab.Host
		args string
	}{
		{m.Gateway, fmt.Sprintf("link add wan1 type veth peer name wan1 netns /proc/%d/fd/%d", os.Getpid(), m.Outside.FD())},
		{m.Gateway, "address add " + second + "/32 dev wan1"},
		{m.Gateway, "link set wan1 up"},
		{m.Outside, "link set wan1 up"},
		{m.Outside, "route add " + second + "/32 dev wan1"},
		{m.Gateway, "route add " + lab.PeerB.String() + " via 198.51.100.254 dev wan1 onlink"},
	} {
		if _, err := step.at.Output("ip", strings.Fields(step.args)...); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { return strings.Contains(output(t, m.Lab, "ip", "-brief", "link", "show", "wan1"), " UP ") })
	a, b := []*lab.Socket{m.peer(lab.PeerA, 1), m.peer(lab.PeerA, 2)}, []*lab.Socket{m.peer(lab.PeerB, 1), m.peer(lab.PeerB, 2)}
	one, two := m.host(0, 3074), m.host(1, 3074)
	ext := netip.AddrPortFrom(netip.MustParseAddr(second), 3074)
	for range 2 {
		m.maps(one, m.ext(3074), a...)
		m.maps(one, ext, b...)
		m.forget(one)
	}
	for i, peers := range [][]*lab.Socket{a, b} {
		got := m.contact(two, peers[0])
		if !inPool(got) || got.Addr() != []netip.Addr{m.Gateway.Addr, ext.Addr()}[i] {
			t.Errorf("the second host got %v on link %d", got, i)
		}
		m.maps(two, got, peers...)
	}
	if all := m.mappings(); len(all) != 4 {
		t.Errorf("mappings: %v", all)
	}
}

func TestFullMapOfMappingsLeavesFlowsToTheRules(t *testing.T) {
	m := newMapper(t, lab.Options{}, withMapping(func(_ *rules.Desired, c *rules.MappingConfig) { c.Size = 3 }))
	peers := m.peers()
	for port := uint16(5000); port < 5010; port++ {
		m.maps(m.host(0, port), m.ext(port), peers...)
	}
	if all := m.mappings(); len(all) != 3 {
		t.Errorf("mappings: %v", all)
	}
}

func TestSetOfMappingsChangesNothingTheSecondTime(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2}, hairpinning)
	in := m.host(0, 3074)
	p := mapped(in, m.contact(in, m.peer(lab.PeerA, 3074)))
	for _, d := range []rules.Desired{hairpinning, mapping, mapping, withMapping(func(d *rules.Desired, c *rules.MappingConfig) {
		c.Served, c.Exempt, c.Lifetime = []uint16{1, 2}, nil, time.Hour
		c.Pools = pool(50000, 50999)
		d.OutsideLinks = []string{"wan0", "ppp0"}
	})} {
		set(t, m.tables, d)
		before := ours(t, m.Lab)
		changed, err := m.tables.Set(d)
		if changed || err != nil {
			t.Errorf("changed %v, %v", changed, err)
		}
		if after := ours(t, m.Lab); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
		m.holds(p)
	}
	// Another process takes it over.
	check(t, m.tables.Close())
	m.tables = open(t, m.Lab)
	set(t, m.tables, hairpinning)
	m.holds(p)
	m.maps(in, m.ext(3074), m.peer(lab.PeerB, 1))
	// With the map of permissions, and without it.
	both := learning
	both.Mapping = mapping.Mapping
	set(t, m.tables, both)
	m.holds(p)
	set(t, m.tables, learning)
	m.holds()
	set(t, m.tables, mapping)
	m.holds()
}

// Any version of nft lists the rules and loads its own listing; e2e tries other versions.
func TestNFTListsMappings(t *testing.T) {
	several := withMapping(func(d *rules.Desired, c *rules.MappingConfig) {
		d.OutsideLinks = []string{"wan0", "wan-1.7", "p p@:%"}
		c.Subnets = []netip.Prefix{lab.InsideNet, netip.MustParsePrefix("10.47.8.0/23")}
		c.Exempt = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/25")}
		c.Hairpin = []netip.Prefix{netip.MustParsePrefix("10.47.8.0/22")}
		c.Pools = []rules.Pool{
			{Subnets: c.Subnets[:1], Ports: cone.PortRanges{{First: 50000, Last: 50031}, {First: 30001, Last: 30998}, {First: 2, Last: 3}}},
			{Subnets: c.Subnets[1:], Ports: cone.PortRanges{{First: 61001, Last: 61001}}},
		}
		c.Choosers = map[string][]netip.Prefix{
			"wan-1.7": {netip.MustParsePrefix("10.47.11.7/32"), netip.MustParsePrefix("10.47.8.16/28")},
			"p p@:%":  c.Subnets,
		}
	})
	for _, d := range []rules.Desired{mapping, hairpinning, several} {
		m := newMapper(t, lab.Options{Inside: 2}, d)
		peer := m.peer(lab.PeerA, 1)
		m.contact(m.host(0, 3074), peer)
		m.contact(m.host(1, 3074), peer)
		list := output(t, m.Lab, "nft", "list", "table", "ip", "conenat")
		for _, want := range []string{
			"type nat hook postrouting priority -199;",
			"ip saddr . udp sport map @kept_wan0", "map @moved_wan0", "update @taken { ct reply proto-dst",
			"rt ipsec missing", "ip daddr != 192.0.2.", "elements = { 53 }",
			`comment "its mapping"`, "counter left_to_rules",
		} {
			if !strings.Contains(list, want) {
				t.Errorf("not in the list: %s", want)
			}
		}
		if got := strings.Contains(list, "chain hairpinned"); got != (d.Mapping.Hairpin != nil) {
			t.Errorf("hairpin rules: %v", got)
		}
		if strings.Contains(list, "hook prerouting") && !strings.Contains(list, "priority 2147483647;") {
			t.Error("the user's forwards do not come before hairpinning")
		}
		// nft would own the table, which would end with nft.
		file, list := t.TempDir()+"/list", ownerFlags.ReplaceAllString(list, "")
		check(t, os.WriteFile(file, []byte(list), 0o600))
		if out, err := m.Outside.Output("nft", "-f", file); err != nil {
			t.Errorf("%s: %v", out, err)
		}
		again, err := m.Outside.Output("nft", "list", "table", "ip", "conenat")
		check(t, err)
		if lacks := lacking(list, again); len(lacks) > 0 {
			t.Errorf("the copy lacks %q", lacks)
		}
	}
}

var ownerFlags = regexp.MustCompile(`\tflags owner.*\n`)

// lacking returns the lines of list that copied lacks, except for elements.
func lacking(list, copied string) (lacks []string) {
	for line := range strings.Lines(list) {
		if !strings.Contains(copied, line) && !strings.Contains(line, " expires ") && !strings.HasPrefix(line, "table") &&
			!strings.Contains(line, "packets ") {
			lacks = append(lacks, line)
		}
	}
	return lacks
}

// The user redirects flows of inside hosts. That is not a hairpin.
func TestARedirectedFlowHasItsMapping(t *testing.T) {
	m := newMapper(t, lab.Options{Inside: 2, Rules: lab.Masquerade + `table ip f { chain c {
		type nat hook prerouting priority dstnat; iifname "lan0" udp dport 9999 dnat to 203.0.113.6:3074; }; }`}, hairpinning)
	peers := m.peers()
	m.maps(m.host(0, 3074), m.ext(3074), peers[0])
	in := m.host(1, 3074)
	ext := m.contact(in, peers[0])
	m.forget(in) // or the kernel would look at that flow
	check(t, in.Send(netip.AddrPortFrom(lab.PeerA, 9999), "redirected"))
	if from, err := peers[2].Expect("redirected"); err != nil || from != ext || !inPool(ext) {
		t.Errorf("it leaves as %v, want %v (%v)", from, ext, err)
	}
}
