package gateway

import (
	"encoding/binary"
	"fmt"
	"iter"
	"maps"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// A PortSet holds the endpoints at which local UDP sockets received packets from outside
// links at one time: from anybody, or from the peer to which they were connected. It may be
// read from any goroutine.
type PortSet struct {
	bound     map[cone.Endpoint]struct{}
	connected map[cone.Key]struct{}
}

var any4, any6 = cone.AddrFrom4([4]byte{}), cone.Addr{}

// Serves reports whether a socket was bound to ext, or to its port on all
// addresses. Connected sockets do not count.
func (p *PortSet) Serves(ext cone.Endpoint) bool {
	if _, ok := p.bound[ext]; ok {
		return true
	}
	wildcard := any6
	if ext.Addr.Is4() {
		wildcard = any4
	}
	_, ok := p.bound[cone.Endpoint{Addr: wildcard, Port: ext.Port}]
	return ok
}

// Takes is Sockets.Takes for the sockets in p.
func (p *PortSet) Takes(ext, in cone.Endpoint) bool {
	if ext == in || !p.Serves(ext) {
		return false
	}
	_, there := p.bound[ext]
	_, other := p.bound[in]
	return ext.Port != in.Port || there || other
}

// Connected returns the endpoints of connected sockets with their peers, as Keys of
// permissions. The caller must not change the map.
func (p *PortSet) Connected() map[cone.Key]struct{} { return p.connected }

// All returns the endpoints that sockets were bound to, in any order, including those for
// all addresses.
func (p *PortSet) All() iter.Seq[cone.Endpoint] { return maps.Keys(p.bound) }

// Stay returns what is in both p and old.
func (p *PortSet) Stay(old *PortSet) *PortSet {
	return &PortSet{both(p.bound, old.bound), both(p.connected, old.connected)}
}

// Either returns what is in p or in old.
func (p *PortSet) Either(old *PortSet) *PortSet {
	all := &PortSet{maps.Clone(p.bound), maps.Clone(p.connected)}
	maps.Copy(all.bound, old.bound)
	maps.Copy(all.connected, old.connected)
	return all
}

func both[K comparable](a, b map[K]struct{}) map[K]struct{} {
	in := maps.Clone(a)
	maps.DeleteFunc(in, func(k K, _ struct{}) bool {
		_, is := b[k]
		return !is
	})
	return in
}

// Equal reports whether p and q hold the same.
func (p *PortSet) Equal(q *PortSet) bool {
	return maps.Equal(p.bound, q.bound) && maps.Equal(p.connected, q.connected)
}

// Ports reads all UDP sockets, to compare many permissions with them. It may miss a socket
// that is opened or closed meanwhile. 10,000 sockets cost some milliseconds.
func (s *Sockets) Ports() (*PortSet, error) {
	p := &PortSet{map[cone.Endpoint]struct{}{}, map[cone.Key]struct{}{}}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		diagRequest(s.conn.begin(unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP, diagSize), family)
		err := s.conn.exchange(func(b []byte) error { return p.add(b, s.hears) })
		if err != nil {
			return nil, fmt.Errorf("read UDP sockets: %w", err)
		}
	}
	return p, nil
}

// From linux/inet_diag.h.
const (
	sizeofInetDiagMsg = 72
	inetDiagIf        = 40
	inetDiagSKV6Only  = 11
)

// add decodes a struct inet_diag_msg with attributes. It skips a socket that is bound
// to a device for which hears returns false.
func (p *PortSet) add(b []byte, hears func(link uint32) bool) error {
	if len(b) < sizeofInetDiagMsg {
		return nfnl.ErrMalformed
	}
	if link := binary.NativeEndian.Uint32(b[inetDiagIf:]); link != 0 && !hears(link) {
		return nil
	}
	e, peer := endpointOf(b), cone.Addr(b[24:40])
	if b[0] == unix.AF_INET {
		peer = cone.AddrFrom4([4]byte(b[24:28]))
	}
	if b[1] == unix.BPF_TCP_ESTABLISHED {
		p.connected[cone.Key{Ext: e, Peer: peer}] = struct{}{}
		return nil
	}
	p.bound[e] = struct{}{}
	if e.Addr != any6 {
		return nil
	}
	only6 := false
	err := attributes(b, sizeofInetDiagMsg, func(typ uint16, v []byte) {
		if typ == inetDiagSKV6Only {
			only6 = octet(v) != 0
		}
	})
	if !only6 { // serves IPv4 too
		p.bound[cone.Endpoint{Addr: any4, Port: e.Port}] = struct{}{}
	}
	return err
}

// endpointOf returns what the socket of a struct inet_diag_msg is bound to.
func endpointOf(b []byte) cone.Endpoint {
	e := cone.Endpoint{Addr: cone.Addr(b[8:24]), Port: binary.BigEndian.Uint16(b[4:])}
	if b[0] == unix.AF_INET {
		e.Addr = cone.AddrFrom4([4]byte(b[8:12]))
	}
	return e
}
