package userrules_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// BenchmarkMarks measures one packet at 2,000 rules that mark packets, by nftables and by
// iptables-legacy.
func BenchmarkMarks(b *testing.B) {
	var nft, legacy strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&nft, "iifname \"lan0\" ip daddr 172.16.%d.%d udp dport %d meta mark set %d\n", i/250, i%250, 5060+i, i)
		fmt.Fprintf(&legacy, "-A PREROUTING -i lan0 -d 172.16.%d.%d -p udp --dport %d -j MARK --set-mark %d\n", i/250, i%250, 5060+i, i)
	}
	for name, load := range map[string]func(l *lab.Lab) error{
		"nft": func(l *lab.Lab) error {
			return l.NFT("table inet m { chain c { type filter hook prerouting priority mangle\n" + nft.String() + "}; }")
		},
		lab.IPTablesLegacy: func(l *lab.Lab) error { return l.IPTables(lab.IPTablesLegacy, "*mangle\n"+legacy.String()+"COMMIT\n") },
	} {
		b.Run(name, func(b *testing.B) {
			l, err := lab.New(lab.Options{Rules: lab.NoRules})
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			if err := load(l); err != nil {
				b.Fatal(err)
			}
			rs, err := newReader(b, l).Read()
			if err != nil {
				b.Fatal(err)
			}
			b.Run("first packet", func(b *testing.B) {
				for b.Loop() {
					rs.Marker().Marks(sentFlow(true), userrules.Link{Index: 7, Name: "lan0"}, []uint32{0, 9}, nil)
				}
			})
			m := rs.Marker()
			b.Run("packet", func(b *testing.B) {
				for b.Loop() {
					m.Marks(sentFlow(true), userrules.Link{Index: 7, Name: "lan0"}, []uint32{0, 9}, nil)
				}
			})
		})
	}
}
