package userrules_test

import (
	"fmt"
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/lab"
)

// named matches the name of a rule in its table, for replacement.
var named = regexp.MustCompile(`^.*(POSTROUTING|fw) .*$`)

func TestSourceNATOfIPTables(t *testing.T) {
	for _, variant := range []string{lab.IPTablesNFT, lab.IPTablesLegacy} {
		for name, test := range map[string]struct {
			rules    string
			choosers []string
			fixed    string
		}{
			"masquerade":              {"-A POSTROUTING -o wan0 -j MASQUERADE", nil, "[] false"},
			"masquerade ports":        {"-A POSTROUTING -o wan0 -p udp -j MASQUERADE --to-ports 1000-2000", []string{"POSTROUTING"}, "[] false"},
			"random masquerade":       {"-A POSTROUTING -o wan0 -j MASQUERADE --random", []string{"POSTROUTING"}, "[] false"},
			"random-fully masquerade": {"-A POSTROUTING -o wan0 -j MASQUERADE --random-fully", []string{"POSTROUTING"}, "[] false"},
			"random, of some":         {"-A POSTROUTING -s 10.47.11.0/24 -o wan0 -j MASQUERADE --random", []string{"POSTROUTING"}, "[] false"},
			"random, of marked ones": {
				":KUBE - [0:0]\n-A POSTROUTING -j KUBE\n-A KUBE -m mark ! --mark 0x4000/0x4000 -j RETURN\n" +
					"-A KUBE -j MASQUERADE --random-fully\n-A POSTROUTING -o wan0 -j MASQUERADE",
				nil, "[] false",
			},
			"random, if marked": {"-A POSTROUTING -m mark --mark 7 -j MASQUERADE --random", nil, "[] false"},
			"random, to a port": {"-A POSTROUTING -o wan0 -p udp --dport 53 -j MASQUERADE --random-fully\n-A POSTROUTING -o wan0 -j MASQUERADE", nil, "[] false"},
			"ports, to a port": {
				"-A POSTROUTING -o wan0 -p udp --dport 53 -j MASQUERADE --to-ports 1000-2000 --random\n-A POSTROUTING -o wan0 -j MASQUERADE",
				[]string{"POSTROUTING"},
				"[] false",
			},
			"masquerade of TCP": {"-A POSTROUTING -o wan0 -p tcp -j MASQUERADE --to-ports 1000-2000", nil, "[] false"},
			"address at random": {
				"-A POSTROUTING -o wan0 -j SNAT --to-source 198.51.100.1 --random-fully",
				[]string{"POSTROUTING"},
				"[198.51.100.1-198.51.100.1] false",
			},
			"address": {"-A POSTROUTING -o wan0 -j SNAT --to-source 198.51.100.1", nil, "[198.51.100.1-198.51.100.1] false"},
			"addresses and ports": {
				"-A POSTROUTING -p udp -j SNAT --to-source 198.51.100.1-198.51.100.9:1000-2000",
				[]string{"POSTROUTING"},
				"[198.51.100.1-198.51.100.9] false",
			},
			"ports alone": {"-A POSTROUTING -p udp -j SNAT --to-source :1000-2000", []string{"POSTROUTING"}, "[] false"},
			"chain of the user's": {
				":fw - [0:0]\n-A POSTROUTING -j fw\n-A fw -p udp -s 10.47.11.0/25 -j SNAT --to-source 198.51.100.1:1000-2000",
				[]string{"fw"},
				"[198.51.100.1-198.51.100.1] false",
			},
			"netmap":          {"-A POSTROUTING -s 10.47.11.0/24 -j NETMAP --to 198.51.100.0/24", nil, "[198.51.100.0-198.51.100.255] false"},
			"of destinations": {"-A PREROUTING -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109:1000-2000", nil, "[] false"},
		} {
			t.Run(variant+"/"+name, func(t *testing.T) {
				t.Parallel()
				l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
				check(t, l.IPTables(variant, "*nat\n"+test.rules+"\nCOMMIT\n"))
				rs := ruleset(t, l)
				choosers, err := rs.PortChoosers()
				check(t, err)
				var names []string
				for _, c := range choosers {
					names = append(names, named.ReplaceAllString(c.Text, "$1"))
				}
				if diff := cmp.Diff(test.choosers, names); diff != "" {
					t.Error(diff)
				}
				addrs, unknown := rs.FixedSources()
				fixed := []string{}
				for _, a := range addrs {
					fixed = append(fixed, fmt.Sprint(a.First, "-", a.Last))
				}
				if got := fmt.Sprint(fixed, unknown); got != test.fixed {
					t.Errorf("fixed sources %s, want %s", got, test.fixed)
				}
			})
		}
	}
}

// Only root may know which tables there are.
func TestHiddenTablesOfIPTablesLegacyMayHaveFixedSources(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.Masquerade})
	check(t, l.IPTables(lab.IPTablesLegacy, "*nat\nCOMMIT\n"))
	for _, asRoot := range []bool{true, false} {
		check(t, l.Gateway.Do(func() error {
			read := func() error {
				rs, err := readOnce(0)
				if err != nil {
					return err
				}
				_, unknown := rs.FixedSources()
				if unknown == asRoot {
					err = fmt.Errorf("unknown %v, as root %v", unknown, asRoot)
				}
				return err
			}
			if asRoot {
				return read()
			}
			return asAnotherUser(read)
		}))
	}
}
