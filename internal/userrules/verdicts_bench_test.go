package userrules_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// BenchmarkChildren measures a forward chain of 10,000 rules, for one subnet.
func BenchmarkChildren(b *testing.B) {
	var r strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&r, "iifname \"lan0\" ip daddr 172.16.%d.%d tcp dport 443 counter accept\n", i/250, i%250)
	}
	l, err := lab.New(lab.Options{Rules: lab.NoRules})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	if err := l.NFT("table inet filter { chain forward { type filter hook forward priority filter; policy drop\n" + r.String() + "}; }"); err != nil {
		b.Fatal(err)
	}
	reader := newReader(b, l)
	for b.Loop() {
		rs, err := reader.Read()
		if err != nil {
			b.Fatal(err)
		}
		if _, err := rs.Children([]userrules.Link{{Index: 2, Name: "wan0"}}, nil, []netip.Prefix{lab.InsideNet}); err != nil {
			b.Fatal(err)
		}
	}
}
