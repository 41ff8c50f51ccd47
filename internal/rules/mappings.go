//go:build !(386 || arm || mips || mipsle)

package rules

import (
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
	links      map[string]*linkSets
	owners     bool // there is hairpinning
	keptFor    time.Duration
	key, value [64]byte // of the element that is being encoded
}

// linkSets are the names of the sets of a link.
type linkSets struct {
	link, kept, moved, ports, addresses, translated, several string
}

// NewMappings returns the Mappings that Set was told of.
func (t *Tables) NewMappings(c *MappingConfig) *Mappings {
	m := &Mappings{
		netns: t.netns, table: t.name, lifetime: c.Lifetime, keptFor: max(keptTimeout, c.KeptFor),
		links: map[string]*linkSets{}, owners: t.mapped.hairpin,
	}
	for _, link := range t.mapped.links {
		id := identifier(link)
		m.links[link] = &linkSets{
			link: link, kept: keptMap + id, moved: movedMap + id, ports: portsMap + id,
			addresses: addressesMap + id, translated: translatedSet + id, several: severalSet + id,
		}
	}
	m.begin(t.w)
	return m
}

// mapped is what Set made for mappings.
type mapped struct {
	links   []string // that have sets
	hairpin bool
}

func mappedOf(d *Desired) (m mapped) {
	if d.Mapping != nil {
		m = mapped{links: d.Mapping.links(d.OutsideLinks), hairpin: len(d.Mapping.Hairpin) > 0}
	}
	return m
}

// SetLifetime sets the timeout of what is kept from now on.
func (m *Mappings) SetLifetime(d time.Duration) { m.lifetime = d }

// Keep makes ms stand for another lifetime. One that stands no more it adds. It calls
// refused as Add does.
//
// An element that is added again keeps its timeout before Linux 6.12, so it is deleted
// and added, which no packet notices.
func (m *Mappings) Keep(ms []Mapping, refused func(i int, err error)) {
	for base := 0; base < len(ms); base += batch {
		part := ms[base:min(base+batch, len(ms))]
		clear(m.errs[:])
		transact(&m.batcher, part, perMapping, m.renew)
		m.addRefused(part, base, refused)
	}
}

// Add makes ms stand, and calls refused with the index of each that cannot:
// ErrOtherMapping where the inside endpoint has a mapping already, or the outside
// endpoint an owner. A living flow that goes by such a mapping has to be told to Take.
func (m *Mappings) Add(ms []Mapping, refused func(i int, err error)) {
	for base := 0; base < len(ms); base += batch {
		part := ms[base:min(base+batch, len(ms))]
		clear(m.errs[:])
		transact(&m.batcher, part, perMapping, m.add)
		m.addRefused(part, base, refused)
	}
}

// addRefused adds those that were refused, one by one: in the way may have been one of
// the same batch that was refused itself.
func (m *Mappings) addRefused(part []Mapping, base int, refused func(i int, err error)) {
	for i := range part {
		if m.errs[i] == nil {
			continue
		}
		if conflicts(m.errs[i]) || errors.Is(m.errs[i], unix.ENOENT) && m.links[part[i].Link] != nil {
			m.alone(part, i)
		}
		switch err := m.errs[i]; {
		case err == nil:
		case conflicts(err):
			refused(base+i, ErrOtherMapping)
		default:
			refused(base+i, fmt.Errorf("add element: %w", nfnl.Permitted(err)))
		}
	}
}

func conflicts(err error) bool { return errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) }

// alone adds the mapping i of ms once more.
func (m *Mappings) alone(ms []Mapping, i int) {
	errs := m.errs
	m.errs[0] = nil
	transact(&m.batcher, ms[i:i+1], perMapping, m.add)
	errs[i] = m.errs[0]
	m.errs = errs
}

// perMapping is the most messages for a mapping.
const perMapping = 16

// An encoding appends messages about elements, one after another.
type encoding struct {
	*Mappings
	seq uint32
}

// put appends a message about the element with the first bytes of m.key and m.value.
// With excl it must not be there.
func (e *encoding) put(typ uint16, excl bool, set string, key, value int, timeout time.Duration) {
	e.element(e.seq, typ, excl, set, key, value, timeout)
	e.seq++
}

// refresh makes an element anew, whether it is there or not.
func (e *encoding) refresh(set string, value int, timeout time.Duration) {
	e.put(unix.NFT_MSG_NEWSETELEM, false, set, endpointLen, value, timeout)
	e.put(unix.NFT_MSG_DELSETELEM, false, set, endpointLen, 0, 0)
	e.put(unix.NFT_MSG_NEWSETELEM, false, set, endpointLen, value, timeout)
}

// kept reports whether the port stays the same.
func (p *Mapping) kept() bool { return p.Int.Port == p.Ext.Port }

// setsOf returns the names of the sets of p's link. Without any the kernel refuses all.
func (m *Mappings) setsOf(p *Mapping) *linkSets {
	if l := m.links[p.Link]; l != nil {
		return l
	}
	return &unknownLink
}

var unknownLink = linkSets{kept: "unknown", moved: "unknown", ports: "unknown"}

// inside and outside make the key, and host and port the value.
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
	stands, other := l.kept, l.moved
	if !p.kept() {
		stands, other = other, stands
	}
	// It fails where the other map has it.
	e.put(unix.NFT_MSG_NEWSETELEM, true, other, endpointLen, m.host(p.Ext.Addr), time.Second)
	e.put(unix.NFT_MSG_DELSETELEM, false, other, endpointLen, 0, 0)
	e.put(unix.NFT_MSG_NEWSETELEM, true, stands, endpointLen, m.host(p.Ext.Addr), m.lifetime)
	if !p.kept() {
		e.refresh(l.ports, m.port(p.Ext), m.lifetime)
	}
	m.outside(p)
	e.put(unix.NFT_MSG_NEWSETELEM, true, ownedSet, endpointLen, 0, m.lifetime+ownedLonger)
	m.ownedBy(&e, p)
}

// ownedBy says whose the outside endpoint is.
func (m *Mappings) ownedBy(e *encoding, p *Mapping) {
	if m.owners {
		e.refresh(ownersMap, m.host(p.Int.Addr), m.lifetime+ownedLonger)
		e.refresh(ownerPortsMap, m.port(p.Int), m.lifetime+ownedLonger)
	}
}

func (m *Mappings) renew(seq uint32, p *Mapping) {
	e, l := encoding{m, seq}, m.setsOf(p)
	m.inside(p)
	stands := l.kept
	if !p.kept() {
		stands = l.moved
	}
	e.put(unix.NFT_MSG_DELSETELEM, false, stands, endpointLen, 0, 0)
	e.put(unix.NFT_MSG_NEWSETELEM, false, stands, endpointLen, m.host(p.Ext.Addr), m.lifetime)
	if !p.kept() {
		e.refresh(l.ports, m.port(p.Ext), m.lifetime)
	}
	m.outside(p)
	e.refresh(ownedSet, 0, m.lifetime+ownedLonger)
	m.ownedBy(&e, p)
}

// Revoke ends ms. What is gone already is no error. The kernel deletes by key:
// whoever has it. Living flows keep their outside endpoints.
func (m *Mappings) Revoke(ms []Mapping) error {
	err := errors.Join(m.Release(ms), m.disown(ms, ownedSet))
	if m.owners {
		err = errors.Join(err, m.disown(ms, ownersMap), m.disown(ms, ownerPortsMap))
	}
	return err
}

func (m *Mappings) disown(ms []Mapping, set string) error {
	return m.remove(ms, func(p *Mapping) string { m.outside(p); return set })
}

// Release ends ms, and leaves their outside endpoints to others that own them too.
func (m *Mappings) Release(ms []Mapping) error {
	return errors.Join(
		m.remove(ms, func(p *Mapping) string {
			m.inside(p)
			if p.kept() {
				return m.setsOf(p).kept
			}
			return m.setsOf(p).moved
		}),
		m.remove(ms, func(p *Mapping) string {
			m.inside(p)
			if p.kept() {
				return ""
			}
			return m.setsOf(p).ports
		}))
}

// remove deletes an element for each of ms: element makes its key, and returns its set,
// if any.
func (m *Mappings) remove(ms []Mapping, element func(p *Mapping) string) error {
	var errs []error
	for base := 0; base < len(ms); base += batch {
		part := ms[base:min(base+batch, len(ms))]
		clear(m.errs[:])
		transact(&m.batcher, part, 1, func(seq uint32, p *Mapping) {
			if set := element(p); set != "" {
				m.element(seq, unix.NFT_MSG_DELSETELEM, false, set, endpointLen, 0, 0)
			}
		})
		for i := range part {
			if err := m.errs[i]; err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("delete mapping %v: %w", part[i].Int, nfnl.Permitted(err)))
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
		m.element(seq+uint32(i), typ, false, takenSet, takenKeyLen, 0, m.keptFor)
	}
}

// Teach tells the kernel which outside addresses the user's rules gave to the hosts
// of living flows: a newcomer gets its port of the pool on the same one.
func (m *Mappings) Teach(ms []Mapping) error {
	byLink := map[*linkSets][]Mapping{}
	for _, p := range ms {
		if l := m.links[p.Link]; l != nil {
			byLink[l] = append(byLink[l], p)
		}
	}
	var errs []error
	for l, ms := range byLink {
		errs = append(errs, m.teach(l, ms))
	}
	return errors.Join(errs...)
}

func (m *Mappings) teach(l *linkSets, ms []Mapping) error {
	nobody := cone.AddrFrom4([4]byte{})
	known := map[cone.Addr]struct{}{nobody: {}} // the outside addresses
	err := dump(m.netns, m.table, l.translated, func(key, _ []byte, _ time.Duration) {
		if len(key) == addressLen {
			known[cone.AddrFrom4([4]byte(key))] = struct{}{}
		}
	})
	if err != nil {
		return err
	}
	old := len(known)
	hosts := map[cone.Addr]cone.Addr{}
	for _, p := range ms {
		known[p.Ext.Addr] = struct{}{}
		hosts[p.Int.Addr] = p.Ext.Addr
	}
	var es []setElement
	if len(known) > old || old == 1 {
		es = append(es, setElement{set: l.addresses, key: nobody, value: ms[0].Ext.Addr, isMap: true})
		for a := range known {
			es = append(es, setElement{set: l.translated, key: a})
		}
	}
	if len(known) > 2 {
		es = append(es, setElement{set: l.several, key: nobody})
		for in, ext := range hosts {
			es = append(es, setElement{set: l.addresses, key: in, value: ext, isMap: true, timeout: addressTimeout})
		}
	}
	return m.addElements(es)
}

// A setElement is one of a set of addresses.
type setElement struct {
	set        string
	key, value cone.Addr
	isMap      bool
	timeout    time.Duration // 0 for ever
}

// addElements adds es, or refreshes those that are there with the same value.
func (m *Mappings) addElements(es []setElement) error {
	var errs []error
	for base := 0; base < len(es); base += batch {
		part := es[base:min(base+batch, len(es))]
		clear(m.errs[:])
		transact(&m.batcher, part, 3, func(seq uint32, x *setElement) {
			copy(m.key[:], x.key[12:])
			value := 0
			if x.isMap {
				value = m.host(x.value)
			}
			for i, typ := range []uint16{unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM} {
				m.element(seq+uint32(i), typ, false, x.set, addressLen, value, x.timeout)
			}
		})
		for _, err := range m.errs[:len(part)] {
			// Another address for the same host: the kernel's own is newer.
			if err != nil && !conflicts(err) {
				errs = append(errs, fmt.Errorf("add element: %w", nfnl.Permitted(err)))
			}
		}
	}
	return errors.Join(errs...)
}

// List calls f for every mapping, with the time that it has left. What comes or
// goes meanwhile may be missing. It has a connection of its own.
func (m *Mappings) List(f func(p Mapping, left time.Duration)) error {
	var errs []error
	for _, l := range m.links {
		errs = append(errs, m.list(l, f))
	}
	return errors.Join(errs...)
}

func (m *Mappings) list(l *linkSets, f func(p Mapping, left time.Duration)) error {
	ports := map[cone.Endpoint]uint16{}
	err := dump(m.netns, m.table, l.ports, func(key, value []byte, _ time.Duration) {
		if len(key) == endpointLen && len(value) == portLen {
			ports[endpoint(key)] = binary.BigEndian.Uint16(value)
		}
	})
	address := func(port func(cone.Endpoint) (uint16, bool)) func(key, value []byte, left time.Duration) {
		return func(key, value []byte, left time.Duration) {
			if len(key) != endpointLen || len(value) != addressLen {
				return
			}
			in := endpoint(key)
			if port, ok := port(in); ok {
				f(Mapping{Link: l.link, Int: in, Ext: cone.Endpoint{Addr: cone.AddrFrom4([4]byte(value)), Port: port}}, left)
			}
		}
	}
	return errors.Join(err,
		dump(m.netns, m.table, l.kept, address(func(in cone.Endpoint) (uint16, bool) { return in.Port, true })),
		dump(m.netns, m.table, l.moved, address(func(in cone.Endpoint) (uint16, bool) { port, ok := ports[in]; return port, ok })))
}

// Forget ends all mappings to an outside address that is none any more, and
// forgets which hosts had it. The zero address stands for all. It does not end
// the flows: unlike those that MASQUERADE translated, the kernel keeps them when
// the address goes. They teach no mapping for ten seconds, in which they have to be
// ended, or until Return.
func (m *Mappings) Forget(addr netip.Addr) error {
	var ms []Mapping
	var errs []error
	if addr.Is4() {
		errs = append(errs, m.gone(addr, unix.NFT_MSG_NEWSETELEM))
	}
	for _, l := range m.links {
		had := !addr.IsValid()
		errs = append(errs, dump(m.netns, m.table, l.translated, func(key, _ []byte, _ time.Duration) {
			a, _ := netip.AddrFromSlice(key)
			had = had || a == addr
		}))
		if had { // which ones there are, the next flows tell
			errs = append(errs, m.empty(l.translated, l.several, l.addresses))
		}
	}
	errs = append(errs, m.List(func(p Mapping, _ time.Duration) {
		if !addr.IsValid() || p.Ext.Addr.Netip() == addr {
			ms = append(ms, p)
		}
	}), m.Revoke(ms))
	return errors.Join(errs...)
}

// empty deletes all elements.
func (m *Mappings) empty(sets ...string) error {
	clear(m.errs[:len(sets)])
	transact(&m.batcher, sets, 1, func(seq uint32, set *string) {
		e := &m.enc
		e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_DELSETELEM, unix.NLM_F_REQUEST, seq, unix.AF_INET)
		e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, m.table)
		e.Str(unix.NFTA_SET_ELEM_LIST_SET, *set)
		e.End()
	})
	var errs []error
	for i, err := range m.errs[:len(sets)] {
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("empty set %s: %w", sets[i], nfnl.Permitted(err)))
		}
	}
	return errors.Join(errs...)
}

// Return lets the flows of an outside address that is there teach mappings again.
func (m *Mappings) Return(addr netip.Addr) error { return m.gone(addr, unix.NFT_MSG_DELSETELEM) }

func (m *Mappings) gone(addr netip.Addr, typ uint16) error {
	clear(m.errs[:1])
	transact(&m.batcher, []netip.Addr{addr}, 1, func(seq uint32, a *netip.Addr) {
		m.element(seq, typ, false, goneSet, copy(m.key[:], a.AsSlice()), 0, goneTimeout)
	})
	if err := m.errs[0]; err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("change set %s: %w", goneSet, nfnl.Permitted(err))
	}
	return nil
}

// Lengths of keys and values, each part of a key filled up to a register's 4 bytes.
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

// putPort fills a register.
func putPort(b []byte, port uint16) { binary.BigEndian.PutUint32(b, uint32(port)<<16) }

// element appends a message about the element with the first bytes of m.key and
// m.value. With excl it must not be there. Without a timeout it stands for ever.
func (m *Mappings) element(seq uint32, typ uint16, excl bool, set string, key, value int, timeout time.Duration) {
	isNew, flags := typ == unix.NFT_MSG_NEWSETELEM, uint16(0)
	if excl {
		flags = unix.NLM_F_EXCL
	}
	e := &m.enc
	list, element := m.openElement(m.table, set, seq, typ, flags)
	m.data(unix.NFTA_SET_ELEM_KEY, m.key[:key])
	if isNew && value > 0 {
		m.data(unix.NFTA_SET_ELEM_DATA, m.value[:value])
	}
	if isNew && timeout > 0 {
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
