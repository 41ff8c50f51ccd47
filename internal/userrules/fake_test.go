package userrules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/nfnl/nfnltest"
)

// A fakeKernel answers a Reader with messages that a kernel sent or that a test made.
type fakeKernel struct {
	objects []object
	asked   map[uint16]int // how often it was asked for what
	before  func(typ uint16, table, name string)
	refuse  unix.Errno
}

// An object is a table, a chain, a rule, a set or a part of its elements.
type object struct {
	typ         uint16 // of the message, without the subsystem
	table, name string // name is that of a chain or set, for a rule that of its chain
	body        []byte // behind struct nlmsghdr
}

// newObject returns the object of a message.
func newObject(typ uint16, body []byte) object {
	o := object{typ: typ, body: body}
	o.table, o.name = namesIn(typ, body)
	return o
}

// namesIn returns the table and the chain or set that a message is about. The numbers of
// their attributes are the same in all types of messages, except for the name of a chain.
func namesIn(typ uint16, body []byte) (table, name string) {
	nfnl.Attributes(body[nfnl.FamilyHeaderLen:], func(t uint16, b []byte) {
		switch {
		case t == unix.NFTA_RULE_TABLE:
			table = nfnl.Text(b)
		case t == unix.NFTA_RULE_CHAIN && typ != unix.NFT_MSG_NEWTABLE && typ != unix.NFT_MSG_NEWCHAIN:
			name = nfnl.Text(b)
		case t == unix.NFTA_CHAIN_NAME && typ == unix.NFT_MSG_NEWCHAIN:
			name = nfnl.Text(b)
		}
	})
	return table, name
}

// newFake returns a reader of a fake kernel, without tables of iptables-legacy.
func newFake(t *testing.T, k *fakeKernel) *Reader {
	t.Helper()
	c, nl := nfnltest.New(t)
	k.asked = map[uint16]int{}
	nl.Answer = func(sent []nfnltest.Request) [][]byte { return k.answer(sent[0]) }
	r := NewReader(Config{OwnChain: "ours"})
	r.c = c
	r.legacy.read = func(*legacyFamily) ([]rawLegacy, []string, error) { return nil, nil, nil }
	return r
}

func (k *fakeKernel) answer(q nfnltest.Request) (out [][]byte) {
	answers := map[uint16]uint16{
		unix.NFT_MSG_GETTABLE: unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_GETCHAIN: unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_GETRULE: unix.NFT_MSG_NEWRULE,
		unix.NFT_MSG_GETSET: unix.NFT_MSG_NEWSET, unix.NFT_MSG_GETSETELEM: unix.NFT_MSG_NEWSETELEM,
	}
	typ := answers[q.Type&0xff]
	table, name := namesIn(typ, q.Body)
	k.asked[typ]++
	if k.before != nil {
		k.before(typ, table, name)
	}
	if k.refuse != 0 {
		return [][]byte{nfnltest.Says(q.Seq, k.refuse)}
	}
	var part []byte
	send := func(b []byte) {
		if len(part)+len(b) > 1<<15 {
			out, part = append(out, part), nil
		}
		part = append(part, b...)
	}
	found := false
	for _, o := range k.objects {
		family := q.Body[0] == unix.AF_UNSPEC || q.Body[0] == o.body[0]
		if o.typ != typ || !family || table != "" && table != o.table || name != "" && name != o.name {
			continue
		}
		found = true
		send(padded(nfnltest.Message(unix.NFNL_SUBSYS_NFTABLES<<8|typ, q.Seq, o.body)))
	}
	switch {
	case q.Flags&unix.NLM_F_DUMP == unix.NLM_F_DUMP:
		send(nfnltest.Message(unix.NLMSG_DONE, q.Seq, make([]byte, 4)))
	case found:
		send(nfnltest.Says(q.Seq, 0))
	default:
		send(nfnltest.Says(q.Seq, unix.ENOENT))
	}
	return append(out, part)
}

func padded(b []byte) []byte { return append(b, make([]byte, (4-len(b)%4)%4)...) }

// put adds objects, or replaces those of the same type, table and name.
func (k *fakeKernel) put(objects ...object) {
	for _, o := range objects {
		k.objects = slices.DeleteFunc(k.objects, func(x object) bool { return x.typ == o.typ && x.table == o.table && x.name == o.name })
	}
	k.objects = append(k.objects, objects...)
}

// made makes an object.
func made(typ uint16, encode func(e *nfnl.Encoder)) object {
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, typ, 0, 0, unix.NFPROTO_IPV4)
	encode(&e)
	e.End()
	return newObject(typ, bytes.Clone(e.B[unix.NLMSG_HDRLEN:]))
}

func madeTable(name string) object {
	return made(unix.NFT_MSG_NEWTABLE, func(e *nfnl.Encoder) { e.Str(unix.NFTA_TABLE_NAME, name) })
}

// natChain makes a NAT chain of the prerouting hook.
func natChain(table, name string) object {
	return hooked(table, name, natKind, unix.NF_INET_PRE_ROUTING)
}

// hooked makes a base chain with policy accept.
func hooked(table, name, kind string, number uint32) object {
	return made(unix.NFT_MSG_NEWCHAIN, func(e *nfnl.Encoder) {
		e.Str(unix.NFTA_CHAIN_TABLE, table)
		e.Str(unix.NFTA_CHAIN_NAME, name)
		hook := e.Nest(unix.NFTA_CHAIN_HOOK)
		e.BE32(unix.NFTA_HOOK_HOOKNUM, number)
		e.EndNest(hook)
		e.Str(unix.NFTA_CHAIN_TYPE, kind)
		e.BE32(unix.NFTA_CHAIN_POLICY, 1) // NF_ACCEPT
	})
}

// redirects makes a rule that redirects packets to a port.
func redirects(table, chain string, handle uint64, port uint16) object {
	return made(unix.NFT_MSG_NEWRULE, func(e *nfnl.Encoder) {
		e.Str(unix.NFTA_RULE_TABLE, table)
		e.Str(unix.NFTA_RULE_CHAIN, chain)
		e.BE64(unix.NFTA_RULE_HANDLE, handle)
		all := e.Nest(unix.NFTA_RULE_EXPRESSIONS)
		expression := func(name string, encode func()) {
			one := e.Nest(unix.NFTA_LIST_ELEM)
			e.Str(unix.NFTA_EXPR_NAME, name)
			data := e.Nest(unix.NFTA_EXPR_DATA)
			encode()
			e.EndNest(data)
			e.EndNest(one)
		}
		expression("payload", func() {
			e.BE32(unix.NFTA_PAYLOAD_DREG, unix.NFT_REG_1)
			e.BE32(unix.NFTA_PAYLOAD_BASE, unix.NFT_PAYLOAD_TRANSPORT_HEADER)
			e.BE32(unix.NFTA_PAYLOAD_OFFSET, 2)
			e.BE32(unix.NFTA_PAYLOAD_LEN, 2)
		})
		expression("cmp", func() {
			e.BE32(unix.NFTA_CMP_SREG, unix.NFT_REG_1)
			e.BE32(unix.NFTA_CMP_OP, unix.NFT_CMP_EQ)
			data := e.Nest(unix.NFTA_CMP_DATA)
			e.Attr(unix.NFTA_DATA_VALUE, 2)
			e.B = binary.BigEndian.AppendUint16(e.B, port)
			e.Pad()
			e.EndNest(data)
		})
		expression("redir", func() {})
		e.EndNest(all)
	})
}

// rejects makes a rule that rejects all packets.
func rejects(table, chain string, handle uint64) object {
	return made(unix.NFT_MSG_NEWRULE, func(e *nfnl.Encoder) {
		e.Str(unix.NFTA_RULE_TABLE, table)
		e.Str(unix.NFTA_RULE_CHAIN, chain)
		e.BE64(unix.NFTA_RULE_HANDLE, handle)
		all := e.Nest(unix.NFTA_RULE_EXPRESSIONS)
		one := e.Nest(unix.NFTA_LIST_ELEM)
		e.Str(unix.NFTA_EXPR_NAME, "reject")
		e.EndNest(e.Nest(unix.NFTA_EXPR_DATA))
		e.EndNest(one)
		e.EndNest(all)
	})
}

// ports returns the forwarded ports, with 0 for unknown ones.
func ports(rs *Ruleset) (all []int) {
	for _, f := range rs.Forwards(nil) {
		if f.Unknown {
			all = append(all, 0)
		}
		for _, p := range f.Ports {
			all = append(all, int(p.First))
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func readFake(t *testing.T, r *Reader) *Ruleset {
	t.Helper()
	rs, err := r.Read()
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// Fails when an unchanged table is dumped twice, decoded again, or made into a new value.
func TestTheSameRulesAreTheSameValue(t *testing.T) {
	k := &fakeKernel{objects: []object{
		madeTable("fw"), natChain("fw", "pre"), redirects("fw", "pre", 1, 5060),
		madeTable("other"), natChain("other", "pre"), redirects("other", "pre", 1, 5061),
	}}
	r := newFake(t, k)
	first := readFake(t, r)
	clear(k.asked)
	if again := readFake(t, r); again != first {
		t.Error("another value")
	}
	if n := k.asked[unix.NFT_MSG_NEWRULE]; n != 2 {
		t.Errorf("the rules of two tables were dumped %d times", n)
	}
	k.put(redirects("fw", "idle", 9, 5069))
	if again := readFake(t, r); again != first {
		t.Error("a rule that no packet gets to makes another value")
	}
	k.put(redirects("fw", "pre", 1, 5060), redirects("fw", "pre", 2, 5062))
	second := readFake(t, r)
	if got := ports(second); !slices.Equal(got, []int{5060, 5061, 5062}) {
		t.Errorf("forwarded are %v", got)
	}
	if got := ports(first); !slices.Equal(got, []int{5060, 5061}) {
		t.Errorf("the first value has become another: %v", got)
	}
	if first.tables[1] != second.tables[1] {
		t.Error("a table that is the same was decoded again")
	}
}

// A table that changes while it is read, and keeps changing, also has its earlier contents.
//
// Fails when the table is taken for complete, or when the reader does not end.
func TestTableThatChangesAllTheTimeIsTorn(t *testing.T) {
	k := &fakeKernel{objects: []object{madeTable("fw"), natChain("fw", "pre"), redirects("fw", "pre", 1, 5060)}}
	r := newFake(t, k)
	readFake(t, r)
	handle, changing := uint64(1), true
	k.before = func(typ uint16, _, _ string) {
		if typ == unix.NFT_MSG_NEWRULE && changing {
			handle++
			k.put(redirects("fw", "pre", handle, 7000+uint16(handle)))
		}
	}
	torn := readFake(t, r)
	if !torn.tables[0].torn || torn.tables[0].whole == nil {
		t.Errorf("torn %v, the last whole one is %v", torn.tables[0].torn, torn.tables[0].whole)
	}
	if got := ports(torn); !slices.Contains(got, 5060) || len(got) != 2 {
		t.Errorf("forwarded are %v", got)
	}
	changing = false
	whole := readFake(t, r)
	if got := ports(whole); whole.tables[0].torn || !slices.Equal(got, []int{7000 + int(handle)}) {
		t.Errorf("torn %v, forwarded are %v", whole.tables[0].torn, got)
	}
	if whole.tables[0].readable != nil || whole.tables[0].whole != nil {
		t.Error("it keeps what was before")
	}
}

// For forward chains that keep changing, the answer comes from the last consistent reading,
// and is unknown if there is none.
//
// Fails when an answer comes from rules that never existed at the same time.
func TestForwardChainThatChangesAllTheTime(t *testing.T) {
	k := &fakeKernel{objects: []object{madeTable("fw"), hooked("fw", "forward", "filter", unix.NF_INET_FORWARD)}}
	handle, changing := uint64(0), false
	k.before = func(typ uint16, _, _ string) {
		if typ == unix.NFT_MSG_NEWRULE && changing {
			handle++
			k.put(rejects("fw", "forward", handle))
		}
	}
	children := func(rs *Ruleset) (Answer, error) {
		all, err := rs.Children(nil, nil, []netip.Prefix{madeSubnet})
		if err != nil {
			return Unknown, err
		}
		return all[0].DNATed, nil
	}
	known := newFake(t, k)
	if got, err := children(readFake(t, known)); got != Accepted || err != nil {
		t.Errorf("at first: %v, %v", got, err)
	}
	changing = true
	if got, err := children(readFake(t, known)); got != Accepted || err != nil {
		t.Errorf("while it changes: %v, %v", got, err)
	}
	if got, err := children(readFake(t, newFake(t, k))); !errors.Is(err, nfnl.ErrInterrupted) {
		t.Errorf("while it changes, to somebody new: %v, %v", got, err)
	}
	changing = false
	if got, err := children(readFake(t, known)); got != Dropped || err != nil {
		t.Errorf("afterwards: %v, %v", got, err)
	}
}

// Fails when a single change during the reading makes a table torn.
func TestTableThatChangesOnceIsReadAgain(t *testing.T) {
	k := &fakeKernel{objects: []object{madeTable("fw"), natChain("fw", "pre"), redirects("fw", "pre", 1, 5060)}}
	r := newFake(t, k)
	dumps := 0
	k.before = func(typ uint16, _, _ string) {
		if typ == unix.NFT_MSG_NEWRULE {
			if dumps++; dumps == 2 {
				k.put(redirects("fw", "pre", 2, 5061))
			}
		}
	}
	rs := readFake(t, r)
	if got := ports(rs); rs.tables[0].torn || !slices.Equal(got, []int{5061}) {
		t.Errorf("torn %v, forwarded are %v", rs.tables[0].torn, got)
	}
}

// Fails when a reading that ended in an error counts as complete: its rules would be taken
// for known.
func TestReadingThatFailsLeavesNothing(t *testing.T) {
	k := &fakeKernel{objects: []object{madeTable("fw"), natChain("fw", "pre"), redirects("fw", "pre", 1, 5060)}}
	r := newFake(t, k)
	fails := 0
	r.cfg.Changes = func(*nfnl.Conn) (uint32, error) {
		if fails--; fails == 0 {
			return 0, unix.ENOBUFS
		}
		return 7, nil
	}
	readFake(t, r)
	k.put(redirects("fw", "pre", 2, 5061))
	fails = 2
	if _, err := r.Read(); !errors.Is(err, unix.ENOBUFS) {
		t.Fatal(err)
	}
	if got := ports(readFake(t, r)); !slices.Equal(got, []int{5061}) {
		t.Errorf("forwarded are %v", got)
	}
}

// Fails when the error that there is no nftables is not taken for an empty ruleset.
func TestWithoutNFTablesThereAreNoRules(t *testing.T) {
	k := &fakeKernel{refuse: unix.EINVAL}
	if rs := readFake(t, newFake(t, k)); len(rs.tables) != 0 {
		t.Errorf("%d tables", len(rs.tables))
	}
	k.refuse = unix.ENOMEM
	if rs, err := newFake(t, k).Read(); err == nil {
		t.Errorf("%d tables", len(rs.tables))
	}
}
