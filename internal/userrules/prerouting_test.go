package userrules

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Where a hook of the kernel's has the same priority as a chain, the one that was registered
// first runs first: only what holds both ways is certain.
func TestChainsWhereTheKernelsHooksAre(t *testing.T) {
	drop := statement{expr: &expr.Verdict{Kind: expr.VerdictDrop}}
	state := func(bit uint32) []statement {
		return []statement{
			{expr: &expr.Ct{Key: expr.CtKeySTATE, Register: 1}},
			{expr: &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, bit), Xor: make([]byte, 4)}},
			{expr: &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}},
			drop,
		}
	}
	inside := []statement{
		{expr: &expr.Payload{OperationType: expr.PayloadLoad, DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 3}},
		{expr: &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{10, 47, 11}}},
		drop,
	}
	const nat, filter = natKind, "filter"
	for _, tc := range []struct {
		name            string
		kind            string
		priority        int32
		rule            []statement
		dnated, related Answer // of most
	}{
		{"new, before conntrack", filter, -201, state(expr.CtStateBitNEW), Accepted, Accepted},
		{"new, at conntrack", filter, -200, state(expr.CtStateBitNEW), Unknown, Accepted},
		{"new, behind conntrack", filter, -199, state(expr.CtStateBitNEW), Dropped, Accepted},
		{"invalid, before conntrack", filter, -201, state(expr.CtStateBitINVALID), Dropped, Dropped},
		{"invalid, behind conntrack", filter, -199, state(expr.CtStateBitINVALID), Accepted, Accepted},
		{"related", filter, -150, state(expr.CtStateBitRELATED), Accepted, Dropped},
		{"inside, before NAT", filter, -101, inside, Accepted, Accepted},
		{"inside, at NAT", filter, -100, inside, Unknown, Unknown},
		{"inside, behind NAT", filter, -99, inside, Dropped, Dropped},
		{"NAT of a low priority", nat, -300, []statement{drop}, Dropped, Accepted},
		{"NAT of a high priority", nat, 300, []statement{drop}, Dropped, Accepted},
		{"NAT to the inside host", nat, 300, inside, Accepted, Accepted},
	} {
		t.Run(tc.name, func(t *testing.T) {
			made := newTable()
			made.add("c", tc.rule...)
			made.bases = []base{{name: "c", kind: tc.kind, hook: unix.NF_INET_PRE_ROUTING, priority: tc.priority}}
			rs := &Ruleset{tables: []*table{made}}
			got, err := rs.Children(madeOutside[:1], nil, []netip.Prefix{madeSubnet})
			if err != nil {
				t.Fatal(err)
			}
			if got[0].MostDNATed != tc.dnated || got[0].MostRelated != tc.related {
				t.Errorf("%+v", got[0])
			}
		})
	}
}

// An expectation may translate what goes to a public subnet, or not; a NAT chain sees only what
// it did not.
func TestNATChainMaySeeRelatedOfPublicSubnets(t *testing.T) {
	made := newTable()
	made.add("c", statement{expr: &expr.Verdict{Kind: expr.VerdictDrop}})
	made.bases = []base{{name: "c", kind: natKind, hook: unix.NF_INET_PRE_ROUTING}}
	rs := &Ruleset{tables: []*table{made}}
	for subnet, want := range map[string]Answer{"10.47.11.0/24": Accepted, "192.0.2.0/24": Unknown} {
		got, err := rs.Children(madeOutside[:1], nil, []netip.Prefix{netip.MustParsePrefix(subnet)})
		if err != nil {
			t.Fatal(err)
		}
		if got[0].MostRelated != want || got[0].MostDNATed != Dropped {
			t.Errorf("%s: %+v", subnet, got[0])
		}
	}
}

// The chain to change is the one where the children that can be helped are dropped.
func TestDropperToChange(t *testing.T) {
	forward, early := Dropper{"inet f forward", BehindNAT}, Dropper{"inet f early", BeforeNAT}
	for _, tc := range []struct{ dnated, related, want Dropper }{
		{forward, Dropper{}, forward},
		{Dropper{}, forward, forward},
		{early, Dropper{}, early},
		{early, forward, forward},
		{forward, early, forward},
	} {
		if got := (ChildVerdicts{DNATedBy: tc.dnated, RelatedBy: tc.related}).Dropper(); got != tc.want {
			t.Errorf("%v and %v: %v", tc.dnated, tc.related, got)
		}
	}
}
