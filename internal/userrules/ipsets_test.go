package userrules

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables/expr"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

// The packet of a host, 10.47.11.109:5060 to 203.0.113.5:7070, and sets of ipset.
//
// Fails when a set seems to have or to lack the packet, and the kernel would say otherwise, or when
// nothing is known of a set that the kernel can be asked for.
func TestIPSetsAreAsked(t *testing.T) {
	const yes, no, unknown = "yes", "no", "unknown"
	for name, tc := range map[string]struct{ create, element, match, want string }{
		"address":               {"hash:ip", "203.0.113.5", "--match-set s dst", yes},
		"another address":       {"hash:ip", "203.0.113.6", "--match-set s dst", no},
		"address of the source": {"hash:ip", "203.0.113.5", "--match-set s src", no},
		"inverted":              {"hash:ip", "203.0.113.5", "! --match-set s dst", no},
		"inverted, another":     {"hash:ip", "203.0.113.6", "! --match-set s dst", yes},
		"network":               {"hash:net", "203.0.113.0/24", "--match-set s dst", yes},
		"exception":             {"hash:net", "203.0.113.5/32 nomatch", "--match-set s dst", no},
		"masked":                {"hash:ip netmask 24", "203.0.113.0", "--match-set s dst", yes},
		"bitmap":                {"bitmap:ip range 10.47.11.0/24", "10.47.11.109", "--match-set s src", yes},
		"beyond a bitmap":       {"bitmap:ip range 10.47.11.0/24", "10.47.11.109", "--match-set s dst", no},
		"port":                  {"bitmap:port range 0-65535", "7070", "--match-set s dst", yes},
		"address and port":      {"hash:ip,port", "203.0.113.5,udp:7070", "--match-set s dst,dst", yes},
		"fewer parts":           {"hash:ip,port", "203.0.113.5,udp:7070", "--match-set s dst", no},
		"fewer parts, inverted": {"hash:ip,port", "203.0.113.5,udp:7070", "! --match-set s dst", yes},
		"port of the source":    {"hash:ip,port", "203.0.113.5,udp:7070", "--match-set s dst,src", no},
		"port of TCP":           {"hash:ip,port", "203.0.113.5,tcp:7070", "--match-set s dst,dst", no},
		"all parts":             {"hash:ip,port,net", "10.47.11.109,udp:7070,203.0.113.0/24", "--match-set s src,dst,dst", yes},
		"link":                  {"hash:net,iface", "203.0.113.0/24,lan0", "--match-set s dst,src", unknown},
		"sets":                  {"list:set", "", "--match-set s dst", unknown},
		"counters":              {"hash:ip counters", "203.0.113.5", "--match-set s dst --packets-gt 9", unknown},
	} {
		for _, variant := range []string{lab.IPTablesNFT, lab.IPTablesLegacy} {
			t.Run(name+", "+variant, func(t *testing.T) {
				l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
				for _, args := range []string{"create s " + tc.create, "add s " + tc.element} {
					if strings.HasSuffix(args, " ") {
						continue
					}
					if _, err := l.Gateway.Output("ipset", strings.Fields(args)...); err != nil {
						t.Fatal(err)
					}
				}
				if err := l.IPTables(variant, "*mangle\n-A PREROUTING -m set "+tc.match+" -j MARK --set-mark 7\nCOMMIT\n"); err != nil {
					t.Fatal(err)
				}
				got := unknown
				if err := l.Gateway.Do(func() error {
					var m Members
					f := cone.Flow{
						Src:      cone.EndpointFrom(netip.MustParseAddrPort("10.47.11.109:5060")),
						ReplySrc: cone.EndpointFrom(netip.MustParseAddrPort("203.0.113.5:7070")),
					}
					if matches, known := m.matches(setMatch(t), sent(&f, Link{})); known {
						got = map[bool]string{true: yes, false: no}[matches]
					}
					return m.Close()
				}); err != nil {
					t.Fatal(err)
				}
				if got != tc.want {
					t.Errorf("%s, want %s", got, tc.want)
				}
			})
		}
	}
}

// setMatch returns the only match for a set in the rules of the gateway.
func setMatch(t *testing.T) (found *expr.Match) {
	t.Helper()
	r := NewReader(Config{OwnChain: "ours"})
	defer r.Close()
	rs, err := r.Read()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range rs.tables {
		for _, c := range table.chains {
			for _, rule := range c.rules {
				for _, s := range rule.statements {
					if m, ok := s.expr.(*expr.Match); ok && m.Name == "set" {
						found = m
					}
				}
			}
		}
	}
	if found == nil {
		t.Fatal("no rule looks up a set")
	}
	return found
}
