package userrules

import (
	"bytes"
	"fmt"
	"math/big"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

func number32(b []byte) uint32 { return uint32(number(b, 4, 0)) }

// baseOf decodes a chain. A chain without a hook has no kind.
func baseOf(b []byte) (c base) {
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_CHAIN_NAME:
			c.name = nfnl.Text(b)
		case unix.NFTA_CHAIN_HANDLE:
			c.handle = number(b, 8, 0)
		case unix.NFTA_CHAIN_TYPE:
			c.kind = nfnl.Text(b)
		case unix.NFTA_CHAIN_POLICY:
			c.drops = number32(b) == 0 // NF_DROP
		case unix.NFTA_CHAIN_HOOK:
			nfnl.Attributes(b, func(typ uint16, b []byte) {
				switch typ {
				case unix.NFTA_HOOK_HOOKNUM:
					c.hook = number32(b)
				case unix.NFTA_HOOK_PRIORITY:
					c.priority = int32(number32(b))
				}
			})
		}
	})
	return c
}

// ruleOf decodes a rule. odd says what in it is not understood; empty means nothing.
func ruleOf(family byte, b []byte) (r rule, odd string) {
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_RULE_CHAIN:
			r.chain = nfnl.Text(b)
		case unix.NFTA_RULE_HANDLE:
			r.handle = number(b, 8, 0)
		case unix.NFTA_RULE_EXPRESSIONS:
			r.statements, odd = statements(family, b)
		case unix.NFTA_RULE_USERDATA:
			r.comment = userComment(b)
		}
	})
	for _, s := range r.statements {
		if m, ok := s.expr.(*expr.Match); ok {
			if c, ok := m.Info.(*xt.Comment); ok { // of iptables
				r.comment = string(*c)
			}
		}
	}
	return r, odd
}

// userComment returns the comment in the user data of a rule of nft. userdata.Get does not
// check the length.
func userComment(b []byte) string {
	if len(b) > 2 && b[0] == byte(userdata.TypeComment) && len(b) >= 2+int(b[1]) {
		return string(bytes.TrimRight(b[2:2+int(b[1])], "\x00"))
	}
	return ""
}

// statements decodes the expressions of a rule. It keeps only the name of expressions that
// do not matter or are not understood. odd names one that is not understood.
func statements(family byte, b []byte) (all []statement, odd string) {
	nfnl.Attributes(b, func(_ uint16, b []byte) {
		var s statement
		nfnl.Attributes(b, func(typ uint16, b []byte) {
			switch typ {
			case unix.NFTA_EXPR_NAME:
				if s.name = nfnl.Text(b); !expressions[s.name] {
					odd = fmt.Sprintf("%q, which is not known", s.name)
				}
			case unix.NFTA_EXPR_DATA:
				var err error
				if s.expr, err = expression(family, s.name, b); err != nil {
					odd = fmt.Sprintf("%q, which is not understood: %v", s.name, err)
				}
			}
		})
		if o, ok := s.expr.(*objrefMap); ok { // the rule goes on for the keys of the map
			all = append(all, statement{"lookup", o.lookup()})
		}
		all = append(all, s)
	})
	return all, odd
}

// expressions are all expressions of Linux.
var expressions = func() map[string]bool {
	all := map[string]bool{}
	for _, name := range []string{
		"bitwise", "byteorder", "cmp", "connlimit", "counter", "ct", "dup", "dynset", "exthdr", "fib", "flow_offload", "fwd",
		"hash", "immediate", "inner", "last", "limit", "log", "lookup", "masq", "match", "meta", "nat", "notrack", "numgen",
		"objref", "osf", "payload", "queue", "quota", "range", "redir", "reject", "rt", "socket", "synproxy", "target",
		"tproxy", "tunnel", "xfrm",
	} {
		all[name] = true
	}
	return all
}()

// decoded makes the expressions that the library decodes.
var decoded = map[string]func() expr.Any{
	"immediate": func() expr.Any { return &expr.Immediate{} },
	"cmp":       func() expr.Any { return &expr.Cmp{} },
	"range":     func() expr.Any { return &expr.Range{} },
	"bitwise":   func() expr.Any { return &expr.Bitwise{} },
	"meta":      func() expr.Any { return &expr.Meta{} },
	"ct":        func() expr.Any { return &expr.Ct{} },
	"payload":   func() expr.Any { return &expr.Payload{} },
	"fib":       func() expr.Any { return &expr.Fib{} },
	"lookup":    func() expr.Any { return &expr.Lookup{} },
	"objref":    func() expr.Any { return &expr.Objref{} },
	"match":     func() expr.Any { return &expr.Match{} },
	"target":    func() expr.Any { return &expr.Target{} },
	"nat":       func() expr.Any { return &expr.NAT{} },
	"masq":      func() expr.Any { return &expr.Masq{} },
	"redir":     func() expr.Any { return &expr.Redir{} },
	"hash":      func() expr.Any { return &expr.Hash{} },
	"numgen":    func() expr.Any { return &expr.Numgen{} },
	"exthdr":    func() expr.Any { return &expr.Exthdr{} },
}

// expression decodes the data of an expression, if it matters here.
func expression(family byte, name string, b []byte) (e expr.Any, err error) {
	switch name {
	case "immediate":
		nfnl.Attributes(b, func(typ uint16, b []byte) {
			if typ == unix.NFTA_IMMEDIATE_DATA {
				if v := verdictOf(b); v != nil {
					e = v
				}
			}
		})
		if e != nil {
			return e, nil
		}
	case "objref":
		if o := objrefMapOf(b); o.set != "" {
			return o, nil
		}
	case "tproxy":
		p := &expr.TProxy{} // the library takes the family for one byte
		nfnl.Attributes(b, func(typ uint16, b []byte) {
			if typ == expr.NFTA_TPROXY_FAMILY {
				p.Family = byte(number32(b))
			}
		})
		return p, nil
	case "dynset":
		return &expr.Dynset{}, nil
	case "reject":
		return &expr.Reject{}, nil
	case "queue":
		return &expr.Queue{}, nil
	case "flow_offload":
		return &expr.FlowOffload{}, nil
	}
	empty := decoded[name]
	if empty == nil {
		return nil, nil
	}
	e = empty()
	if err := expr.Unmarshal(family, b, e); err != nil {
		return nil, err
	}
	return e, nil
}

const nftaSetObjType = 15 // NFTA_SET_OBJ_TYPE

// An objrefMap is a reference to one of the objects of a map, by the key in a register.
type objrefMap struct {
	expr.Any
	set      string
	register uint32
}

func objrefMapOf(b []byte) (o *objrefMap) {
	const register, name = 3, 4 // NFTA_OBJREF_SET_SREG and _NAME
	o = &objrefMap{}
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		switch typ {
		case register:
			o.register = number32(b)
		case name:
			o.set = nfnl.Text(b)
		}
	})
	return o
}

func (o *objrefMap) lookup() *expr.Lookup {
	return &expr.Lookup{SourceRegister: o.register, SetName: o.set}
}

// verdictOf returns the verdict in a data attribute, or nil if there is none.
func verdictOf(b []byte) (v *expr.Verdict) {
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		if typ != unix.NFTA_DATA_VERDICT {
			return
		}
		v = &expr.Verdict{}
		nfnl.Attributes(b, func(typ uint16, b []byte) {
			switch typ {
			case unix.NFTA_VERDICT_CODE:
				v.Kind = expr.VerdictKind(int32(number32(b)))
			case unix.NFTA_VERDICT_CHAIN:
				v.Chain = nfnl.Text(b)
			}
		})
	})
	return v
}

// setOf decodes a set, without its elements.
func setOf(b []byte) *set {
	var s set
	var flags uint32
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_SET_FLAGS:
			flags = number32(b)
		case unix.NFTA_SET_KEY_LEN:
			s.size = int(number32(b))
		case unix.NFTA_SET_DATA_TYPE:
			s.verdicts = number32(b) == unix.NFT_DATA_VERDICT
		case unix.NFTA_SET_DESC:
			s.fields = keyFields(b)
		case nftaSetObjType:
			s.objects = number32(b)
		}
	})
	s.changing = flags&(unix.NFT_SET_EVAL|unix.NFT_SET_TIMEOUT) != 0
	s.interval = flags&unix.NFT_SET_INTERVAL != 0
	s.named = flags&unix.NFT_SET_ANONYMOUS == 0
	return &s
}

// keyFields reads the sizes of the parts of a key from the description of a set.
func keyFields(b []byte) (sizes []int) {
	const concat, length = 2, 1 // NFTA_SET_DESC_CONCAT, NFTA_SET_FIELD_LEN
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		if typ != concat {
			return
		}
		nfnl.Attributes(b, func(_ uint16, b []byte) {
			nfnl.Attributes(b, func(typ uint16, b []byte) {
				if typ == length {
					sizes = append(sizes, int(number32(b)))
				}
			})
		})
	})
	return sizes
}

// A rawElement is an element as the kernel reports it. An interval has two elements, unless
// its key has several parts.
type rawElement struct {
	key, end []byte // key is nil for the catch-all element
	isEnd    bool   // the element ends an interval, which lies before the key
	verdict  expr.Verdict
	value    []byte
}

func elementOf(b []byte) (e rawElement) {
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			e.key = nfnl.Data(b)
		case nftaSetElemKeyEnd:
			e.end = nfnl.Data(b)
		case unix.NFTA_SET_ELEM_FLAGS:
			e.isEnd = number32(b)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_DATA:
			if v := verdictOf(b); v != nil {
				e.verdict = *v
			}
			e.value = nfnl.Data(b)
		}
	})
	return e
}

// These are from linux/netfilter/nf_tables.h.
const (
	nftaSetElemKeyEnd      = 10
	nftaSetElemExpressions = 11
)

// fill adds elements to the set, as the kernel reported them.
func (s *set) fill(es []rawElement) {
	if s.interval && len(s.fields) <= 1 {
		es = joinIntervals(es, s.size)
	}
	var others []element
	for _, e := range es {
		el := element{span: only(e.key), others: e.key == nil, verdict: e.verdict, value: e.value}
		switch {
		case el.others:
			el.span = span{make([]byte, s.size), slices.Repeat([]byte{0xff}, s.size)}
			others = append(others, el)
			continue
		case e.end != nil:
			el.high = e.end
		}
		s.elements = append(s.elements, el)
	}
	s.elements, s.loaded = append(s.elements, others...), true
}

// joinIntervals joins the two elements of each interval. The second element has the first
// key behind the interval; it is missing if the interval has the last key.
func joinIntervals(es []rawElement, size int) []rawElement {
	slices.SortStableFunc(es, func(a, b rawElement) int { return bytes.Compare(a.key, b.key) })
	var out []rawElement
	for i, e := range es {
		if e.isEnd {
			continue
		}
		if e.key != nil && e.end == nil {
			e.end = slices.Repeat([]byte{0xff}, size)
			next := slices.IndexFunc(es[i+1:], func(n rawElement) bool { return !bytes.Equal(n.key, e.key) })
			if next >= 0 {
				e.end = before(es[i+1+next].key)
			}
		}
		out = append(out, e)
	}
	return out
}

// before returns the key before b. b must not be all zeros.
func before(b []byte) []byte {
	n := new(big.Int).SetBytes(b)
	return n.Sub(n, big.NewInt(1)).FillBytes(make([]byte, len(b)))
}
