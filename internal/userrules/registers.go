package userrules

import (
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// registers are the registers of a rule, in words of 4 bytes. The word where a value begins
// has the fields that were loaded there. A field is forgotten once it was compared: the
// library omits expressions that it does not know, and what they load must not be taken for
// the earlier fields.
type registers [64][]field

// word returns the index of a register. Registers 1 to 4 have 16 bytes each; registers from
// 8 on are the same memory in words.
func word(reg uint32) int {
	if reg >= unix.NFT_REG32_00 {
		return min(int(reg-unix.NFT_REG32_00), 63)
	}
	return int((reg - 1) % 4 * 4)
}

func (r *registers) put(reg uint32, fields []field) { r[word(reg)] = fields }

// get returns the fields of a key of the given size.
func (r *registers) get(reg uint32, size int) []field {
	var key []field
	for w, at := word(reg), 0; at < size && w < len(r); {
		n := 0
		for _, f := range r[w] {
			n += f.size
		}
		key = append(key, r[w]...)
		switch pad := (n + 3) &^ 3; {
		case n == 0:
			key = append(key, field{size: 4})
			n = 4
		case pad > n && at+n < size:
			key = append(key, field{kind: padding, size: pad - n})
			n = pad
		}
		at += n
		w += (n + 3) / 4
	}
	return key
}

// take is get, but also forgets the fields.
func (r *registers) take(reg uint32, size int) []field {
	key := r.get(reg, size)
	for w := word(reg); w < min(word(reg)+(size+3)/4, len(r)); w++ {
		r[w] = nil
	}
	return key
}

// bitwise puts the fields of the source register, masked, into the destination register.
func (r *registers) bitwise(e *expr.Bitwise) {
	fields := slices.Clone(r.get(e.SourceRegister, int(e.Len)))
	at := 0
	for i := range fields {
		f := &fields[i]
		end := at + f.size
		switch {
		case !allZero(e.Xor), end > len(e.Mask), f.mask != nil:
			*f = field{kind: mangled(f.kind), size: f.size}
		default:
			f.mask = e.Mask[at:end]
		}
		at = end
	}
	r.put(e.DestRegister, fields)
}

func mangled(k fieldKind) fieldKind {
	if k == port || k == mangledPort {
		return mangledPort
	}
	return other
}

// load updates the registers with what a statement loads. Other statements load nothing.
func (r *registers) load(e expr.Any, family byte) {
	switch e := e.(type) {
	case *expr.Meta:
		if !e.SourceRegister {
			r.put(e.Register, metaFields(e.Key))
		}
	case *expr.Payload:
		if e.OperationType == expr.PayloadLoad {
			r.put(e.DestRegister, payloadFields(e, family))
		}
	case *expr.Bitwise:
		r.bitwise(e)
	default:
		if reg, loads := loads(e); loads {
			r.put(reg, nil)
		}
	}
}

// loads returns the register that a statement loads, if it loads one.
func loads(e expr.Any) (reg uint32, loads bool) {
	switch e := e.(type) {
	case *expr.Immediate:
		return e.Register, true
	case *expr.Payload:
		return e.DestRegister, e.OperationType == expr.PayloadLoad
	case *expr.Meta:
		return e.Register, !e.SourceRegister
	case *expr.Ct:
		return e.Register, !e.SourceRegister
	case *expr.Bitwise:
		return e.DestRegister, true
	case *expr.Lookup:
		return e.DestRegister, e.IsDestRegSet
	case *expr.Fib:
		return e.Register, true
	case *expr.Numgen:
		return e.Register, true
	case *expr.Hash:
		return e.DestRegister, true
	case *expr.Exthdr:
		return e.DestRegister, true
	}
	return 0, false
}

// plain evaluates a statement that is neither a verdict nor a lookup.
func (w *walker) plain(conds []condition, regs *registers, s statement) []condition {
	switch e := s.expr.(type) {
	case *expr.Payload:
		if len(conds) > 0 {
			regs.load(e, conds[0].family)
		}
	case *expr.Meta, *expr.Bitwise, *expr.Ct, *expr.Immediate, *expr.Fib, *expr.Numgen, *expr.Hash, *expr.Exthdr:
		regs.load(e, w.table.family)
	case *expr.Cmp:
		return w.compare(conds, regs, e)
	case *expr.Range:
		fields := regs.take(e.Register, len(e.FromData))
		return w.narrow(conds, fields, test{any: []span{{e.FromData, e.ToData}}, not: e.Op == expr.CmpOpNeq})
	case nil:
		if slices.Contains(passed, s.name) {
			return conds
		}
		if s.name != "byteorder" { // nft uses byteorder for single bytes, too
			*regs = registers{} // the statement may have loaded a register
		}
		return partly(conds)
	default: // for example a limit
		return partly(conds)
	}
	return conds
}

// passed are statements that let each packet continue unchanged.
var passed = []string{"counter", "last", "log"}

// compare evaluates a comparison. A range consists of two comparisons, the lower end first,
// so that one must not forget the field.
func (w *walker) compare(conds []condition, regs *registers, e *expr.Cmp) []condition {
	size := len(e.Data)
	low, high := make([]byte, size), slices.Repeat([]byte{0xff}, size)
	switch e.Op {
	case expr.CmpOpEq, expr.CmpOpNeq:
		return w.narrow(conds, regs.take(e.Register, size), test{any: []span{only(e.Data)}, not: e.Op == expr.CmpOpNeq})
	case expr.CmpOpGte:
		return w.narrow(conds, regs.get(e.Register, size), test{any: []span{{e.Data, high}}})
	case expr.CmpOpGt:
		return w.narrow(conds, regs.get(e.Register, size), test{any: []span{{low, e.Data}}, not: true})
	case expr.CmpOpLte:
		return w.narrow(conds, regs.take(e.Register, size), test{any: []span{{low, e.Data}}})
	case expr.CmpOpLt:
		return w.narrow(conds, regs.take(e.Register, size), test{any: []span{{e.Data, high}}, not: true})
	}
	return conds
}

func metaFields(key expr.MetaKey) []field {
	switch key {
	case expr.MetaKeyL4PROTO:
		return []field{{kind: protocol, size: 1}}
	case expr.MetaKeyNFPROTO:
		return []field{{kind: family, size: 1}}
	case expr.MetaKeyPROTOCOL:
		return []field{{kind: etherType, size: 2}}
	case expr.MetaKeyIIFNAME:
		return []field{{kind: linkName, size: unix.IFNAMSIZ}}
	case expr.MetaKeyOIFNAME:
		return []field{{kind: outName, size: unix.IFNAMSIZ}}
	case expr.MetaKeyIIF:
		return []field{{kind: linkIndex, size: 4}}
	}
	return nil
}

// A place is the position of a field in a header.
type place struct {
	kind     fieldKind
	from, to int
}

var (
	transportHeader = []place{{port, 2, 4}}
	header4         = []place{{protocol, 9, 10}, {source4, 12, 16}, {address4, 16, 20}}
	header6         = []place{{protocol, 6, 7}, {source6, 8, 24}, {address6, 24, 40}}
)

// payloadFields returns the fields in a part of a header. nft loads adjacent fields in one
// go, and only the first bytes of an address to test a prefix.
func payloadFields(e *expr.Payload, fam byte) []field {
	var places []place
	switch {
	case e.Base == expr.PayloadBaseTransportHeader:
		places = transportHeader
	case e.Base != expr.PayloadBaseNetworkHeader:
	case fam == unix.NFPROTO_IPV6, fam == unix.NFPROTO_INET && e.Offset+e.Len > 20:
		places = header6
	default:
		places = header4
	}
	var fields []field
	at, end := int(e.Offset), int(e.Offset+e.Len)
	for _, p := range places {
		from, to := max(p.from, at), min(p.to, end)
		if from >= to {
			continue
		}
		if from > at {
			fields = append(fields, field{size: from - at})
		}
		switch {
		case from == p.from && to == p.to, from == p.from && p.kind != port:
			fields = append(fields, field{kind: p.kind, size: to - from})
		default:
			fields = append(fields, field{kind: mangled(p.kind), size: to - from})
		}
		at = to
	}
	if at < end {
		fields = append(fields, field{size: end - at})
	}
	return fields
}
