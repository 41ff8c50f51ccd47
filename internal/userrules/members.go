package userrules

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Members asks the kernel what named sets and maps of nftables, and sets of ipset, contain now. A Ruleset
// does not have the elements of sets to which packets may add, or whose elements expire, nor those of
// ipset. It opens its connection on first use. It is not safe for concurrent use.
type Members struct {
	c      *nfnl.Conn
	err    error            // the first error
	ipsets map[uint16]ipset // by index
}

// dial connects to the kernel, and reports whether there was no error yet.
func (m *Members) dial() bool {
	if m.c == nil && m.err == nil {
		m.c, m.err = nfnl.Dial(0)
	}
	return m.err == nil
}

// value returns what a map has for a key, nil if it is a set. known is false if nobody can tell. A set
// that others delete and make again between two questions would seem to lack what it has all the time.
func (m *Members) value(t *table, name string, key []byte) (value []byte, found, known bool) {
	for range maxReads {
		if !m.dial() {
			break
		}
		before := m.generation()
		value, err := m.look(t, name, key)
		switch {
		case m.generation() != before:
		case err == nil:
			return value, true, true
		case errors.Is(err, errNoElement):
			return nil, false, true
		case errors.Is(err, unix.ENOENT): // somebody replaces his rules
			return nil, false, false
		default:
			m.fails(err)
		}
	}
	return nil, false, false
}

// generation returns the number of the last transaction.
func (m *Members) generation() uint32 {
	id, err := nfnl.Generation(m.c)
	m.fails(err)
	return id
}

// fails notes an error, if it is the first.
func (m *Members) fails(err error) {
	if m.err == nil && err != nil {
		m.err = nfnl.Permitted(err)
	}
}

// errNoElement says that a set exists without the element.
var errNoElement = errors.New("no such element")

// look asks for the element that has a key, or for the catch-all element. The error is errNoElement or
// unix.ENOENT if there is neither, or no such set.
func (m *Members) look(t *table, name string, key []byte) (value []byte, err error) {
	if value, err = m.ask(t, name, key); !errors.Is(err, unix.ENOENT) {
		return value, err
	}
	if value, err = m.ask(t, name, nil); !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) { // before Linux 5.13
		return value, err
	}
	if err = m.exists(t, name); err == nil {
		err = errNoElement
	}
	return nil, err
}

// exists asks for the set itself. The error is unix.ENOENT if there is none.
func (m *Members) exists(t *table, name string) error {
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSET, unix.NLM_F_REQUEST, m.c.NextSeq(1), t.family)
	e.Str(unix.NFTA_SET_TABLE, t.name)
	e.Str(unix.NFTA_SET_NAME, name)
	e.End()
	return m.c.Ask(&e, func(uint16, []byte) {})
}

// ask asks for the element that has a key, or for the catch-all element if key is nil. The error is
// unix.ENOENT if there is none.
func (m *Members) ask(t *table, name string, key []byte) (value []byte, err error) {
	const catchAll = 2 // NFT_SET_ELEM_CATCHALL
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSETELEM, unix.NLM_F_REQUEST, m.c.NextSeq(1), t.family)
	e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, t.name)
	e.Str(unix.NFTA_SET_ELEM_LIST_SET, name)
	list := e.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	elem := e.Nest(unix.NFTA_LIST_ELEM)
	if key == nil {
		e.BE32(unix.NFTA_SET_ELEM_FLAGS, catchAll)
	} else {
		k := e.Nest(unix.NFTA_SET_ELEM_KEY)
		e.Bytes(unix.NFTA_DATA_VALUE, key)
		e.EndNest(k)
	}
	e.EndNest(elem)
	e.EndNest(list)
	e.End()
	err = m.c.Ask(&e, func(_ uint16, body []byte) {
		nfnl.Attributes(body[nfnl.FamilyHeaderLen:], func(typ uint16, b []byte) {
			if typ == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				nfnl.Attributes(b, func(_ uint16, b []byte) { value = elementOf(b).value })
			}
		})
	})
	return value, err
}

// Close ends the connection, and returns the first error since it was opened.
func (m *Members) Close() error {
	err := m.err
	if m.c != nil {
		_ = m.c.Close()
	}
	*m = Members{}
	return err
}

// exact returns the key as the kernel has it. ok is false if some of it is not known.
func (s *set) exact(key []cell) (exact []byte, ok bool) {
	exact = make([]byte, len(key))
	for i, c := range key {
		switch {
		case c.known == 0xff:
			exact[i] = c.val
		case !s.pads(i):
			return nil, false
		}
	}
	return exact, true
}

// pads reports whether a byte of keys only fills up a part of them.
func (s *set) pads(at int) bool {
	for _, size := range s.fields {
		whole := (size + 3) &^ 3
		if at < whole {
			return at >= size
		}
		at -= whole
	}
	return false
}
