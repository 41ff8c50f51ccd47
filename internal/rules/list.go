//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// List calls f for every permission in the map, granted or learned, with the
// time that it has left. What comes or goes meanwhile may be missing. It has a
// connection of its own.
func (m *Map) List(f func(p cone.Permission, left time.Duration)) error {
	marks := map[cone.Key]uint32{}
	err := dump(m.netns, m.table, marksMap, func(key, value []byte, _ time.Duration) {
		if k, ok := keyOf(key); ok && len(value) == markLen {
			marks[k] = binary.NativeEndian.Uint32(value)
		}
	})
	if err != nil {
		return err
	}
	var found halves
	for _, set := range []string{portMap, permissionMap} {
		if err := dumpElements(m.netns, m.table, set, found.add); err != nil {
			return err
		}
	}
	found.each(func(p cone.Permission, left time.Duration) {
		p.Mark = marks[p.Key]
		p.Wild = m.wild(p.Peer)
		f(p, left)
	})
	return nil
}

// halves puts permissions together from the elements of the map of inside addresses and
// the one of inside ports. The zero value is ready for use.
type halves struct {
	ports map[cone.Key]uint16
	addrs map[cone.Key]timedAddr
}

type timedAddr struct {
	addr cone.Addr
	left time.Duration
}

// add takes in an element of either map. It skips what it does not know.
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

// each calls f for every permission of which both halves are there.
func (h *halves) each(f func(p cone.Permission, left time.Duration)) {
	for k, a := range h.addrs {
		if port, ok := h.ports[k]; ok {
			f(cone.Permission{Key: k, Int: cone.Endpoint{Addr: a.addr, Port: port}}, a.left)
		}
	}
}

// PeerGroups lists the peer groups that the tables hold, whatever configuration they
// are from. It has a connection of its own.
func (t *Tables) PeerGroups() (groups []netip.Prefix, err error) {
	for bits := 1; bits < 32 && err == nil; bits++ {
		err = dump(t.netns, t.name, groupsName(bits), func(key, _ []byte, _ time.Duration) {
			if a, ok := netip.AddrFromSlice(key); ok {
				groups = append(groups, netip.PrefixFrom(a, bits))
			}
		})
	}
	return groups, err
}

// dump calls f for every element of a set, by a connection of its own: for some twice
// where the list was interrupted. Where there is no such set it does nothing.
func dump(netns int, table, set string, f func(key, value []byte, left time.Duration)) error {
	return dumpElements(netns, table, set, func(b []byte) { f(elementParts(b)) })
}

// dumpElements is dump, and calls f with the attributes of each element.
func dumpElements(netns int, table, set string, f func(b []byte)) error {
	return dumpOfFamily(netns, unix.AF_INET, table, set, f)
}

func dumpOfFamily(netns int, family byte, table, set string, f func(b []byte)) error {
	c, err := nfnl.Dial(netns)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	var refused error
	err = nfnl.Whole(func() error {
		var e nfnl.Encoder
		e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSETELEM, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, c.NextSeq(1), family)
		e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, table)
		e.Str(unix.NFTA_SET_ELEM_LIST_SET, set)
		e.End()
		return c.Exchange(&e, func(_ uint32, err error) { refused = err }, func(_ uint16, body []byte) {
			eachElement(body, f)
		})
	})
	if err == nil && !errors.Is(refused, unix.ENOENT) { // else the table is not there
		err = refused
	}
	if err != nil {
		return fmt.Errorf("list set %s: %w", set, nfnl.Permitted(err))
	}
	return nil
}

const nfgenmsgLen = 4

// eachElement calls f for every element in a message of a dump.
func eachElement(body []byte, f func(b []byte)) {
	if len(body) < nfgenmsgLen {
		return
	}
	attributes(body[nfgenmsgLen:], func(typ uint16, b []byte) {
		if typ == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			attributes(b, func(_ uint16, b []byte) { f(b) })
		}
	})
}

// elementParts reads one element. It skips what it does not know.
func elementParts(b []byte) (key, value []byte, left time.Duration) {
	attributes(b, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			key = data(b)
		case unix.NFTA_SET_ELEM_DATA:
			value = data(b)
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

// data returns the value in an attribute of a key or of data.
func data(b []byte) (value []byte) {
	attributes(b, func(typ uint16, b []byte) {
		if typ == unix.NFTA_DATA_VALUE {
			value = b
		}
	})
	return value
}

// attributes calls f for each attribute in b, as far as b is well formed.
func attributes(b []byte, f func(typ uint16, b []byte)) {
	const header, mask = 4, 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
	for len(b) >= header {
		n := int(binary.NativeEndian.Uint16(b))
		if n < header || n > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&mask, b[header:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}
