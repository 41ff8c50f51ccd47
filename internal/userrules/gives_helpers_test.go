package userrules_test

import (
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Rules that give flows a helper are found whatever the flows are, in every chain that packets of
// inside hosts meet. What cannot be read may give one.
//
// Fails when a kind of rule is missed, and when another rule counts.
func TestGivesHelpers(t *testing.T) {
	const objects = `table inet h { ct helper s { type "sip" protocol tcp; }; counter c { }; `
	for name, tc := range map[string]struct {
		nft, iptables, variant string
		want                   bool
	}{
		"no rules":                            {nft: lab.NoRules},
		"masquerade":                          {nft: lab.Masquerade + lab.DropPolicy},
		"an object alone":                     {nft: objects + `chain pre { type filter hook prerouting priority filter; tcp dport 5060 counter name "c"; }; }`},
		"TCP":                                 {nft: objects + `chain pre { type filter hook prerouting priority filter; tcp dport 5060 ct helper set "s"; }; }`, want: true},
		"behind a jump":                       {nft: objects + `chain sip { ct helper set "s"; }; chain pre { type filter hook forward priority filter; tcp dport vmap { 5060 : jump sip }; }; }`, want: true},
		"behind another jump":                 {nft: objects + `chain sip { ct helper set "s"; }; chain pre { type filter hook forward priority filter; tcp dport 5060 jump sip; }; }`, want: true},
		"behind a jump by protocol":           {nft: objects + `chain sip { tcp dport 5060 ct helper set "s"; }; chain pre { type filter hook forward priority filter; meta l4proto vmap { tcp : jump sip, udp : accept }; }; }`, want: true},
		"ports by a map":                      {nft: objects + `chain pre { type filter hook forward priority filter; udp dport vmap { 53 : accept, 67 : drop }; tcp dport { 22, 80 } accept; }; }`},
		"postrouting":                         {nft: objects + `chain post { type filter hook postrouting priority -10; meta mark 7 ct helper set "s"; }; }`, want: true},
		"by a map":                            {nft: objects + `chain pre { type filter hook prerouting priority filter; ct helper set tcp dport map { 5060 : "s" }; }; }`, want: true},
		"a counter by a map":                  {nft: objects + `chain pre { type filter hook prerouting priority filter; counter name udp dport map { 5060 : "c" }; }; }`},
		"nobody gets there":                   {nft: objects + `chain sip { ct helper set "s"; }; chain pre { type filter hook prerouting priority filter; }; }`},
		"iptables-nft":                        {iptables: "*raw\n-A PREROUTING -p tcp --dport 5060 -j CT --helper sip\nCOMMIT\n", variant: lab.IPTablesNFT, want: true},
		"iptables-legacy":                     {iptables: "*raw\n-A PREROUTING -p tcp --dport 5060 -j CT --helper sip\nCOMMIT\n", variant: lab.IPTablesLegacy, want: true},
		"iptables without":                    {iptables: "*raw\n-A PREROUTING -p tcp --dport 5060 -j CT --notrack\nCOMMIT\n", variant: lab.IPTablesNFT},
		"legacy without":                      {iptables: "*raw\n-A PREROUTING -p tcp --dport 5060 -j CT --notrack\nCOMMIT\n", variant: lab.IPTablesLegacy},
		"a rule for the helper of the master": {nft: `table inet h { chain f { type filter hook forward priority filter; ct helper "sip" accept; }; }`},
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			if tc.nft != "" {
				check(t, l.NFT(tc.nft))
			}
			if tc.iptables != "" {
				check(t, l.IPTables(tc.variant, tc.iptables))
			}
			if got := ruleset(t, l).GivesHelpers(); got != tc.want {
				t.Errorf("%v, want %v", got, tc.want)
			}
		})
	}
	t.Run("what cannot be read", func(t *testing.T) {
		l := lab.ForTest(t, lab.Options{Rules: lab.DropPolicy})
		r := newReader(t, l)
		userrules.FailToRead(r, "inet filter", true)
		rs, err := r.Read()
		check(t, err)
		if !rs.GivesHelpers() {
			t.Error("it counts as rules without a helper")
		}
	})
}
