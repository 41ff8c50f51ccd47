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

// sentByHost is a flow that a host opened, and its packets that come in by lan0.
func sentByHost() (*cone.Flow, Link) {
	at := func(s string) cone.Endpoint { return cone.EndpointFrom(netip.MustParseAddrPort(s)) }
	host, peer := at("10.47.11.109:5060"), at("203.0.113.5:5060")
	return &cone.Flow{Mark: 3, Status: cone.StatusSeenReply, Src: host, Dst: peer, ReplySrc: peer}, Link{Index: 3, Name: "lan0"}
}

// Rules that a guard lets no packet pass do nothing, and a packet ends as it does where marks are not
// followed.
//
// Fails when a guard tests something else than its rule, and when the walk takes another way than the
// one of all other questions.
func TestMarkWalkGoesTheWayOfTheHookWalk(t *testing.T) {
	f, in := sentByHost()
	skipped, ended := 0, map[fates]int{}
	for i := range uint64(3000) {
		made := makeTable(madeBytes(i))
		raw := rawPacketOf(f, in)
		for name, c := range made.chains {
			for j, g := range (guards{}).of(c) {
				if g.mayPass(raw) {
					continue
				}
				skipped++
				w := hookWalk{table: made, child: sent(f, in), known: map[string]fates{}}
				if fate, err := w.rule(&c.rules[j]); err != nil || fate != proceeds {
					t.Fatalf("table %d, chain %s: rule %d does %b, %v", i, name, j, fate, err)
				}
			}
		}
		h := hookWalk{table: made, child: sent(f, in), known: map[string]fates{}}
		may, err := h.chain("base")
		if err != nil {
			t.Fatal(err)
		}
		w := markWalk{hookWalk: hookWalk{table: made, child: sent(f, in), known: map[string]fates{}}, packet: raw, guards: guards{}, ends: make(map[markChain][]markEnd)}
		w.regs.forget(unix.NFT_REG_1)
		ends, err := w.chain("base", marks{wholeMark(7), wholeMark(3)})
		if err != nil {
			continue // a loop
		}
		for _, e := range ends {
			if ended[e.fate]++; e.fate&may == 0 {
				t.Fatalf("table %d: it ends with %b, but may only with %b", i, e.fate, may)
			}
			if e.marks != (marks{wholeMark(7), wholeMark(3)}) {
				t.Fatalf("table %d: no rule sets marks, but it has %+v", i, e.marks)
			}
		}
	}
	if skipped < 100 || ended[accepts] < 100 || ended[returns] < 100 {
		t.Errorf("%d rules were skipped, and packets ended %v times: that proves little", skipped, ended)
	}
}

// Fails when a mark counts as certain that is not.
func TestMarksAreUnknown(t *testing.T) {
	f, in := sentByHost()
	set := func(mark uint32) []statement {
		return []statement{
			{expr: &expr.Immediate{Register: 1, Data: binary.NativeEndian.AppendUint32(nil, mark)}},
			{expr: &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1}},
		}
	}
	perhaps := func(mark uint32) []statement { return append([]statement{{name: "limit"}}, set(mark)...) }
	chains := func(n int, rule ...statement) *table {
		made := newTable()
		for i := range n {
			name := fmt.Sprint(i)
			made.add(name, rule...)
			made.bases = append(made.bases, base{name: name, kind: "filter", hook: unix.NF_INET_PRE_ROUTING, priority: -150})
		}
		return made
	}
	torn, odd, many := chains(1, set(7)...), chains(1, set(7)...), chains(1)
	torn.torn, odd.chains["0"].odd = true, "a rule has something"
	for i := range uint32(mostMarkEnds + 1) {
		many.add("0", perhaps(100+i)...)
	}
	for name, tt := range map[string]struct {
		rs    *Ruleset
		marks []uint32 // nil for unknown
	}{
		"one chain":                      {&Ruleset{tables: []*table{chains(1, set(7)...)}}, []uint32{7}},
		"two of one priority":            {&Ruleset{tables: []*table{chains(2, set(7)...)}}, []uint32{7}},
		"three of one priority":          {&Ruleset{tables: []*table{chains(3, set(7)...)}}, nil},
		"perhaps":                        {&Ruleset{tables: []*table{chains(1, perhaps(7)...)}}, []uint32{0, 7}},
		"very many":                      {&Ruleset{tables: []*table{many}}, nil},
		"rules that nobody understands":  {&Ruleset{tables: []*table{odd}}, nil},
		"rules that just changed":        {&Ruleset{tables: []*table{torn}}, nil},
		"rules that nobody sees":         {&Ruleset{tables: []*table{chains(1, set(7)...)}, hidden: []hiddenTable{{legacy4, "mangle"}}}, nil},
		"rules of IPv6 that nobody sees": {&Ruleset{tables: []*table{chains(1, set(7)...)}, hidden: []hiddenTable{{legacy6, "mangle"}}}, []uint32{7}},
		"a program":                      {&Ruleset{tables: []*table{chains(1, append(set(7), statement{expr: &expr.Queue{}})...)}}, nil},
		"a program, by a verdict":        {&Ruleset{tables: []*table{chains(1, append(set(7), statement{expr: &expr.Verdict{Kind: expr.VerdictQueue}})...)}}, nil},
		"a mark of iptables' sets":       {&Ruleset{tables: []*table{chains(1, append(set(7), statement{expr: &expr.Target{Name: "SET"}})...)}}, nil},
		"an unknown target":              {&Ruleset{tables: []*table{chains(1, append(set(7), statement{expr: &expr.Target{Name: "OTHER"}})...)}}, nil},
		"a missing set":                  {&Ruleset{tables: []*table{chains(1, append(set(7), statement{expr: &expr.Lookup{SetName: "x", IsDestRegSet: true, SourceRegister: 1}})...)}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, known := tt.rs.Marker().Marks(f, in, []uint32{0}, nil)
			if slices.Sort(got); known != (tt.marks != nil) || !slices.Equal(got, tt.marks) {
				t.Errorf("got %v, known: %v; want %v", got, known, tt.marks)
			}
		})
	}
}
