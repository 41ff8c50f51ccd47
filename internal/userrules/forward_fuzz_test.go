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
	all := table.forwards(madeOutside[:1])
	for range 8 {
		packet := newChild(false, &madeOutside[0], nil, madeOutside, madeSubnet, []netip.Prefix{madeSubnet}).one(r)
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

// takes reports whether a forward may take a packet of which everything is known.
func takes(f Forward, packet *child) bool {
	number := func(cells []cell) (b []byte) {
		for _, c := range cells {
			b = append(b, c.val)
		}
		return b
	}
	from, _ := netip.AddrFromSlice(number(packet.network[12:16]))
	to, _ := netip.AddrFromSlice(number(packet.network[16:20]))
	port := uint16(packet.transport[2].val)<<8 | uint16(packet.transport[3].val)
	return (f.Unknown || f.All || covers(f.Ports, port)) &&
		(f.Addrs == nil || coversAddr(f.Addrs, to)) && (f.Sources == nil || coversAddr(f.Sources, from))
}
