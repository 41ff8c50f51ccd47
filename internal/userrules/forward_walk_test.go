package userrules

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// newNAT returns a table whose chain base is a NAT chain of the prerouting hook.
func newNAT() *table {
	t := newTable()
	t.bases = []base{{name: "base", kind: natKind, hook: unix.NF_INET_PRE_ROUTING}}
	return t
}

var (
	destinationNAT = statement{"nat", &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4}}
	toPort         = statement{"payload", &expr.Payload{
		OperationType: expr.PayloadLoad, DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2,
	}}
	fromAndTo = statement{"payload", &expr.Payload{
		OperationType: expr.PayloadLoad, DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 8,
	}}
)

// Packets that a verdict map accepts pass untranslated.
//
// Fails when a rule behind the map is said to forward them.
func TestMapOfVerdictsExemptsWhatItAccepts(t *testing.T) {
	for kind, want := range map[expr.VerdictKind]bool{expr.VerdictAccept: false, expr.VerdictJump: true} {
		table := newNAT()
		v := expr.Verdict{Kind: kind}
		if kind == expr.VerdictJump {
			v.Chain = "nothing"
		}
		table.sets["m"] = &set{size: 2, verdicts: true, loaded: true, elements: []element{{span: only([]byte{0x13, 0xc4}), verdict: v}}}
		table.add("base", toPort, statement{"lookup", &expr.Lookup{SourceRegister: 1, IsDestRegSet: true, SetName: "m"}})
		table.add("base", destinationNAT)
		ext := cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:5060"))
		if all := table.forwards(nil); len(all) != 1 || all[0].Partial || all[0].Covers(ext) != want || all[0].All != want || !all[0].Most {
			t.Errorf("verdict %d: %+v, which should cover the port: %v", kind, all, want)
		}
	}
}

// The kernel lets intervals of concatenated keys overlap; the first element wins.
//
// Fails when what it accepts is said to be forwarded by the second one.
func TestElementsOfOneMapMayOverlap(t *testing.T) {
	to := func(first, last byte) span {
		return span{[]byte{0, 0, 0, 0, 198, 51, 100, first}, []byte{255, 255, 255, 255, 198, 51, 100, last}}
	}
	table := newNAT()
	table.sets["m"] = &set{size: 8, fields: []int{4, 4}, interval: true, verdicts: true, loaded: true, elements: []element{
		{span: to(5, 6), verdict: expr.Verdict{Kind: expr.VerdictAccept}},
		{span: to(0, 10), verdict: expr.Verdict{Kind: expr.VerdictGoto, Chain: "leads"}},
	}}
	table.add("base", fromAndTo, statement{"lookup", &expr.Lookup{SourceRegister: 1, IsDestRegSet: true, SetName: "m"}})
	table.add("leads", destinationNAT)
	all := table.forwards(nil)
	for host, want := range map[byte]bool{4: true, 5: false, 6: false, 7: true, 11: false} {
		addr := netip.AddrFrom4([4]byte{198, 51, 100, host})
		got := slices.ContainsFunc(all, func(f Forward) bool { return f.Addrs.Has(addr) })
		if got != want || len(all) != 1 || all[0].Partial {
			t.Errorf("%v is forwarded: %v, want %v: %+v", addr, got, want, all)
		}
	}
}

// A packet whose key is in no element of a verdict map goes on to the next rule, not to the rest of the
// rule. nft makes no such rule.
//
// Fails when the rest of the rule lets such packets pass.
func TestRestOfARuleBehindAMapOfVerdicts(t *testing.T) {
	table := newNAT()
	table.sets["m"] = &set{size: 2, verdicts: true, loaded: true}
	table.add("base", toPort, statement{"lookup", &expr.Lookup{SourceRegister: 1, IsDestRegSet: true, SetName: "m"}},
		statement{"", &expr.Verdict{Kind: expr.VerdictReturn}})
	table.add("base", destinationNAT)
	if all := table.forwards(nil); len(all) != 1 || !all[0].All {
		t.Errorf("%+v", all)
	}
}

// The kernel compares a key of several fields with the ends of an interval as one number,
// unless the set has the lengths of the fields.
//
// Fails when each field is taken to lie between its own ends.
func TestIntervalOfKeysOfSeveralFields(t *testing.T) {
	span := span{[]byte{203, 0, 113, 5, 10, 47, 11, 1}, []byte{203, 0, 113, 9, 10, 47, 11, 2}}
	inside, _ := netip.ParseAddr("10.47.11.99")
	lookup := &expr.Lookup{SourceRegister: 1, SetName: "s"}
	verdicts := &expr.Lookup{SourceRegister: 1, SetName: "s", IsDestRegSet: true}
	for _, tt := range []struct {
		name   string
		fields []int
		test   expr.Any
		covers bool // 10.47.11.99
	}{
		{"set", nil, lookup, true},
		{"set of fields", []int{4, 4}, lookup, false},
		{"map of verdicts", nil, verdicts, true},
		{"map of verdicts of fields", []int{4, 4}, verdicts, false},
		{"range", nil, &expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: span.low, ToData: span.high}, true},
		{"at most", nil, &expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: span.high}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := newNAT()
			table.sets["s"] = &set{size: 8, fields: tt.fields, loaded: true, verdicts: tt.test == verdicts, elements: []element{
				{span: span, verdict: expr.Verdict{Kind: expr.VerdictJump, Chain: "c"}},
			}}
			table.add("base", fromAndTo, statement{"", tt.test}, destinationNAT)
			if tt.test == verdicts {
				table.chains["base"].rules[0].statements = table.chains["base"].rules[0].statements[:2]
				table.add("c", destinationNAT)
			}
			all := table.forwards(nil)
			got := slices.ContainsFunc(all, func(f Forward) bool { return f.Addrs == nil || f.Addrs.Has(inside) })
			if got != tt.covers {
				t.Errorf("%v is covered: %v, by %+v", inside, got, all)
			}
		})
	}
}

// Rules that were not visited may forward any packet of the table, not only packets that
// reach the place where the walk stopped.
//
// Fails when only the latter are reported as possibly forwarded.
func TestTooManyJumpsMayForwardAnything(t *testing.T) {
	jump := func(to string) statement {
		return statement{"immediate", &expr.Verdict{Kind: expr.VerdictJump, Chain: to}}
	}
	port := func(n uint16) statement {
		return statement{"cmp", &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, n)}}
	}
	table := newNAT()
	table.add("base", toPort, port(9), jump("c0"))
	table.add("base", toPort, port(5060), destinationNAT)
	for i := range 9 {
		for range 8 {
			table.add(fmt.Sprint("c", i), jump(fmt.Sprint("c", i+1)))
		}
	}
	e := cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:5060"))
	all := table.forwards(nil)
	if !slices.ContainsFunc(all, func(f Forward) bool { return f.Unknown && f.Covers(e) }) {
		t.Errorf("%v is not covered by %+v", e, all)
	}
}
