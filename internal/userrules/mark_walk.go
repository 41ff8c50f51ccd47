package userrules

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// A mark is a mark of which the bits in known are known.
type mark struct{ val, known uint32 }

// wholeMark returns a mark of which everything is known.
func wholeMark(val uint32) mark { return mark{val, math.MaxUint32} }

// markIn returns the mark that cells hold.
func markIn(cells []cell) (m mark) {
	var val, known [4]byte
	for i := range min(len(cells), len(val)) {
		val[i], known[i] = cells[i].val&cells[i].known, cells[i].known
	}
	return mark{binary.NativeEndian.Uint32(val[:]), binary.NativeEndian.Uint32(known[:])}
}

func (m mark) cells() []cell {
	cells := unknownBytes(4, nil)
	val, known := binary.NativeEndian.AppendUint32(nil, m.val), binary.NativeEndian.AppendUint32(nil, m.known)
	for i := range cells {
		cells[i].val, cells[i].known = val[i], known[i]
	}
	return cells
}

func (m mark) and(mask uint32) mark { return mark{m.val & mask, m.known | ^mask} }

func (m mark) xor(o mark) mark {
	known := m.known & o.known
	return mark{(m.val ^ o.val) & known, known}
}

// marks are the marks of a packet and of its flow.
type marks struct{ packet, flow mark }

// A markEnd is one possible end of a packet in a chain, or at a rule, with its marks then.
type markEnd struct {
	fate  fates // one of accepts, returns and proceeds
	marks marks
}

// mostMarkEnds limits the possible ends of one packet.
const mostMarkEnds = 32

// errManyMarks says that too much may happen to the marks of a packet, or that it is not known.
var errManyMarks = errors.New("the marks of the packet are not known")

// A markWalk takes a packet through the chains of one table and follows its marks. Its child is
// that packet. Whether a rule matches is the hookWalk's to say: of a rule that only may match both
// outcomes count.
type markWalk struct {
	hookWalk
	guards guards
	packet *rawPacket
	ends   map[markChain][]markEnd
	regs   cells
}

type markChain struct {
	name  string
	marks marks
}

// chain returns the ends of packets with such marks in a chain: accepts or returns. Packets that are
// dropped have none.
func (w *markWalk) chain(name string, m marks) (ends []markEnd, err error) {
	key := markChain{name, m}
	if ends, ok := w.ends[key]; ok {
		return ends, nil
	}
	if w.depth > maxDepth {
		return nil, errManyMarks
	}
	w.depth++
	defer func() { w.depth-- }()
	c := w.table.chains[name]
	if c == nil {
		c = &chain{}
	}
	if c.failed != nil || c.odd != "" {
		return nil, errManyMarks
	}
	guards, here := w.guards.of(c), []marks{m}
	for i := range c.rules {
		if !w.child.rewritten && !guards[i].mayPass(w.packet) {
			continue
		}
		var next []marks
		for _, m := range here {
			after, err := w.rule(&c.rules[i], m)
			if err != nil {
				return nil, err
			}
			for _, e := range after {
				if e.fate != proceeds {
					ends = added(ends, e)
				} else if next = added(next, e.marks); len(next) > mostMarkEnds {
					return nil, errManyMarks
				}
			}
		}
		if here = next; len(here) == 0 {
			break
		}
	}
	for _, m := range here {
		ends = added(ends, markEnd{returns, m})
	}
	if len(ends) > mostMarkEnds {
		return nil, errManyMarks
	}
	w.ends[key] = ends
	return ends, nil
}

func added[T comparable](all []T, x T) []T {
	if slices.Contains(all, x) {
		return all
	}
	return append(all, x)
}

// rule returns the ends of packets at a rule.
func (w *markWalk) rule(r *rule, m marks) (ends []markEnd, err error) {
	w.sees(m)
	for _, s := range r.statements {
		w.at = r.chain
		sets, err := w.sets(s, &m)
		if err != nil {
			return nil, err
		}
		if sets {
			w.sees(m)
			continue
		}
		leave, all, err := w.leave(s, m)
		if err != nil {
			return nil, err
		}
		for _, e := range leave {
			ends = added(ends, e)
		}
		if all {
			return ends, nil
		}
	}
	return added(ends, markEnd{proceeds, m}), nil
}

// sees gives the packet its marks.
func (w *markWalk) sees(m marks) { w.child.mark, w.child.flowMark = m.packet.cells(), m.flow.cells() }

// sets reports whether a statement sets marks, and does so.
func (w *markWalk) sets(s statement, m *marks) (sets bool, err error) {
	switch e := s.expr.(type) {
	case *expr.Meta:
		if e.SourceRegister && e.Key == expr.MetaKeyMARK {
			m.packet = markIn(w.regs.get(e.Register, 4))
			return true, nil
		}
	case *expr.Ct:
		if e.SourceRegister && e.Key == expr.CtKeyMARK {
			if !w.child.untracked {
				m.flow = markIn(w.regs.get(e.Register, 4))
			}
			return true, nil
		}
	case *expr.Target:
		return m.xtTarget(e, w.child.untracked)
	}
	return false, nil
}

// xtTarget is markWalk.sets for a target of iptables.
func (m *marks) xtTarget(t *expr.Target, untracked bool) (sets bool, err error) {
	info, _ := t.Info.(*xt.Unknown)
	switch t.Name {
	case "MARK":
		if info == nil || t.Rev != 2 || len(*info) < 8 {
			return false, errManyMarks
		}
		m.packet = m.packet.and(^word32(*info, 1)).xor(wholeMark(word32(*info, 0))) // struct xt_mark_tginfo2
		return true, nil
	case "CONNMARK":
		if info == nil || t.Rev < 1 || t.Rev > 2 || len(*info) < 16 {
			return false, errManyMarks
		}
		if !untracked {
			err = m.connmark(*info, t.Rev)
		}
		return true, err
	case "HMARK", "SET":
		m.packet = mark{}
		return true, nil
	case "TPROXY":
		return false, errManyMarks
	}
	return false, nil
}

// connmark follows connmark_tg_shift in the kernel.
func (m *marks) connmark(info []byte, revision uint32) error {
	const set, save, restore = 0, 1, 2 // XT_CONNMARK_
	ctmark, ctmask, nfmask := word32(info, 0), word32(info, 1), word32(info, 2)
	mode := info[12]
	if revision == 2 {
		if mode = info[14]; info[13] != 0 { // it shifts
			return errManyMarks
		}
	}
	switch mode {
	case set:
		m.flow = m.flow.and(^ctmask).xor(wholeMark(ctmark))
	case save:
		m.flow = m.flow.and(^ctmask).xor(m.packet.and(nfmask))
	case restore:
		m.packet = m.packet.and(^nfmask).xor(m.flow.and(ctmask))
	default:
		return errManyMarks
	}
	return nil
}

func word32(b []byte, i int) uint32 { return binary.NativeEndian.Uint32(b[4*i:]) }

// leave returns the ends of packets that leave a rule at a statement that sets no mark. all says that
// no packet goes on to the next statement.
func (w *markWalk) leave(s statement, m marks) (ends []markEnd, all bool, err error) {
	switch e := s.expr.(type) {
	case *expr.Verdict:
		ends, err = w.verdict(*e, m)
		return ends, true, err
	case *expr.Lookup:
		if e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT {
			ends, err = w.verdicts(e, m)
			return ends, true, err
		}
	case *expr.Payload:
		if e.OperationType != expr.PayloadLoad {
			clear(w.ends)
		}
	}
	end, c, err := w.statement(&w.regs, s)
	switch {
	case err != nil:
		return nil, true, err
	case end == drops:
		return nil, true, nil
	case end == accepts, end == translates:
		return []markEnd{{accepts, m}}, true, nil
	case end == accepts|drops: // a program decides, and may set a mark
		return []markEnd{{accepts, marks{flow: m.flow}}}, true, nil
	case end != 0:
		return nil, true, errManyMarks
	case c == always:
		return nil, false, nil
	}
	return []markEnd{{proceeds, m}}, c == never, nil
}

// verdicts returns the ends of packets at a verdict map.
func (w *markWalk) verdicts(e *expr.Lookup, m marks) (ends []markEnd, err error) {
	set, err := w.set(e.SetName)
	if err != nil {
		return nil, err
	}
	key := slices.Clone(w.regs.get(e.SourceRegister, set.size))
	if !set.tells(key) {
		return nil, errManyMarks
	}
	c, err := w.branch(set, key, func(v expr.Verdict) error {
		more, err := w.verdict(v, m)
		for _, e := range more {
			ends = added(ends, e)
		}
		return err
	})
	if c != always {
		ends = added(ends, markEnd{proceeds, m})
	}
	return ends, err
}

func (w *markWalk) verdict(v expr.Verdict, m marks) (ends []markEnd, err error) {
	switch v.Kind {
	case expr.VerdictAccept:
		return []markEnd{{accepts, m}}, nil
	case expr.VerdictReturn:
		return []markEnd{{returns, m}}, nil
	case expr.VerdictContinue, expr.VerdictBreak:
		return []markEnd{{proceeds, m}}, nil
	case expr.VerdictGoto:
		return w.chain(v.Chain, m)
	case expr.VerdictJump:
		inside, err := w.chain(v.Chain, m)
		for _, e := range inside {
			if e.fate == returns {
				e.fate = proceeds
			}
			ends = added(ends, e)
		}
		return ends, err
	case expr.VerdictQueue:
		m.packet = mark{}
		return []markEnd{{accepts, m}}, nil
	}
	return nil, nil
}
