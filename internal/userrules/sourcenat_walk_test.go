package userrules

import (
	"fmt"
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Fails when conditions of earlier jumps do not count for a rule, or when an address from a
// map is taken for known.
func TestSourceNATByLinks(t *testing.T) {
	by := func(op expr.CmpOp, name []byte) []statement {
		return []statement{{"meta", &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}}, {"cmp", &expr.Cmp{Op: op, Register: 1, Data: name}}}
	}
	wan, lan, pattern := nfnl.LinkKey("wan0"), nfnl.LinkKey("lan0"), []byte("wan")
	const eq, not = expr.CmpOpEq, expr.CmpOpNeq
	masquerade := []statement{{"masq", &expr.Masq{}}}
	fixed := []statement{
		{"immediate", &expr.Immediate{Register: 1, Data: []byte{198, 51, 100, 1}}},
		{"nat", &expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, Random: true}},
	}
	mapped := []statement{
		{"immediate", &expr.Immediate{Register: 1, Data: []byte{198, 51, 100, 1}}},
		{"lookup", &expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: "m"}},
		{"nat", &expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2}},
	}
	for _, tt := range []struct {
		name          string
		before, after []statement
		does          []statement
		want          string
	}{
		{"any", nil, nil, masquerade, "[[] [] masquerade=true ports=false random=false partial=false unknown=false]"},
		{"one", by(eq, wan), nil, fixed, "[[wan0] [{198.51.100.1 198.51.100.1}] masquerade=false ports=false random=true partial=false unknown=false]"},
		{"a pattern", by(eq, pattern), nil, masquerade, "[[wan*] [] masquerade=true ports=false random=false partial=false unknown=false]"},
		{"one of a pattern", by(eq, pattern), by(eq, wan), masquerade, "[[wan0] [] masquerade=true ports=false random=false partial=false unknown=false]"},
		{"a pattern of one", by(eq, wan), by(eq, pattern), masquerade, "[[wan0] [] masquerade=true ports=false random=false partial=false unknown=false]"},
		{"none", by(eq, wan), by(eq, lan), masquerade, "[]"},
		{"not one", by(not, lan), nil, masquerade, "[[] [] masquerade=true ports=false random=false partial=true unknown=false]"},
		{"by a map", by(eq, wan), nil, mapped, "[[wan0] [] masquerade=false ports=true random=false partial=true unknown=true]"},
		{"to a port", []statement{toPort, {"cmp", &expr.Cmp{Op: eq, Register: 1, Data: []byte{0x13, 0xc4}}}}, nil, masquerade, "[[] [] masquerade=true ports=false random=false partial=true unknown=false]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nat := newTable()
			nat.family = unix.NFPROTO_IPV4
			nat.bases = []base{{name: "post", kind: natKind, hook: unix.NF_INET_POST_ROUTING}}
			nat.sets["m"] = &set{size: 4, named: true}
			nat.add("post", append(tt.before, statement{"immediate", &expr.Verdict{Kind: expr.VerdictJump, Chain: "c"}})...)
			nat.add("c", append(tt.after, tt.does...)...)
			rs := &Ruleset{tables: []*table{nat}}
			got := []string{}
			for _, n := range rs.SourceNAT() {
				got = append(got, fmt.Sprintf("%v %v masquerade=%v ports=%v random=%v partial=%v unknown=%v",
					n.Links, n.Addrs, n.Masquerade, n.ChoosesPort, n.Random, n.Partial, n.Unknown))
			}
			if fmt.Sprint(got) != tt.want {
				t.Errorf("got %v, want %s", got, tt.want)
			}
		})
	}
}

// Fails when a chain that could not be read is taken for one without rules.
func TestSourceNATThatCannotBeReadIsUnknown(t *testing.T) {
	nat := newTable()
	nat.bases = []base{{name: "post", kind: natKind, hook: unix.NF_INET_POST_ROUTING}}
	for name, c := range map[string]*chain{"unread": {failed: unix.EPERM}, "not understood": {odd: "a rule has x"}} {
		nat.chains["post"] = c
		rs := &Ruleset{tables: []*table{nat}}
		if all := rs.SourceNAT(); len(all) != 1 || !all[0].Unknown {
			t.Errorf("%s: %+v", name, all)
		}
		if _, unknown := rs.FixedSources(); !unknown {
			t.Errorf("%s: all fixed sources are known", name)
		}
		if rules, err := rs.PortChoosers(); len(rules) == 0 && err == nil {
			t.Errorf("%s: no rule chooses ports", name)
		}
	}
}
