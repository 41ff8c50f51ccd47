package userrules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// newTable returns a table that was not read from the kernel.
func newTable() *table {
	return &table{title: "inet filter", family: unix.NFPROTO_INET, chains: map[string]*chain{}, sets: map[string]*set{}}
}

// add adds a rule to a chain.
func (t *table) add(name string, statements ...statement) {
	if t.chains[name] == nil {
		t.chains[name] = &chain{}
	}
	c := t.chains[name]
	c.rules = append(c.rules, rule{chain: name, statements: statements})
}

var (
	madeSubnet  = netip.MustParsePrefix("10.47.11.0/24")
	madeOutside = []Link{{Index: 2, Name: "wan0"}, {Index: 5, Name: "ppp0"}}
)

// A maker makes rules from bytes.
type maker struct{ b []byte }

func (m *maker) next() byte {
	if len(m.b) == 0 {
		return 0
	}
	x := m.b[0]
	m.b = m.b[1:]
	return x
}

func (m *maker) among(n int) int { return int(m.next()) % n }

func pick[T any](m *maker, all ...T) T { return all[m.among(len(all))] }

// value returns n bytes, often values that packets have.
func (m *maker) value(n int) []byte {
	known := pick(m,
		[]byte{10, 47, 11, 109}, []byte{10, 47, 11, 0}, []byte{10, 47, 0, 0}, []byte{203, 0, 113, 5}, []byte{0, 0, 0, 0},
		[]byte{0x13, 0xc4, 0, 0}, []byte{17, 0, 0, 0}, []byte{2, 0, 0, 0}, []byte{8, 0, 0, 0}, []byte{4, 0, 0, 0}, []byte{0x21, 0, 0, 0},
		nfnl.LinkKey("wan0"), nfnl.LinkKey("lan0"), nfnl.LinkKey("ppp0"), []byte("wan"), nil)
	if known == nil {
		known = []byte{m.next(), m.next(), m.next(), m.next()}
	}
	return filled(known, n, 0)[:n]
}

var (
	madeChains  = []string{"base", "a", "b", "c"}
	madeSizes   = []int{1, 2, 3, 4, 4, 4, 8, 16}
	madeMetas   = []expr.MetaKey{expr.MetaKeyL4PROTO, expr.MetaKeyNFPROTO, expr.MetaKeyPROTOCOL, expr.MetaKeyIIFNAME, expr.MetaKeyIIF, expr.MetaKeyOIFNAME, expr.MetaKeyOIF, expr.MetaKeyMARK, expr.MetaKeyPKTTYPE}
	madeCts     = []expr.CtKey{expr.CtKeySTATE, expr.CtKeySTATUS, expr.CtKeyDIRECTION, expr.CtKeyPROTOCOL, expr.CtKeyMARK}
	madeOffsets = []uint32{0, 2, 6, 9, 12, 14, 16, 17}
)

func (m *maker) verdict() expr.Verdict {
	kind := pick(m, expr.VerdictAccept, expr.VerdictDrop, expr.VerdictReturn, expr.VerdictJump, expr.VerdictGoto, expr.VerdictContinue)
	v := expr.Verdict{Kind: kind}
	if kind == expr.VerdictJump || kind == expr.VerdictGoto {
		v.Chain = pick(m, madeChains...)
	}
	return v
}

func (m *maker) statement(t *table) statement {
	reg := pick[uint32](m, 1, 1, 1, 2, 9)
	n := pick(m, madeSizes...)
	s := func(e expr.Any) statement { return statement{expr: e} }
	switch m.among(13) {
	case 0, 1:
		v := m.verdict()
		return s(&v)
	case 2, 3:
		op := pick(m, expr.CmpOpEq, expr.CmpOpEq, expr.CmpOpNeq, expr.CmpOpLt, expr.CmpOpLte, expr.CmpOpGt, expr.CmpOpGte)
		return s(&expr.Cmp{Op: op, Register: reg, Data: m.value(n)})
	case 4:
		return s(&expr.Range{Op: pick(m, expr.CmpOpEq, expr.CmpOpNeq), Register: reg, FromData: m.value(n), ToData: m.value(n)})
	case 5:
		mask := pick(m, m.value(n), bytes.Repeat([]byte{0xff}, n), filled([]byte{0xff, 0xff}, n, 0)[:n])
		return s(&expr.Bitwise{SourceRegister: reg, DestRegister: pick[uint32](m, 1, 2), Len: uint32(n), Mask: mask, Xor: pick(m, make([]byte, n), m.value(n))})
	case 6:
		return s(&expr.Meta{Key: pick(m, madeMetas...), Register: reg})
	case 7:
		return s(&expr.Ct{Key: pick(m, madeCts...), Register: reg})
	case 8, 9:
		return s(&expr.Payload{
			OperationType: expr.PayloadLoad, DestRegister: reg, Offset: pick(m, madeOffsets...), Len: uint32(n),
			Base: pick(m, expr.PayloadBaseNetworkHeader, expr.PayloadBaseNetworkHeader, expr.PayloadBaseTransportHeader),
		})
	case 10:
		name := string(rune('A' + len(t.sets)))
		set := &set{size: n, loaded: true, verdicts: m.among(2) == 1, changing: m.among(8) == 1}
		if n == 8 {
			set.fields = []int{4, 4}
		}
		for range m.among(5) {
			low := m.value(n)
			el := element{span: span{low, pick(m, low, m.value(n))}}
			if set.verdicts {
				el.verdict = m.verdict()
			}
			set.elements = append(set.elements, el)
		}
		if m.among(3) == 1 {
			set.elements = append(set.elements, element{others: true, verdict: m.verdict()})
		}
		t.sets[name] = set
		e := &expr.Lookup{SourceRegister: reg, SetName: name}
		if e.IsDestRegSet = set.verdicts; !set.verdicts {
			e.Invert = m.among(2) == 1
		}
		return s(e)
	case 11:
		states := xt.ConntrackMtinfo3{}
		states.MatchFlags = pick(m, uint16(xt.ConntrackState), uint16(xt.ConntrackStatus), uint16(xt.ConntrackState|xt.ConntrackStatus))
		states.InvertFlags = pick(m, 0, uint16(xt.ConntrackState), uint16(xt.ConntrackStatus))
		states.StateMask, states.StatusMask = uint16(m.next()), uint16(m.next())
		return s(&expr.Match{Name: "conntrack", Info: &states})
	}
	return statement{name: pick(m, "counter", "limit", "socket", "byteorder")}
}

// usual returns a condition that is common in rules.
func (m *maker) usual() []statement {
	load, key := expr.Any(&expr.Payload{OperationType: expr.PayloadLoad, DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}), []byte{203, 0, 113, 5}
	switch m.among(5) {
	case 4:
		load = &expr.Payload{OperationType: expr.PayloadLoad, DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
		key = []byte{0x13, 0xc4}
	case 0:
		load, key = &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, nfnl.LinkKey(pick(m, "lan0", "wan0", "ppp0"))
	case 1:
		key = pick(m, key[:3], []byte{10, 47, 11, 9}, []byte{10, 47, 11})
	case 2:
		return nil
	}
	op := pick(m, expr.CmpOpEq, expr.CmpOpNeq, expr.CmpOpLte, expr.CmpOpGt)
	return []statement{{expr: load}, {expr: &expr.Cmp{Op: op, Register: 1, Data: key}}}
}

func makeTable(b []byte) *table {
	m := &maker{b}
	t := newTable()
	for _, name := range madeChains {
		for range m.among(5) {
			rule := m.usual()
			for range 1 + m.among(6) {
				rule = append(rule, m.statement(t))
			}
			t.add(name, rule...)
		}
	}
	return t
}

// one returns one of the packets that c stands for.
func (c child) one(r *rand.Rand) *child {
	random := func(cells []cell) []cell {
		b := make([]byte, len(cells))
		for i := range b {
			b[i] = cells[i].val&cells[i].known | byte(r.Uint32())&^cells[i].known
		}
		return knownBytes(b)
	}
	for {
		network := random(c.network)
		source := make([]byte, 4)
		for i := range source {
			source[i] = network[12+i].val
		}
		if r.IntN(2) == 0 {
			source = []byte{203, 0, 113, 5}
			copy(network[12:], knownBytes(source))
		}
		if a, _ := netip.AddrFromSlice(source); !madeSubnet.Contains(a) {
			c.network = network
			break
		}
	}
	c.transport = random(c.transport)
	if c.replies != nil {
		c.replies = random(c.replies)
	}
	c.status |= r.Uint32() &^ c.knownStatus
	c.knownStatus = 0xffffffff
	c.out = oneLink(&Link{Index: 3, Name: "lan0"}, nil)
	return &c
}

func FuzzHookWalk(f *testing.F) {
	for i := range uint64(8) {
		f.Add(i, madeBytes(i))
	}
	f.Fuzz(holds)
}

func TestWhatIsSaidOfAllPacketsHoldsForEach(t *testing.T) {
	for i := range uint64(3000) {
		holds(t, i, madeBytes(i))
	}
}

func madeBytes(seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 60+r.IntN(300))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// holds checks that the answers for a class of packets are true of some packets of the
// class.
func holds(t *testing.T, seed uint64, b []byte) {
	table := makeTable(b)
	r := rand.New(rand.NewPCG(seed, 2))
	for _, related := range []bool{false, true} {
		forwarded := newChild(related, &madeOutside[0], nil, madeOutside, madeSubnet, []netip.Prefix{madeSubnet})
		s := stagesOf(forwarded, netip.Addr{}, false)
		for i, all := range []*child{s.untracked, s.arrived, s.routing, s.forwarded} {
			said := fate(t, table, all, false)
			for range 8 {
				one := all.one(r)
				if got := fate(t, table, one, false); got&^said != 0 {
					t.Fatalf("seed %d, related %v, stage %d: %b of all, but %b of one", seed, related, i, said, got)
				}
			}
			fate(t, table, all, true)
		}
	}
	shutHolds(t, r, table)
}

// shutHolds checks that what is said to be shut is dropped, flow by flow.
func shutHolds(t *testing.T, r *rand.Rand, table *table) {
	q := childQuery{
		chains: []baseChain{{table, base{name: "base", hook: unix.NF_INET_FORWARD, drops: true}}}, inside: []*Link{nil},
		outside: madeOutside[:1], subnets: []netip.Prefix{madeSubnet},
	}
	all, err := q.shut()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		c := newChild(false, &madeOutside[0], nil, madeOutside, s.Hosts, q.subnets)
		c.labelled = false
		if s.Peers.Bits() > 0 {
			copy(c.source(), inPrefix(s.Peers))
		}
		for range 8 {
			one := c.one(r)
			copy(one.transport[2:], knownBytes(binary.BigEndian.AppendUint16(nil, s.Ports.First+uint16(r.UintN(1+uint(s.Ports.Last-s.Ports.First))))))
			if s.Peers.Bits() > 0 && !s.Peers.Contains(netip.AddrFrom4([4]byte(bytesOf(one.source())))) {
				continue // one chose another peer
			}
			if got := fate(t, table, one, false); got&^(drops|returns) != 0 {
				t.Fatalf("%+v is not shut to %v: %b", s, bytesOf(one.transport), got)
			}
		}
	}
}

func bytesOf(cells []cell) (b []byte) {
	for _, c := range cells {
		b = append(b, c.val)
	}
	return b
}

func fate(t *testing.T, table *table, c *child, most bool) fates {
	t.Helper()
	w := hookWalk{table: table, child: c, most: most, known: map[string]fates{}}
	got, err := w.chain("base")
	if err != nil {
		t.Fatal(err)
	}
	if got == 0 || got&proceeds != 0 {
		t.Fatalf("fates %b", got)
	}
	return got
}

func FuzzStatements(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("\x24\x00\x01\x80\x08\x00\x01\x00cmp\x00\x18\x00\x02\x80\x08\x00\x01\x00\x00\x00\x00\x01\x0c\x00\x03\x80\x05\x00\x01\x00\x11\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		table := newTable()
		all, _ := statements(unix.NFPROTO_IPV4, b)
		table.add("base", all...)
		c := newChild(true, nil, nil, madeOutside, madeSubnet, nil)
		w := hookWalk{table: table, child: c, known: map[string]fates{}}
		if got, err := w.chain("base"); err == nil && got == 0 {
			t.Error("no fate")
		}
		keyFields(b)
		elementOf(b)
		binary.BigEndian.AppendUint32(nil, number32(b))
	})
}

// The kernel does not offload a flow while its first packet is under way, and continues
// with the next rule (nft_flow_offload_eval).
func TestFirstPacketIsNotOffloaded(t *testing.T) {
	table := newTable()
	table.add("base", statement{expr: &expr.FlowOffload{}}, statement{expr: &expr.Verdict{Kind: expr.VerdictAccept}})
	if got := fate(t, table, newChild(false, nil, nil, nil, madeSubnet, nil), false); got != returns {
		t.Errorf("fates %b", got)
	}
}

func TestErrorsNameTableAndChain(t *testing.T) {
	table := newTable()
	table.add("forward", statement{expr: &expr.Verdict{Kind: expr.VerdictJump, Chain: "bad"}})
	table.add("sets", statement{expr: &expr.Lookup{SetName: "x"}})
	table.chains["bad"] = &chain{failed: nfnl.ErrInterrupted}
	table.sets["x"] = &set{failed: errors.New("no such set")}
	for name, want := range map[string]string{"forward": "table inet filter: chain bad: ", "sets": "table inet filter: chain sets: no such set"} {
		q := childQuery{chains: []baseChain{{table, base{name: name, hook: unix.NF_INET_FORWARD}}}, inside: []*Link{nil}, subnets: []netip.Prefix{madeSubnet}}
		got, err := q.answer(0)
		if err == nil || !strings.Contains(err.Error(), want) || got != (ChildVerdicts{}) {
			t.Errorf("%v, %v", got, err)
		}
	}
}

func TestLegacyModules(t *testing.T) {
	for modules, want := range map[string]bool{
		"":                               true, // all of it may be a part of the kernel
		"ip_tables 32768 0 - Live 0x0\n": false,
		"iptable_filter 16384 1 - Live 0x0\nip_tables 32768 1 iptable_filter, Live 0x0\n": true,
		"iptable_filter2 1 0 - Live\nip_tables 32768 1 iptable_nat, Live 0x0\n":           false,
	} {
		if got := mayBeLoaded([]byte(modules), legacy4.core, legacy4.module+filterTable); got != want {
			t.Errorf("%q: %v", modules, got)
		}
	}
}
