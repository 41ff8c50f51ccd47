package elements

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// List calls f for every permission in the map, granted or learned, with its remaining
// time. Permissions that are added or removed during the call may be missing. It uses its
// own connection.
func (m *Map) List(f func(p cone.Permission, left time.Duration)) error {
	marks := map[cone.Key]uint32{}
	err := m.w.list(MarksMap, func(key, value []byte, _ time.Duration) {
		if k, ok := keyOf(key); ok && len(value) == markLen {
			marks[k] = binary.NativeEndian.Uint32(value)
		}
	})
	if err != nil {
		return err
	}
	var found halves
	for _, set := range []string{PortMap, PermissionMap} {
		if err := m.w.listAttributes(set, found.add); err != nil {
			return err
		}
	}
	found.each(func(p cone.Permission, left time.Duration) {
		p.Mark = marks[p.Key]
		p.HostBits = m.hostBits(p.Peer)
		f(p, left)
	})
	return nil
}

// Keys calls f with the key of every permission in the map, as List does, until f returns
// false. It lists one set of elements, and keeps none of them.
func (m *Map) Keys(f func(k cone.Key) bool) error {
	return listUntil(m.w.netns, unix.AF_INET, m.w.table, PermissionMap, func(b []byte) bool {
		k, ok := keyOf(Key(b))
		k.HostBits = m.hostBits(k.Peer)
		return !ok || f(k)
	})
}

// halves combines permissions from the elements of two maps, the inside addresses and the
// inside ports. The zero value is ready for use.
type halves struct {
	ports map[cone.Key]uint16
	addrs map[cone.Key]timedAddr
}

type timedAddr struct {
	addr cone.Addr
	left time.Duration
}

// add takes an element of either map. It skips elements that it does not understand.
func (h *halves) add(b []byte) {
	key, value, left := elementParts(b)
	k, ok := keyOf(key)
	switch {
	case !ok:
	case len(value) == portLen:
		if h.ports == nil {
			h.ports = make(map[cone.Key]uint16)
		}
		h.ports[k] = binary.BigEndian.Uint16(value)
	case len(value) == addressLen:
		if h.addrs == nil {
			h.addrs = make(map[cone.Key]timedAddr)
		}
		h.addrs[k] = timedAddr{cone.AddrFrom4([4]byte(value)), left}
	}
}

// each calls f for every permission of which both halves were added.
func (h *halves) each(f func(p cone.Permission, left time.Duration)) {
	for k, a := range h.addrs {
		if port, ok := h.ports[k]; ok {
			f(cone.Permission{Key: k, Int: cone.Endpoint{Addr: a.addr, Port: port}}, a.left)
		}
	}
}

// whole returns the inside endpoint of every permission of which both halves were added.
func (h *halves) whole() map[cone.Key]cone.Endpoint {
	all := make(map[cone.Key]cone.Endpoint, len(h.addrs))
	h.each(func(p cone.Permission, _ time.Duration) { all[p.Key] = p.Int })
	return all
}

// list calls f for every element of a set in the table of family ip, as List does.
func (w *Writer) list(set string, f func(key, value []byte, left time.Duration)) error {
	return w.listAttributes(set, func(b []byte) { f(elementParts(b)) })
}

func (w *Writer) listAttributes(set string, f func(b []byte)) error {
	return List(w.netns, unix.AF_INET, w.table, set, f)
}

// List calls f with the attributes of every element of a set, over its own connection. If
// the dump was interrupted, f may get an element twice. A missing set has no elements.
func List(netns int, family byte, table, set string, f func(b []byte)) error {
	return listUntil(netns, family, table, set, func(b []byte) bool {
		f(b)
		return true
	})
}

// listUntil is List until f returns false.
func listUntil(netns int, family byte, table, set string, f func(b []byte) bool) error {
	c, err := nfnl.Dial(netns)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	stopped := false
	err = nfnl.Uninterrupted(func() error {
		var e nfnl.Encoder
		e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSETELEM, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, c.NextSeq(1), family)
		e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, table)
		e.Str(unix.NFTA_SET_ELEM_LIST_SET, set)
		e.End()
		return c.Ask(&e, func(_ uint16, body []byte) {
			eachElement(body, func(b []byte) {
				if !stopped && !f(b) {
					stopped = true
					_ = c.Close() // the kernel stops, too
				}
			})
		})
	})
	if stopped {
		return nil
	}
	if err != nil && !errors.Is(err, unix.ENOENT) { // with ENOENT the table does not exist
		return fmt.Errorf("list set %s: %w", set, nfnl.Permitted(err))
	}
	return nil
}

// eachElement calls f for every element in a message of a dump.
func eachElement(body []byte, f func(b []byte)) {
	if len(body) < nfnl.FamilyHeaderLen {
		return
	}
	nfnl.Attributes(body[nfnl.FamilyHeaderLen:], func(typ uint16, b []byte) {
		if typ == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			nfnl.Attributes(b, func(_ uint16, b []byte) { f(b) })
		}
	})
}

// elementParts reads one element. It skips unknown attributes.
func elementParts(b []byte) (key, value []byte, left time.Duration) {
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			key = nfnl.Data(b)
		case unix.NFTA_SET_ELEM_DATA:
			value = nfnl.Data(b)
		case unix.NFTA_SET_ELEM_EXPIRATION:
			if len(b) == 8 {
				left = time.Duration(binary.BigEndian.Uint64(b)) * time.Millisecond
			}
		}
	})
	return key, value, left
}

func keyOf(b []byte) (k cone.Key, ok bool) {
	if len(b) != keyLen {
		return k, false
	}
	k.Peer, k.Ext = cone.AddrFrom4([4]byte(b)), endpoint(b[4:])
	return k, true
}

func endpoint(b []byte) cone.Endpoint {
	return cone.Endpoint{Addr: cone.AddrFrom4([4]byte(b)), Port: binary.BigEndian.Uint16(b[4:])}
}

// Key returns the key among the attributes of an element.
func Key(b []byte) []byte {
	key, _, _ := elementParts(b)
	return key
}
