package userrules

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// translate makes some rules of a table end with a translation. Chains jump only to later
// ones, because the kernel has no loops.
func translate(t *table, r *rand.Rand) {
	for at, name := range madeChains {
		later := func(v *expr.Verdict) {
			if v.Chain != "" && slices.Index(madeChains, v.Chain) <= at {
				*v = expr.Verdict{Kind: expr.VerdictReturn}
			}
		}
		c := t.chains[name]
		if c == nil {
			continue
		}
		for i := range c.rules {
			for _, s := range c.rules[i].statements {
				switch e := s.expr.(type) {
				case *expr.Verdict:
					later(e)
				case *expr.Lookup:
					for i := range t.sets[e.SetName].elements {
						later(&t.sets[e.SetName].elements[i].verdict)
					}
				}
			}
			if r.IntN(3) == 0 {
				c.rules[i].statements = append(c.rules[i].statements, destinationNAT)
			}
		}
	}
	t.bases = []base{{name: "base", kind: natKind, hook: unix.NF_INET_PRE_ROUTING}}
}

func FuzzForwards(f *testing.F) {
	for i := range uint64(8) {
		f.Add(i, madeBytes(i))
	}
	f.Fuzz(func(t *testing.T, seed uint64, b []byte) { saysNoLess(t, seed, b) })
}

// Fails when a set, a range or a jump makes a forward narrower than its rule.
func TestForwardsNeverSayLessThanTheRules(t *testing.T) {
	translated := 0
	for i := range uint64(3000) {
		translated += saysNoLess(t, i, madeBytes(i))
	}
	if translated < 1000 {
		t.Errorf("only %d packets were translated", translated)
	}
}

// saysNoLess checks that the forwards of the table cover all packets that it translates. It
// returns how many packets were translated.
func saysNoLess(t *testing.T, seed uint64, b []byte) (translated int) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 3))
	table := makeTable(b)
	translate(table, r)
	for range 8 {
		packet, outside := fromOutside(r)
		if last := len(outside) - 1; r.IntN(3) == 0 { // the packet comes by another link than its kind
			outside[0].Addrs, outside[last].Addrs = outside[last].Addrs, outside[0].Addrs
		}
		all := table.forwards(outside)
		w := hookWalk{table: table, child: packet, known: map[string]fates{}}
		fate, err := w.chain("base")
		if err != nil {
			t.Fatal(err)
		}
		if fate != translates {
			continue
		}
		translated++
		if !slices.ContainsFunc(all, func(f Forward) bool { return takes(f, packet) }) {
			t.Fatalf("seed %d: nothing forwards %v, only %+v", seed, packet, all)
		}
	}
	return translated
}

// fromOutside returns a packet that comes by one of one or two outside links. Packets for its
// destination may come by that link alone.
func fromOutside(r *rand.Rand) (packet *child, outside []Link) {
	outside = slices.Clone(madeOutside[:1+r.IntN(2)])
	in := r.IntN(len(outside))
	packet = newChild(false, &outside[in], nil, outside, madeSubnet, []netip.Prefix{madeSubnet}).one(r)
	if r.IntN(2) == 0 {
		outside[in].Addrs = []netip.Addr{destination(packet)}
	}
	return packet, outside
}

// destination returns the address of a packet of which everything is known.
func destination(packet *child) netip.Addr {
	a, _ := netip.AddrFromSlice(values(packet.network[16:20]))
	return a
}

func values(cells []cell) (b []byte) {
	for _, c := range cells {
		b = append(b, c.val)
	}
	return b
}

// The event filter leaves out the ends of the flows that such a forward takes.
//
// Fails when a set, a range, a mask, or an earlier rule makes a forward wider than its rule without
// a sign.
func TestForwardsThatAreNotPartialTakeAll(t *testing.T) {
	certain, ofSome := 0, 0
	for i := range uint64(20000) {
		r := rand.New(rand.NewPCG(i, 5))
		table := makeTable(madeBytes(i))
		translate(table, r)
		usualMaps(table)
		table.family = unix.NFPROTO_IPV4 // nft tests the family in others before it loads addresses
		for range 8 {
			packet, outside := fromOutside(r)
			all := slices.DeleteFunc(table.forwards(outside), func(f Forward) bool { return f.Partial || f.Unknown })
			taker := slices.IndexFunc(all, func(f Forward) bool { return takes(f, packet) })
			if taker < 0 {
				continue
			}
			w := hookWalk{table: table, child: packet, known: map[string]fates{}}
			fate, err := w.chain("base")
			if err != nil {
				t.Fatal(err)
			}
			if fate&(translates|drops) == 0 {
				t.Fatalf("seed %d: %+v takes %v, whose fate is %b", i, all[taker], packet, fate)
			}
			if certain++; all[taker].Sources != nil {
				ofSome++
			}
		}
	}
	if certain < 1000 || ofSome < 100 {
		t.Errorf("only %d packets were taken for certain, %d by forwards for some sources", certain, ofSome)
	}
}

// Conditions for diversions have all packets of hosts to peers that a table translates. Those that
// are not wide have no others, except for packets that an earlier rule drops.
//
// Fails when a set, a range, a jump, or an earlier rule makes a condition narrower than the rule,
// or wider without a sign.
func TestConditionsOfDiversionsAreRight(t *testing.T) {
	translated, exact := 0, 0
	for i := range uint64(10000) {
		x, y := conditionsAreRight(t, i, madeBytes(i))
		translated, exact = translated+x, exact+y
	}
	if translated < 1000 || exact < 100 {
		t.Errorf("only %d packets were translated, and %d for sure", translated, exact)
	}
}

// conditionsAreRight returns how many packets were translated, and for how many that is sure.
func conditionsAreRight(t *testing.T, seed uint64, b []byte) (translated, exact int) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 4))
	table := makeTable(b)
	translate(table, r)
	usualMaps(table)
	table.family = unix.NFPROTO_IPV4 // nft tests the family in others before it loads addresses
	lan, wan := Link{Index: 7, Name: "lan0"}, madeOutside[0]
	var conds []condition
	w := &walker{table: table, outside: []Link{lan}, seen: map[string]bool{}, first: &firstPacket{dest: unix.RTN_UNICAST, out: []Link{wan}}}
	w.translates = func(_ *rule, more []condition) { conds = append(conds, more...) }
	w.chain("base", condition{family: table.family}, 0)
	for range 8 {
		packet := newChild(false, &lan, nil, nil, netip.MustParsePrefix("203.0.113.0/24"), nil)
		packet = packet.one(r)
		packet.status, packet.labelled, packet.out = 0, false, oneLink(&wan, nil)
		host := []byte{10, 47, 11, byte(r.Uint32())}
		if r.IntN(2) == 0 {
			host[3] = 109
		}
		copy(packet.network[12:], knownBytes(host))
		h := hookWalk{table: table, child: packet, known: map[string]fates{}}
		fate, err := h.chain("base")
		if err != nil {
			t.Fatal(err)
		}
		has := func(c condition) bool { return takes(c.forward(""), packet) }
		if fate == translates && !slices.ContainsFunc(conds, has) {
			t.Fatalf("seed %d: no condition has %v, only %+v", seed, packet, conds)
		}
		sure := slices.ContainsFunc(conds, func(c condition) bool { return !c.wide && !c.unknown && has(c) })
		if sure && fate&(translates|drops) == 0 {
			t.Fatalf("seed %d: %+v has %v, whose fate is %b", seed, conds, packet, fate)
		}
		if fate == translates {
			translated++
		}
		if sure {
			exact++
		}
	}
	return translated, exact
}

// usualMaps makes verdict maps such as nft does: they end rules, have no verdict to continue, and
// cannot come to have any other verdicts.
func usualMaps(t *table) {
	for _, s := range t.sets {
		s.changing = s.changing && !s.verdicts
		for i := range s.elements {
			if v := &s.elements[i].verdict; v.Kind == expr.VerdictContinue {
				v.Kind = expr.VerdictReturn
			}
		}
	}
	for _, c := range t.chains {
		for i, r := range c.rules {
			end := slices.IndexFunc(r.statements, func(s statement) bool { e, is := s.expr.(*expr.Lookup); return is && t.sets[e.SetName].verdicts })
			if end >= 0 {
				c.rules[i].statements = r.statements[:end+1]
			}
		}
	}
}

// takes reports whether a forward may take a packet of which everything is known.
func takes(f Forward, packet *child) bool {
	from, _ := netip.AddrFromSlice(values(packet.network[12:16]))
	to := destination(packet)
	port := uint16(packet.transport[2].val)<<8 | uint16(packet.transport[3].val)
	return (f.Unknown || f.All || f.Ports.Has(port)) &&
		(f.Addrs == nil || f.Addrs.Has(to)) && (f.Sources == nil || f.Sources.Has(from))
}
