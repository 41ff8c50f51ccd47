//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// List calls f for every permission in the map, granted or learned, with the
// time that it has left. What comes or goes meanwhile may be missing. It has a
// connection of its own.
func (m *Map) List(f func(p cone.Permission, left time.Duration)) error {
	c, err := nfnl.Dial(m.netns)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSETELEM, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, c.NextSeq(1), unix.AF_INET)
	e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, m.table)
	e.Str(unix.NFTA_SET_ELEM_LIST_SET, permissionMap)
	e.End()
	var refused error
	err = c.Exchange(&e, func(_ uint32, err error) { refused = err }, func(_ uint16, body []byte) {
		parseElements(body, func(p cone.Permission, left time.Duration) {
			p.Wild = m.wild(p.Peer)
			f(p, left)
		})
	})
	if err == nil && !errors.Is(refused, unix.ENOENT) { // else the table is not there
		err = refused
	}
	if err != nil {
		return fmt.Errorf("list map of permissions: %w", nfnl.Permitted(err))
	}
	return nil
}

const nfgenmsgLen = 4

// parseElements reads a message of a dump.
func parseElements(body []byte, f func(p cone.Permission, left time.Duration)) {
	if len(body) < nfgenmsgLen {
		return
	}
	attributes(body[nfgenmsgLen:], func(typ uint16, b []byte) {
		if typ == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			attributes(b, func(_ uint16, b []byte) {
				if p, left, ok := parseElement(b); ok {
					f(p, left)
				}
			})
		}
	})
}

// parseElement reads one element. It skips what it does not know.
func parseElement(b []byte) (p cone.Permission, left time.Duration, ok bool) {
	key, value, left := elementParts(b)
	if len(key) != keyLen || len(value) != valueLen {
		return p, 0, false
	}
	p.Peer, p.Ext = cone.AddrFrom4([4]byte(key)), endpoint(key[4:])
	p.Int, p.Mark = endpoint(value), binary.NativeEndian.Uint32(value[8:])
	return p, left, true
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
