//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// Mappings are those that the kernel learned. They stand once Tables.Set was told
// to. They may be used beside the Tables; their own methods must not be called at
// the same time, but for List, which may run beside all.
type Mappings struct {
	batcher
	netns      int
	table      string
	lifetime   time.Duration
	keptFor    time.Duration
	key, value [64]byte // of the element that is being encoded
}

// NewMappings returns the Mappings of t.
func (t *Tables) NewMappings(c *MappingConfig) *Mappings {
	m := &Mappings{netns: t.netns, table: t.name, lifetime: c.Lifetime, keptFor: max(keptTimeout, c.KeptFor)}
	m.begin(t.w)
	return m
}

// SetLifetime sets the timeout of what is kept from now on.
func (m *Mappings) SetLifetime(d time.Duration) { m.lifetime = d }

// Keep makes ms stand for another lifetime, those too that do not stand, and calls
// refused with the index of each that cannot: ErrOtherMapping where the inside
// endpoint has another outside endpoint, or that has another owner. A living flow
// that goes by such a mapping has to be told to Take.
//
// It adds them first, which fails for another one's, and then, as an element that
// is added again keeps its timeout before Linux 6.12, it deletes and adds them.
func (m *Mappings) Keep(ms []Mapping, refused func(i int, err error)) {
	for base := 0; base < len(ms); base += batch {
		part := ms[base:min(base+batch, len(ms))]
		clear(m.errs[:])
		transact(&m.batcher, part, 2, m.add)
		for i := range part {
			// In the way may be one of the same batch that was refused itself.
			if conflicts(m.errs[i]) {
				m.alone(part, i)
			}
		}
		transact(&m.batcher, part, 4, m.renew)
		for i := range part {
			switch err := m.errs[i]; {
			case err == nil:
			case conflicts(err):
				refused(base+i, ErrOtherMapping)
			default:
				refused(base+i, fmt.Errorf("add element: %w", nfnl.Permitted(err)))
			}
		}
	}
}

func conflicts(err error) bool { return errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) }

// alone adds the mapping i of ms once more.
func (m *Mappings) alone(ms []Mapping, i int) {
	errs := m.errs
	m.errs[0] = nil
	transact(&m.batcher, ms[i:i+1], 2, m.add)
	errs[i] = m.errs[0]
	m.errs = errs
}

func (m *Mappings) add(seq uint32, p *Mapping) {
	m.mapping(seq, unix.NFT_MSG_NEWSETELEM, p)
	m.owner(seq+1, unix.NFT_MSG_NEWSETELEM, p)
}

func (m *Mappings) renew(seq uint32, p *Mapping) {
	m.remove(seq, p)
	m.disown(seq+1, p)
	m.add(seq+2, p)
}

func (m *Mappings) remove(seq uint32, p *Mapping) { m.mapping(seq, unix.NFT_MSG_DELSETELEM, p) }
func (m *Mappings) disown(seq uint32, p *Mapping) { m.owner(seq, unix.NFT_MSG_DELSETELEM, p) }

// Revoke ends ms. What is gone already is no error. The kernel deletes by key:
// whoever has it. Living flows keep their outside endpoints.
func (m *Mappings) Revoke(ms []Mapping) error {
	var errs []error
	for base := 0; base < len(ms); base += batch {
		part := ms[base:min(base+batch, len(ms))]
		// Apart, for one may be gone.
		for _, owned := range []bool{false, true} {
			clear(m.errs[:])
			if owned {
				transact(&m.batcher, part, 1, m.disown)
			} else {
				transact(&m.batcher, part, 1, m.remove)
			}
			for i := range part {
				if err := m.errs[i]; err != nil && !errors.Is(err, unix.ENOENT) {
					errs = append(errs, fmt.Errorf("delete mapping %v: %w", part[i].Int, nfnl.Permitted(err)))
				}
			}
		}
	}
	return errors.Join(errs...)
}

// Take keeps mappings from being used towards the remote endpoints of flows that
// have none, for MappingConfig.KeptFor.
func (m *Mappings) Take(flows []Taken) error {
	var refused int
	var first error
	for base := 0; base < len(flows); base += batch {
		part := flows[base:min(base+batch, len(flows))]
		clear(m.errs[:])
		transact(&m.batcher, part, 3, m.take)
		for _, err := range m.errs[:len(part)] {
			if err != nil {
				refused++
				first = cmp.Or(first, err)
			}
		}
	}
	if refused > 0 {
		return fmt.Errorf("add %d of %d elements: %w", refused, len(flows), nfnl.Permitted(first))
	}
	return nil
}

func (m *Mappings) take(seq uint32, f *Taken) {
	putPort(m.key[:], f.Port)
	putEndpoint(m.key[4:], f.Remote)
	for i, typ := range []uint16{unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM} {
		m.element(seq+uint32(i), typ, takenSet, takenKeyLen, 0, m.keptFor)
	}
}

// Teach tells the kernel which outside addresses the user's rules gave to the hosts
// of living flows: a newcomer gets its port of the pool on the same one.
func (m *Mappings) Teach(ms []Mapping) error {
	var hints []hint
	seen := make(map[hint]struct{})
	add := func(h hint) bool {
		_, old := seen[h]
		if !old {
			seen[h] = struct{}{}
			hints = append(hints, h)
		}
		return !old
	}
	addresses := make(map[LinkID]int)
	for _, p := range ms {
		add(hint{p.Link, p.Int.Addr, p.Ext.Addr})
		if add(hint{link: p.Link, ext: p.Ext.Addr}) {
			addresses[p.Link]++
		}
	}
	var errs []error
	for base := 0; base < len(hints); base += batch {
		part := hints[base:min(base+batch, len(hints))]
		clear(m.errs[:])
		for _, renew := range []bool{false, true} { // see Keep
			transact(&m.batcher, part, 4, func(seq uint32, h *hint) { m.hint(seq, h, addresses[h.link] > 1, renew) })
		}
		for _, err := range m.errs[:len(part)] {
			// Another address for the same host: the kernel's own is newer.
			if err != nil && !conflicts(err) {
				errs = append(errs, fmt.Errorf("add element: %w", nfnl.Permitted(err)))
			}
		}
	}
	return errors.Join(errs...)
}

// A hint is the outside address of a host on a link, or, without a host, one of
// those of the link.
type hint struct {
	link    LinkID
	in, ext cone.Addr
}

func (m *Mappings) hint(seq uint32, h *hint, several, renew bool) {
	key := func(a []byte) {
		binary.NativeEndian.PutUint32(m.key[:], uint32(h.link))
		copy(m.key[linkLen:], a)
	}
	clear(m.value[:4])
	copy(m.value[4:], h.ext[12:])
	put := func(set string, value int, timeout time.Duration) {
		if renew {
			m.element(seq, unix.NFT_MSG_DELSETELEM, set, hostKeyLen, 0, 0)
			seq++
		}
		m.element(seq, unix.NFT_MSG_NEWSETELEM, set, hostKeyLen, value, timeout)
		seq++
	}
	const valueLen = 8
	nobody := [4]byte{}
	switch {
	case h.in != (cone.Addr{}):
		key(h.in[12:])
		put(addressesMap, valueLen, addressTimeout)
		return
	case several:
		key(nobody[:])
		put(translatedSet, 0, addressTimeout)
	default:
		key(nobody[:])
		put(addressesMap, valueLen, addressTimeout)
	}
	key(h.ext[12:])
	put(translatedSet, 0, addressTimeout+ownedLonger)
}

// List calls f for every mapping, with the time that it has left. What comes or
// goes meanwhile may be missing. It has a connection of its own.
func (m *Mappings) List(f func(p Mapping, left time.Duration)) error {
	return dump(m.netns, m.table, mappingsMap, func(key, value []byte, left time.Duration) {
		if len(key) == mappingsKeyLen && len(value) == mappingsValueLen {
			f(Mapping{Link: LinkID(binary.NativeEndian.Uint32(key)), Int: endpoint(key[linkLen:]), Ext: endpoint(value[4:])}, left)
		}
	})
}

// Forget ends all mappings to an outside address that is none any more, and
// forgets which hosts had it. The zero address stands for all. It does not end
// the flows: unlike those that MASQUERADE translated, the kernel keeps them when
// the address goes. They teach no mapping for ten seconds, in which they have to be
// ended, or until Return.
func (m *Mappings) Forget(addr netip.Addr) error {
	var ms []Mapping
	var err error
	if addr.Is4() {
		err = m.gone(addr, unix.NFT_MSG_NEWSETELEM)
	}
	err = errors.Join(err, m.List(func(p Mapping, _ time.Duration) {
		if !addr.IsValid() || p.Ext.Addr.Netip() == addr {
			ms = append(ms, p)
		}
	}))
	var gone []setElement
	matches := func(b []byte) bool {
		a, _ := netip.AddrFromSlice(b)
		return !addr.IsValid() || a == addr
	}
	collect := func(set string, ext func(key, value []byte) []byte) error {
		return dump(m.netns, m.table, set, func(key, value []byte, _ time.Duration) {
			if len(key) != hostKeyLen {
				return
			}
			// That there are several addresses is not known any more either.
			several := set == translatedSet && binary.BigEndian.Uint32(key[linkLen:]) == 0
			if b := ext(key, value); several || len(b) == 4 && matches(b) {
				gone = append(gone, setElement{set, bytes.Clone(key)})
			}
		})
	}
	err = errors.Join(err, m.Revoke(ms),
		collect(translatedSet, func(key, _ []byte) []byte { return key[linkLen:] }),
		collect(addressesMap, func(_, value []byte) []byte { return value[4:] }),
		collect(moversMap, func(_, value []byte) []byte { return value[4:] }))
	for base := 0; base < len(gone); base += batch {
		part := gone[base:min(base+batch, len(gone))]
		clear(m.errs[:])
		transact(&m.batcher, part, 1, func(seq uint32, e *setElement) {
			m.element(seq, unix.NFT_MSG_DELSETELEM, e.set, copy(m.key[:], e.key), 0, 0)
		})
		for _, e := range m.errs[:len(part)] {
			if e != nil && !errors.Is(e, unix.ENOENT) {
				err = errors.Join(err, fmt.Errorf("delete element: %w", nfnl.Permitted(e)))
			}
		}
	}
	return err
}

// Return lets the flows of an outside address that is there teach mappings again.
func (m *Mappings) Return(addr netip.Addr) error { return m.gone(addr, unix.NFT_MSG_DELSETELEM) }

func (m *Mappings) gone(addr netip.Addr, typ uint16) error {
	clear(m.errs[:1])
	transact(&m.batcher, []netip.Addr{addr}, 1, func(seq uint32, a *netip.Addr) {
		m.element(seq, typ, goneSet, copy(m.key[:], a.AsSlice()), 0, goneTimeout)
	})
	if err := m.errs[0]; err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("change set %s: %w", goneSet, nfnl.Permitted(err))
	}
	return nil
}

type setElement struct {
	set string
	key []byte
}

// Lengths of keys and values, each part filled up to a register's 4 bytes.
const (
	linkLen          = 4
	hostKeyLen       = linkLen + 4
	mappingsKeyLen   = linkLen + 8
	mappingsValueLen = 12
	ownedKeyLen      = 8
	ownedValueLen    = 4 + mappingsKeyLen
	takenKeyLen      = ownedKeyLen + 4
)

// mapping and owner append a message about an element of either map.
func (m *Mappings) mapping(seq uint32, typ uint16, p *Mapping) {
	putInside(m.key[:], p)
	clear(m.value[:4])
	putEndpoint(m.value[4:], p.Ext)
	m.element(seq, typ, mappingsMap, mappingsKeyLen, mappingsValueLen, m.lifetime)
}

func (m *Mappings) owner(seq uint32, typ uint16, p *Mapping) {
	putEndpoint(m.key[:], p.Ext)
	clear(m.value[:4])
	putInside(m.value[4:], p)
	m.element(seq, typ, ownedMap, ownedKeyLen, ownedValueLen, m.lifetime+ownedLonger)
}

func putInside(b []byte, p *Mapping) {
	binary.NativeEndian.PutUint32(b, uint32(p.Link))
	putEndpoint(b[linkLen:], p.Int)
}

func putEndpoint(b []byte, e cone.Endpoint) {
	copy(b, e.Addr[12:])
	putPort(b[4:], e.Port)
}

// putPort fills a register.
func putPort(b []byte, port uint16) { binary.BigEndian.PutUint32(b, uint32(port)<<16) }

// element appends a message about the element with the first bytes of m.key and
// m.value.
func (m *Mappings) element(seq uint32, typ uint16, set string, key, value int, timeout time.Duration) {
	flags, isNew := uint16(unix.NLM_F_REQUEST), typ == unix.NFT_MSG_NEWSETELEM
	if isNew {
		flags |= unix.NLM_F_CREATE
	}
	e := &m.enc
	e.Message(unix.NFNL_SUBSYS_NFTABLES, typ, flags, seq, unix.AF_INET)
	e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, m.table)
	e.Str(unix.NFTA_SET_ELEM_LIST_SET, set)
	list := e.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	element := e.Nest(unix.NFTA_LIST_ELEM)
	m.data(unix.NFTA_SET_ELEM_KEY, m.key[:key])
	if isNew && value > 0 {
		m.data(unix.NFTA_SET_ELEM_DATA, m.value[:value])
	}
	if isNew {
		e.BE64(unix.NFTA_SET_ELEM_TIMEOUT, uint64(timeout.Milliseconds()))
	}
	e.EndNest(element)
	e.EndNest(list)
	e.End()
}

func (m *Mappings) data(typ uint16, b []byte) {
	e := &m.enc
	nest := e.Nest(typ)
	e.Attr(unix.NFTA_DATA_VALUE, len(b))
	e.B = append(e.B, b...)
	e.Pad()
	e.EndNest(nest)
}
