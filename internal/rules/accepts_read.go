//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A hookReader reads the ruleset. Unlike the library it keeps a place for
// expressions that are not understood, and tells when the ruleset changes.
type hookReader struct {
	c *nfnl.Conn
	// generation is that of the first answer. The kernel puts its lower half into
	// each of them.
	generation []byte
	moved      bool // a later answer has another one
}

// ask calls each for every answer to a request, with the family and the attributes.
// The names are attributes of the request.
func (r *hookReader) ask(typ, flags uint16, family nftables.TableFamily, names map[uint16]string, each func(family byte, b []byte)) error {
	var answers [][]byte
	var refused error
	err := nfnl.Whole(func() error {
		answers, refused = nil, nil
		var e nfnl.Encoder
		e.Message(unix.NFNL_SUBSYS_NFTABLES, typ, unix.NLM_F_REQUEST|flags, r.c.NextSeq(1), byte(family))
		for attr, name := range names {
			e.Str(attr, name)
		}
		e.End()
		return r.c.Exchange(&e, func(_ uint32, err error) { refused = err }, func(_ uint16, body []byte) {
			answers = append(answers, bytes.Clone(body))
		})
	})
	if err = errors.Join(err, refused); err != nil {
		return err
	}
	for _, b := range answers {
		if len(b) < nfnl.FamilyHeaderLen {
			return nfnl.ErrMalformed
		}
		if r.generation == nil {
			r.generation = b[2:nfnl.FamilyHeaderLen]
		}
		r.moved = r.moved || !bytes.Equal(b[2:nfnl.FamilyHeaderLen], r.generation)
		each(b[0], b[nfnl.FamilyHeaderLen:])
	}
	return nil
}

// A hookTable reads one table, each chain and set once.
type hookTable struct {
	r      *hookReader
	name   string
	family nftables.TableFamily
	rules  map[string][][]statement
	sets   map[string]*keySet
}

func newHookTable(r *hookReader, family nftables.TableFamily, name string) *hookTable {
	return &hookTable{r: r, name: name, family: family, rules: map[string][][]statement{}, sets: map[string]*keySet{}}
}

// ask calls each for every attribute of the answers to a question about something
// of the table.
func (t *hookTable) ask(typ, flags, table, which uint16, name string, each func(typ uint16, b []byte)) error {
	return t.r.ask(typ, flags, t.family, map[uint16]string{table: t.name, which: name}, func(_ byte, b []byte) { nfnl.Attributes(b, each) })
}

// text reads a string that ends with a zero.
func text(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }

func number32(b []byte) uint32 { return uint32(number(b, 4, 0)) }

func (t *hookTable) chainRules(chain string) ([][]statement, error) {
	if rs, ok := t.rules[chain]; ok {
		return rs, nil
	}
	var rs [][]statement
	err := t.ask(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, chain, func(typ uint16, b []byte) {
		if typ == unix.NFTA_RULE_EXPRESSIONS {
			rs = append(rs, statements(byte(t.family), b))
		}
	})
	if err != nil {
		return nil, err
	}
	t.rules[chain] = rs
	return rs, nil
}

// statements decodes the expressions of a rule. Of those that it does not
// understand it keeps the name.
func statements(family byte, b []byte) (rule []statement) {
	nfnl.Attributes(b, func(_ uint16, b []byte) {
		var s statement
		nfnl.Attributes(b, func(typ uint16, b []byte) {
			switch typ {
			case unix.NFTA_EXPR_NAME:
				s.name = text(b)
			case unix.NFTA_EXPR_DATA:
				s.expr = expression(family, s.name, b)
			}
		})
		rule = append(rule, s)
	})
	return rule
}

func expression(family byte, name string, b []byte) expr.Any {
	var e expr.Any
	switch name {
	case "immediate":
		e = &expr.Immediate{}
		nfnl.Attributes(b, func(typ uint16, b []byte) {
			if typ == unix.NFTA_IMMEDIATE_DATA {
				if v := verdictOf(b); v != nil {
					e = v
				}
			}
		})
		if _, ok := e.(*expr.Verdict); ok {
			return e
		}
	case "cmp":
		e = &expr.Cmp{}
	case "range":
		e = &expr.Range{}
	case "bitwise":
		e = &expr.Bitwise{}
	case "meta":
		e = &expr.Meta{}
	case "ct":
		e = &expr.Ct{}
	case "payload":
		e = &expr.Payload{}
	case "fib":
		e = &expr.Fib{}
	case "lookup":
		e = &expr.Lookup{}
	case "dynset":
		e = &expr.Dynset{}
	case "objref":
		e = &expr.Objref{}
	case "match":
		e = &expr.Match{}
	case "target":
		e = &expr.Target{}
	case "reject":
		return &expr.Reject{}
	case "queue":
		return &expr.Queue{}
	case "flow_offload":
		return &expr.FlowOffload{}
	default:
		return nil
	}
	if expr.Unmarshal(family, b, e) != nil {
		return nil
	}
	return e
}

// verdictOf returns the verdict in an attribute of data, nil when it has none.
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
				v.Chain = text(b)
			}
		})
	})
	return v
}

func (t *hookTable) keySet(name string, elements bool) (*keySet, error) {
	s, ok := t.sets[name]
	if !ok {
		s = &keySet{}
		if err := t.readSet(name, s); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
		t.sets[name] = s
	}
	if elements && !s.whole {
		if err := t.readElements(name, s); err != nil {
			return nil, fmt.Errorf("elements of set %s: %w", name, err)
		}
	}
	return s, nil
}

func (t *hookTable) readSet(name string, s *keySet) error {
	var flags uint32
	err := t.ask(unix.NFT_MSG_GETSET, 0, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, name, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_SET_FLAGS:
			flags = number32(b)
		case unix.NFTA_SET_KEY_LEN:
			s.size = int(number32(b))
		case unix.NFTA_SET_DATA_TYPE:
			s.verdicts = number32(b) == unix.NFT_DATA_VERDICT
		case unix.NFTA_SET_DESC:
			s.fields = keyFields(b)
		}
	})
	s.changing = flags&(unix.NFT_SET_EVAL|unix.NFT_SET_TIMEOUT) != 0
	s.interval = flags&unix.NFT_SET_INTERVAL != 0
	s.named = flags&unix.NFT_SET_ANONYMOUS == 0
	return err
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

func (t *hookTable) readElements(name string, s *keySet) error {
	var es []nftables.SetElement
	err := t.ask(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, unix.NFTA_SET_ELEM_LIST_TABLE, unix.NFTA_SET_ELEM_LIST_SET, name, func(typ uint16, b []byte) {
		if typ == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			nfnl.Attributes(b, func(_ uint16, b []byte) { es = append(es, elementOf(b)) })
		}
	})
	if err != nil {
		return err
	}
	if s.interval && len(s.fields) <= 1 {
		es = joinIntervals(es, s.size)
	}
	var others []keyElement
	for _, e := range es {
		el := keyElement{span: only(e.Key), others: e.Key == nil}
		if e.KeyEnd != nil {
			el.high = e.KeyEnd
		}
		if e.VerdictData != nil {
			el.verdict = *e.VerdictData
		}
		if el.others {
			others = append(others, el)
		} else {
			s.elements = append(s.elements, el)
		}
	}
	s.elements = append(s.elements, others...)
	s.whole = true
	return nil
}

func elementOf(b []byte) (e nftables.SetElement) {
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			e.Key = nfnl.Data(b)
		case nftables.NFTA_SET_ELEM_KEY_END:
			e.KeyEnd = nfnl.Data(b)
		case unix.NFTA_SET_ELEM_FLAGS:
			e.IntervalEnd = number32(b)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_DATA:
			e.VerdictData = verdictOf(b)
		}
	})
	return e
}
