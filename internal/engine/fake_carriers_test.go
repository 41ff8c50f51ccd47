package engine

import (
	"bytes"
	"cmp"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// fakeExpectations is the expect backend of one daemon.
type fakeExpectations struct {
	k        *fakeKernel
	lifetime time.Duration
	ledger   map[anchor]cone.Permission // what it made or adopted
	max      int
}

// peersOnPort is the limit of a backend for one outside endpoint.
const peersOnPort = 3

// adoptExpectations returns the backend of a new daemon, and what it found.
func (k *fakeKernel) adoptExpectations(lifetime time.Duration) (f *fakeExpectations, found []Placed) {
	k.expire()
	f = &fakeExpectations{k: k, lifetime: lifetime, ledger: map[anchor]cone.Permission{}, max: 1000}
	for _, key := range sortedKeys(k.expectations) {
		if x := k.expectations[key]; x.ours() {
			p := cone.Permission{Key: key, Int: x.in, MapTranslates: x.mapped}
			f.ledger[x.master] = p
			found = append(found, Placed{p, cone.ByExpectation, x.until - k.now()})
		}
	}
	for a := range k.anchors { // those without an expectation go
		if _, serves := f.ledger[a]; !serves {
			delete(k.anchors, a)
		}
	}
	return f, found
}

// sortedKeys lets a run depend on its seed alone.
func sortedKeys[V any](m map[cone.Key]V) []cone.Key {
	return slices.SortedFunc(maps.Keys(m), func(a, b cone.Key) int {
		return cmp.Or(bytes.Compare(a.Peer[:], b.Peer[:]), bytes.Compare(a.Ext.Addr[:], b.Ext.Addr[:]), cmp.Compare(a.Ext.Port, b.Ext.Port), cmp.Compare(a.HostBits, b.HostBits))
	})
}

func (*fakeExpectations) Carries(p *cone.Permission) bool { return p.Expectable() }
func (f *fakeExpectations) SetLifetime(d time.Duration)   { f.lifetime = d }
func (f *fakeExpectations) Max() int                      { return f.max }

// anchor returns the anchor of p. If the map translates, the expectation may be one that the former
// owner of its Key had.
func (f *fakeExpectations) anchor(p *cone.Permission) anchor {
	if p.MapTranslates {
		for a, o := range f.ledger {
			if o.Key == p.Key && o.MapTranslates {
				return a
			}
		}
	}
	return anchorOf(p)
}

func (f *fakeExpectations) stands(p *cone.Permission) bool {
	_, stands := f.ledger[f.anchor(p)]
	return stands
}

// place returns why p cannot have an expectation.
func (f *fakeExpectations) place(p *cone.Permission) cone.Reason {
	onPort := 0
	for _, o := range f.ledger {
		if o.Ext == p.Ext {
			onPort++
		}
	}
	switch {
	case f.stands(p):
	case onPort >= peersOnPort:
		return cone.ReasonPeersOnPort
	case len(f.ledger) >= f.max:
		return cone.ReasonTableFull
	}
	return cone.ReasonNone
}

func (f *fakeExpectations) HasRoom(p *cone.Permission) bool {
	return f.Carries(p) && !f.stands(p) && f.place(p) == cone.ReasonNone
}

func (f *fakeExpectations) Anchored(src, dst cone.Endpoint, _ uint16) (cone.Key, bool) {
	p, ok := f.ledger[anchor{src.Addr, dst.Addr, dst.Port}]
	return p.Key, ok
}

func (f *fakeExpectations) Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error)) {
	for i := range ps {
		if r, err := f.grant(&ps[i]); r != cone.ReasonNone {
			refused(i, r, err)
		}
	}
}

func (f *fakeExpectations) grant(p *cone.Permission) (cone.Reason, error) {
	if r := f.place(p); r != cone.ReasonNone {
		return r, nil
	}
	a := f.anchor(p)
	f.ledger[a] = *p
	if err := f.k.fail(); err != nil { // it is unknown what the kernel did
		if f.k.rnd.IntN(2) == 0 {
			_ = f.create(p)
		}
		f.withdraw(p)
		return cone.ReasonKernel, err
	}
	err := f.create(p)
	if err == unix.EEXIST || err == unix.EBUSY {
		x := f.k.expectations[p.Key]
		switch {
		case x != nil && x.master == a && x.mapped == p.MapTranslates:
			f.k.anchors[a] = f.k.now() + 2*f.lifetime
			return cone.ReasonNone, f.k.renewExpectation(p, a, f.lifetime)
		case x != nil && !x.ours():
			f.withdraw(p)
			return cone.ReasonHelper, err
		}
		f.clear(p)
		err = f.create(p)
	}
	switch err {
	case nil:
		return cone.ReasonNone, nil
	case unix.EMFILE, unix.ENOMEM:
		f.withdraw(p)
		return cone.ReasonTableFull, err
	}
	f.withdraw(p)
	return cone.ReasonKernel, err
}

func (f *fakeExpectations) create(p *cone.Permission) error {
	a := f.anchor(p)
	if err := f.k.newAnchor(a, 2*f.lifetime); err != nil {
		return err
	}
	return f.k.newExpectation(p, a, f.lifetime)
}

// clear removes the anchor of p, and the expectation with its Key if it is ours.
func (f *fakeExpectations) clear(p *cone.Permission) {
	a := f.anchor(p)
	if x := f.k.expectations[p.Key]; x != nil && x.ours() {
		delete(f.k.expectations, p.Key)
		if old := x.master; old != a {
			f.k.deleteAnchor(old)
			delete(f.ledger, old)
		}
	}
	f.k.deleteAnchor(a)
}

func (f *fakeExpectations) withdraw(p *cone.Permission) {
	if f.k.fail() == nil {
		a := f.anchor(p)
		f.clear(p)
		delete(f.ledger, a)
	}
}

func (f *fakeExpectations) Revoke(ps []cone.Permission) error {
	f.k.expire()
	var failed error
	for i := range ps {
		p := &ps[i]
		if !f.stands(p) {
			continue
		}
		if err := f.k.fail(); err != nil {
			failed = err
			continue
		}
		delete(f.k.expectations, p.Key) // by its tuple, whoever made it
		a := f.anchor(p)
		f.k.deleteAnchor(a)
		delete(f.ledger, a)
	}
	return failed
}

func (f *fakeExpectations) Renew(ps []cone.Permission, lost func(i int)) {
	f.k.expire()
	for i := range ps {
		a := f.anchor(&ps[i])
		_, there := f.k.anchors[a]
		if !f.stands(&ps[i]) || !there || f.k.fail() != nil {
			lost(i)
			continue
		}
		f.k.anchors[a] = f.k.now() + 2*f.lifetime
		if f.k.renewExpectation(&ps[i], a, f.lifetime) != nil {
			lost(i)
		}
	}
}

func (f *fakeExpectations) ListAll(each func(p cone.Permission, left time.Duration), foreign func(cone.Foreign)) error {
	f.k.expire()
	if err := f.k.fail(); err != nil {
		return err
	}
	for _, key := range sortedKeys(f.k.expectations) {
		switch x := f.k.expectations[key]; {
		case !x.ours():
			foreign(cone.Foreign{MasterSrc: x.in.Addr, MasterDst: key.Peer, Peer: key.Peer, Int: x.in.Addr})
		case f.k.rnd.IntN(100) >= f.k.fickle:
			each(cone.Permission{Key: key, Int: x.in, MapTranslates: x.mapped}, x.until-f.k.now())
		}
	}
	return nil
}

// fakeMap is the nft backend of one daemon.
type fakeMap struct {
	k        *fakeKernel
	lifetime time.Duration
	groups   map[cone.Addr]uint8
	denied   map[cone.Key]bool  // as far as it knows
	full     map[cone.Addr]bool // likewise
	broken   bool
}

// adoptMap returns the backend of a new daemon, and what it found.
func (k *fakeKernel) adoptMap(lifetime time.Duration, groups map[cone.Addr]uint8) (m *fakeMap, found []Placed) {
	k.expire()
	m = &fakeMap{k: k, lifetime: lifetime, groups: groups, denied: map[cone.Key]bool{}, full: map[cone.Addr]bool{}}
	for _, key := range sortedKeys(k.denied) {
		m.denied[cone.Key{Ext: key.Ext, Peer: key.Peer, HostBits: m.hostBits(key.Peer)}] = true
	}
	for _, key := range sortedKeys(k.elements) {
		found = append(found, Placed{m.permission(key), cone.ByMap, k.elements[key].until - k.now()})
	}
	return m, found
}

// permission returns what the element with this key permits. It does not show its host bits.
func (m *fakeMap) permission(key cone.Key) cone.Permission {
	p := cone.Permission{Key: key, Int: m.k.elements[key].in}
	p.HostBits = m.hostBits(key.Peer)
	return p
}

func (m *fakeMap) hostBits(peer cone.Addr) uint8 {
	if peer.Netip().IsUnspecified() {
		return 32
	}
	return m.groups[peer]
}

func (*fakeMap) Carries(p *cone.Permission) bool { return !p.Routed() }
func (m *fakeMap) SetLifetime(d time.Duration)   { m.lifetime = d }
func (m *fakeMap) Max() int                      { return m.k.mapSize }

// gone reports whether the table is missing, and remembers that.
func (m *fakeMap) gone() bool {
	if !m.k.table {
		m.broken = true
		clear(m.denied)
		clear(m.full)
	}
	return !m.k.table
}

func (m *fakeMap) Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error)) {
	m.k.expire()
	for i := range ps {
		if m.gone() {
			return
		}
		key := elementKey(&ps[i].Key)
		if m.denied[ps[i].Key] && m.k.fail() == nil {
			delete(m.k.denied, key)
			delete(m.denied, ps[i].Key)
		}
		if host := ps[i].Int.Addr; m.full[host] {
			delete(m.full, host)
			if m.k.fail() == nil {
				delete(m.k.full, host)
			}
		}
		if err := m.k.fail(); err != nil {
			refused(i, cone.ReasonKernel, err)
			continue
		}
		e, there := m.k.elements[key]
		switch {
		case !there && len(m.k.elements) >= m.k.mapSize:
			refused(i, cone.ReasonTableFull, unix.ENFILE)
		case !there || e.in != ps[i].Int: // EBUSY: it is replaced
			m.k.elements[key] = &element{in: ps[i].Int, until: m.k.now() + m.lifetime}
		default:
			e.learned = false
			if m.k.renews {
				e.until = m.k.now() + m.lifetime
			}
		}
	}
}

func (m *fakeMap) Revoke(ps []cone.Permission) (failed error) {
	m.k.expire()
	for i := range ps {
		if err := m.k.fail(); err != nil {
			failed = err
			continue
		}
		delete(m.k.elements, elementKey(&ps[i].Key))
	}
	return failed
}

func (m *fakeMap) Renew(ps []cone.Permission, lost func(i int)) {
	m.k.expire()
	for i := range ps {
		key := elementKey(&ps[i].Key)
		if e := m.k.elements[key]; e == nil || m.k.fail() != nil {
			lost(i)
			continue
		}
		m.k.elements[key] = &element{in: ps[i].Int, until: m.k.now() + m.lifetime} // deleted and added
	}
}

func (m *fakeMap) List(each func(p cone.Permission, left time.Duration)) error {
	m.k.expire()
	if err := m.k.fail(); err != nil {
		return err
	}
	for _, key := range sortedKeys(m.k.elements) {
		if m.k.rnd.IntN(100) >= m.k.fickle {
			each(m.permission(key), m.k.elements[key].until-m.k.now())
		}
	}
	return nil
}

func (m *fakeMap) Missing(ps []cone.Permission, missing func(i int)) error {
	m.k.expire()
	if err := m.k.fail(); err != nil {
		return err
	}
	for i := range ps {
		if e := m.k.elements[elementKey(&ps[i].Key)]; e == nil || e.in != ps[i].Int {
			missing(i)
		}
	}
	return nil
}

func (m *fakeMap) Deny(ps []cone.Permission, why cone.Reason) (failed error) {
	m.k.expire()
	for i := range ps {
		if m.gone() {
			return nil
		}
		if err := m.k.fail(); err != nil {
			failed = err
			continue
		}
		key := elementKey(&ps[i].Key)
		delete(m.k.elements, key)
		if why.TooMany() {
			m.k.full[ps[i].Int.Addr], m.full[ps[i].Int.Addr] = m.k.now()+time.Minute, true
			continue
		}
		m.k.denied[key] = m.k.now() + 2*time.Hour
		m.denied[ps[i].Key] = true
	}
	return failed
}
