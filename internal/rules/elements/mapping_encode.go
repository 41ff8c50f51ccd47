package elements

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// perMapping is the maximum number of messages for a mapping, perSource that of those that a Move adds.
const (
	perMapping = 16
	perSource  = 4
)

// An encoding appends messages about elements, one after another.
type encoding struct {
	*Mappings
	seq uint32
}

// put appends a message about the element of the endpoint in m.key, with the first bytes of m.value.
// With excl the kernel refuses an element that exists.
func (e *encoding) put(typ uint16, excl bool, set string, value int, timeout time.Duration) {
	e.element(e.seq, typ, excl, set, endpointLen, value, timeout)
	e.seq++
}

// refresh replaces an element, whether it exists or not.
func (e *encoding) refresh(set string, value int, timeout time.Duration) {
	e.put(unix.NFT_MSG_NEWSETELEM, false, set, value, timeout)
	e.put(unix.NFT_MSG_DELSETELEM, false, set, 0, 0)
	e.put(unix.NFT_MSG_NEWSETELEM, false, set, value, timeout)
}

// kept reports whether the outside port is the inside port.
func (p *Mapping) kept() bool { return p.Int.Port == p.Ext.Port }

// setsOf returns the names of the sets of p's link. For an unknown link it returns names
// that the kernel refuses.
func (m *Mappings) setsOf(p *Mapping) *LinkSets {
	if l := m.links[p.Link]; l != nil {
		return l
	}
	return &unknownLink
}

var unknownLink = LinkSets{Kept: "unknown", Moved: "unknown", Ports: "unknown"}

// inside and outside write m.key; host and port write m.value and return its length.
func (m *Mappings) inside(p *Mapping)    { putEndpoint(m.key[:], p.Int) }
func (m *Mappings) outside(p *Mapping)   { putEndpoint(m.key[:], p.Ext) }
func (m *Mappings) host(a cone.Addr) int { return copy(m.value[:], a[12:]) }
func (m *Mappings) port(e cone.Endpoint) int {
	binary.BigEndian.PutUint16(m.value[:], e.Port)
	return portLen
}

func (m *Mappings) add(seq uint32, p *Mapping) {
	e, l := encoding{m, seq}, m.setsOf(p)
	m.inside(p)
	stands, other := l.Kept, l.Moved
	if !p.kept() {
		stands, other = other, stands
	}
	// This fails if the other map has the key.
	e.put(unix.NFT_MSG_NEWSETELEM, true, other, m.host(p.Ext.Addr), time.Second)
	e.put(unix.NFT_MSG_DELSETELEM, false, other, 0, 0)
	e.put(unix.NFT_MSG_NEWSETELEM, true, stands, m.host(p.Ext.Addr), m.lifetime)
	if !p.kept() {
		e.refresh(l.Ports, m.port(p.Ext), m.lifetime)
	}
	m.outside(p)
	e.put(unix.NFT_MSG_NEWSETELEM, true, OwnedSet, 0, m.lifetime+OwnedLonger)
	m.ownedBy(&e, p)
}

// move ends the mapping on its link, and adds it on the other one.
func (m *Mappings) move(seq uint32, x *Move) {
	e, l := encoding{m, seq}, m.setsOf(&x.Mapping)
	m.inside(&x.Mapping)
	if x.kept() {
		e.put(unix.NFT_MSG_DELSETELEM, false, l.Kept, 0, 0)
	} else {
		e.put(unix.NFT_MSG_DELSETELEM, false, l.Moved, 0, 0)
		e.put(unix.NFT_MSG_DELSETELEM, false, l.Ports, 0, 0)
	}
	m.outside(&x.Mapping)
	e.put(unix.NFT_MSG_NEWSETELEM, false, OwnedSet, 0, m.lifetime+OwnedLonger)
	e.put(unix.NFT_MSG_DELSETELEM, false, OwnedSet, 0, 0)
	moved := x.moved()
	m.add(e.seq, &moved)
}

// ownedBy records the owner of p's outside endpoint, if owners are recorded.
func (m *Mappings) ownedBy(e *encoding, p *Mapping) {
	if m.owners {
		e.refresh(OwnersMap, m.host(p.Int.Addr), m.lifetime+OwnedLonger)
		e.refresh(OwnerPortsMap, m.port(p.Int), m.lifetime+OwnedLonger)
	}
}

func (m *Mappings) renew(seq uint32, p *Mapping) {
	e, l := encoding{m, seq}, m.setsOf(p)
	m.inside(p)
	stands := l.Kept
	if !p.kept() {
		stands = l.Moved
	}
	e.put(unix.NFT_MSG_DELSETELEM, false, stands, 0, 0)
	e.put(unix.NFT_MSG_NEWSETELEM, false, stands, m.host(p.Ext.Addr), m.lifetime)
	if !p.kept() {
		e.refresh(l.Ports, m.port(p.Ext), m.lifetime)
	}
	m.outside(p)
	e.refresh(OwnedSet, 0, m.lifetime+OwnedLonger)
	m.ownedBy(&e, p)
}

func (m *Mappings) take(seq uint32, f *Taken) {
	putPort(m.key[:], f.Port)
	putEndpoint(m.key[4:], f.Remote)
	for i, typ := range []uint16{unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM} {
		m.element(seq+uint32(i), typ, false, TakenSet, takenKeyLen, 0, m.keptFor)
	}
}

// Lengths of keys and values. Each part of a key is padded to a register's 4 bytes.
const (
	addressLen  = 4
	portLen     = 2
	endpointLen = addressLen + 4
	takenKeyLen = endpointLen + 4
)

func putEndpoint(b []byte, e cone.Endpoint) {
	copy(b, e.Addr[12:])
	putPort(b[4:], e.Port)
}

// putPort writes a port, padded to a register's 4 bytes.
func putPort(b []byte, port uint16) { binary.BigEndian.PutUint32(b, uint32(port)<<16) }

// element appends a message about the element in the first bytes of m.key and m.value. With
// excl the kernel refuses an element that exists. With timeout 0 the element never expires.
func (m *Mappings) element(seq uint32, typ uint16, excl bool, set string, key, value int, timeout time.Duration) {
	flags := uint16(0)
	if excl {
		flags = unix.NLM_F_EXCL
	}
	list, element := m.openElement(set, seq, typ, flags)
	m.data(unix.NFTA_SET_ELEM_KEY, m.key[:key])
	if typ == unix.NFT_MSG_NEWSETELEM && value > 0 {
		m.data(unix.NFTA_SET_ELEM_DATA, m.value[:value])
	}
	m.closeElement(list, element, typ, timeout)
}
