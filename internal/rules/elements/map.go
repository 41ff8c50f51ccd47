package elements

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// A Map writes permissions as elements of the map in our tables. The map exists once
// rules.Tables.Set made it. A Map may be used concurrently with the tables, but its own
// methods must not be called concurrently, except for List.
//
// The kernel may add elements by itself (rules.MapConfig.Learn). Elements have no owner: an
// element that the Map grants, renews or revokes may have been learned.
type Map struct {
	batcher
	size     int
	lifetime time.Duration
	groups   atomic.Pointer[map[netip.Addr]uint8]
	denied   map[cone.Key]time.Time  // with the time of expiry, as far as this process knows
	swept    time.Time               // when expired denials were last removed
	full     map[cone.Addr]time.Time // hosts for which the kernel learns nothing, until then
	hosts    []cone.Permission       // one for each new one of full in the current batch
	marked   []cone.Permission       // permissions with marks in the current batch
	absent   [batch][len(permissionSets)]bool
	notFound func(seq uint32, err error) // notes in absent which element is not there
	broken   bool
}

// perElement is the maximum number of messages for a permission in a batch.
const perElement = 4

// A MapConfig says how the tables of a Map were made.
type MapConfig struct {
	// Size is the maximum number of permissions.
	Size int
	// Lifetime and PeerGroups are those of rules.MapConfig.
	Lifetime   time.Duration
	PeerGroups []netip.Prefix
}

// NewMap returns the Map of the tables of w.
func NewMap(w *Writer, c MapConfig) *Map {
	m := &Map{size: c.Size, lifetime: c.Lifetime, denied: make(map[cone.Key]time.Time), full: make(map[cone.Addr]time.Time)}
	m.SetPeerGroups(c.PeerGroups)
	m.begin(w)
	m.notFound = func(seq uint32, err error) {
		if n := seq - m.first - 1; errors.Is(err, unix.ENOENT) && n < batch*perElement {
			m.absent[n/perElement][n%perElement] = true
		}
	}
	return m
}

// ErrNoRoom says that a permission ended but could not be denied: the kernel may learn it
// again, or the next daemon may restore it.
var ErrNoRoom = errors.New("the set of denials has no room")

// Carries reports whether the map can hold p. It holds translated IPv4 permissions in the
// default zone.
func (*Map) Carries(p *cone.Permission) bool {
	return p.Peer.Is4() && p.Zone == 0 && !p.Routed()
}

// Max returns the maximum number of permissions.
func (m *Map) Max() int { return m.size }

// SetLifetime sets the timeout of permissions that are granted or renewed from now on.
func (m *Map) SetLifetime(d time.Duration) { m.lifetime = d }

// SetPeerGroups sets MapConfig.PeerGroups.
func (m *Map) SetPeerGroups(all []netip.Prefix) {
	groups := make(map[netip.Addr]uint8, len(all))
	for _, g := range all {
		if _, known := groups[g.Addr()]; !known && g.Addr().Is4() {
			groups[g.Addr()] = uint8(32 - g.Bits())
		}
	}
	m.groups.Store(&groups)
}

// hostBits returns how many host bits a peer in the map has. The element itself does not say.
func (m *Map) hostBits(peer cone.Addr) uint8 {
	a := peer.Netip()
	if low, ok := (*m.groups.Load())[a]; ok {
		return low
	}
	if a.IsUnspecified() {
		return 32
	}
	return 0
}

// Broken reports whether the table was found missing since the last call. Permissions that
// were granted while it was missing do not exist.
func (m *Map) Broken() bool {
	b := m.broken
	m.broken = false
	return b
}

// Grant adds ps, in order. For each one that could not be added it calls refused with the
// index, the reason, and the kernel's error, if any. An element of another inside endpoint
// is replaced. Grant lifts denials of ps. What the kernel has learned stays as it is, and is no new
// generation of the ruleset (nft_add_set_elem).
//
// If the table is missing, nothing is refused: the daemon makes the table again and adds
// the wanted permissions; see Broken.
func (m *Map) Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error)) {
	for base := 0; base < len(ps); base += batch {
		part := ps[base:min(base+batch, len(ps))]
		_ = m.lift(part) // the permission is added even if its denial could not be lifted
		m.learnAgain(part)
		m.transact(part, m.add)
		for i := range part {
			err := m.errs[i]
			if anothers(err) {
				err = m.replace(part[i])
			}
			switch {
			case err == nil, m.gone(err):
			case errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
				refused(base+i, cone.ReasonTableFull, fmt.Errorf("add element: %w", err))
			default:
				refused(base+i, cone.ReasonKernel, fmt.Errorf("add element: %w", nfnl.Permitted(err)))
			}
		}
	}
}

// gone reports whether err says that the table is missing, and remembers that.
func (m *Map) gone(err error) bool {
	gone := errors.Is(err, unix.ENOENT)
	if gone {
		m.broken = true
		clear(m.denied)
		clear(m.full)
	}
	return gone
}

// replace adds p, with its port and its mark, in place of the elements with its key. If it
// fails, no permission has that key.
func (m *Map) replace(p cone.Permission) (err error) {
	errs := m.errs
	one := []cone.Permission{p}
	defer func() {
		if err != nil {
			m.transact(one, m.deleting(PermissionMap))
		}
		m.errs = errs
	}()
	put := func(set string) error {
		if m.transact(one, m.adding(set)); anothers(m.errs[0]) {
			m.transact(one, m.replacing(set))
		}
		return m.errs[0]
	}
	if p.Mark == 0 {
		m.transact(one, m.deleting(MarksMap)) // there may be no mark
	} else if err := put(MarksMap); err != nil {
		return err
	}
	if err := put(PortMap); err != nil {
		return err
	}
	return put(PermissionMap)
}

// anothers reports whether an element with the same key but another value exists.
func anothers(err error) bool { return errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) }

// Revoke ends ps. It is no error if some have ended already. The kernel deletes by key,
// whatever inside endpoint the element has.
func (m *Map) Revoke(ps []cone.Permission) error {
	var errs []error
	for base := 0; base < len(ps); base += batch {
		part := ps[base:min(base+batch, len(ps))]
		for range 3 { // an element may expire in between; then what is left of its permission stays
			absent := m.findAbsent(part)
			transact(&m.batcher, part, perElement, m.deleteFound)
			if m.missed(part) == absent {
				break
			}
		}
		for i := range part {
			if err := m.errs[i]; err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("delete element %v -> %v: %w", part[i].Peer, part[i].Ext, err))
			}
		}
	}
	return errors.Join(errs...)
}

// permissionSets have the elements of a permission. Without its address, which is the first to
// end, the others admit no child.
var permissionSets = [...]string{PermissionMap, PortMap, MarksMap}

// findAbsent notes in m.absent which elements of ps, at most batch, are not there, and in m.errs
// which of ps have none. It returns how many have none. Deleting an element that is not there aborts
// the transaction, and an abort waits for an RCU grace period.
func (m *Map) findAbsent(ps []cone.Permission) (none int) {
	clear(m.absent[:])
	m.w.Lock()
	m.enc.Reset()
	m.per, m.first = perElement, m.w.batch.NextSeq(len(ps)*perElement)-1 // before the first element, as in a transaction
	for i := range ps {
		for n, set := range permissionSets {
			seq := m.first + 1 + uint32(i*perElement+n)
			if set == MarksMap && ps[i].Mark == 0 {
				m.notFound(seq, unix.ENOENT)
				continue
			}
			m.element(seq, unix.NFT_MSG_GETSETELEM, set, &ps[i])
		}
	}
	err := m.w.batch.Exchange(&m.enc, m.notFound, nil)
	m.w.Unlock()
	if err != nil { // they may be there
		clear(m.absent[:])
	}
	for i := range ps {
		m.errs[i] = nil
		if m.absent[i] == [len(permissionSets)]bool{true, true, true} {
			m.errs[i] = unix.ENOENT
			none++
		}
	}
	return none
}

// missed returns of how many of ps an element was not there.
func (m *Map) missed(ps []cone.Permission) (n int) {
	for i := range ps {
		if errors.Is(m.errs[i], unix.ENOENT) {
			n++
		}
	}
	return n
}

// deleteFound deletes those elements of p that findAbsent found.
func (m *Map) deleteFound(seq uint32, p *cone.Permission) {
	i := (seq - m.first - 1) / perElement
	for n, set := range permissionSets {
		if !m.absent[i][n] {
			m.element(seq+uint32(n), unix.NFT_MSG_DELSETELEM, set, p)
		}
	}
}

// Renew renews the timeouts of ps. It calls lost with the index of each that no longer
// exists, or not with its mark. Before Linux 6.12, adding an element again does not renew
// its timeout, so it is deleted and added in one transaction. Before Linux 6.17 (kernel commit
// b2f742c846ca) a look-up that the transaction overtakes may find neither: a packet in some
// 50,000 where one permission is renewed a thousand times a second.
func (m *Map) Renew(ps []cone.Permission, lost func(i int)) {
	for base := 0; base < len(ps); base += batch {
		part := ps[base:min(base+batch, len(ps))]
		m.transact(part, m.replaceAll)
		for i := range part {
			if m.errs[i] != nil {
				lost(base + i)
			}
		}
		m.haveMarks(part, func(i int) bool { return m.errs[i] == nil })
		m.transact(m.marked, m.replacing(MarksMap))
		m.haveMarks(m.marked, func(i int) bool { return m.errs[i] != nil })
		m.transact(m.marked, m.adding(MarksMap))
		for i := range m.marked {
			if m.errs[i] != nil {
				lost(base + slices.IndexFunc(part, func(p cone.Permission) bool { return p.Key == m.marked[i].Key }))
			}
		}
	}
}

// haveMarks puts those of ps, at most batch, into m.marked that have a mark and for which
// pass returns true. A mark without a permission expires by itself, and marks no packet.
func (m *Map) haveMarks(ps []cone.Permission, pass func(i int) bool) {
	m.marked = m.marked[:0]
	for i := range ps {
		if ps[i].Mark != 0 && pass(i) {
			m.marked = append(m.marked, ps[i])
		}
	}
}

// Missing calls missing with the index of each of ps that does not exist. It looks up each
// of them, because a list that is made while elements are renewed may miss some. If it
// returns an error, some of ps were not looked up.
func (m *Map) Missing(ps []cone.Permission, missing func(i int)) error {
	m.w.Lock()
	defer m.w.Unlock()
	for base := 0; base < len(ps); base += batch {
		part := ps[base:min(base+batch, len(ps))]
		found, err := m.look(part)
		if err != nil {
			return err
		}
		stands := found.whole()
		for i := range part {
			if in, ok := stands[elementKey(&part[i])]; !ok || in != part[i].Int {
				missing(base + i)
			}
		}
	}
	return nil
}

// elementKey is the key of p as read from an element, which does not contain the host bits.
func elementKey(p *cone.Permission) cone.Key {
	k := p.Key
	k.HostBits = 0
	return k
}

// Find looks up the permissions with the keys of ps, and calls f for each that exists as List
// does, but without its mark.
func (m *Map) Find(ps []cone.Permission, f func(p cone.Permission, left time.Duration)) error {
	for part := range slices.Chunk(ps, batch) {
		m.w.Lock()
		found, err := m.look(part)
		m.w.Unlock()
		if err != nil {
			return err
		}
		found.each(func(p cone.Permission, left time.Duration) {
			p.HostBits = m.hostBits(p.Peer)
			f(p, left)
		})
	}
	return nil
}

// look looks up the elements of ps, at most batch, and returns those that exist. The writer
// must be locked.
func (m *Map) look(ps []cone.Permission) (found halves, err error) {
	m.enc.Reset()
	first := m.w.batch.NextSeq(2 * len(ps))
	for i := range ps {
		m.element(first+2*uint32(i), unix.NFT_MSG_GETSETELEM, PermissionMap, &ps[i])
		m.element(first+2*uint32(i)+1, unix.NFT_MSG_GETSETELEM, PortMap, &ps[i])
	}
	var refused error
	err = m.w.batch.Exchange(&m.enc, func(_ uint32, err error) {
		if !errors.Is(err, unix.ENOENT) { // it is unknown whether the element exists
			refused = err
		}
	}, func(_ uint16, body []byte) { eachElement(body, found.add) })
	if err = cmp.Or(err, refused); err != nil {
		return found, fmt.Errorf("look up elements: %w", nfnl.Permitted(err))
	}
	return found, nil
}

// transact sends what encode makes of ps, at most batch of them, as one transaction. It
// leaves out what the kernel refuses; the errors are in m.errs afterwards.
func (m *Map) transact(ps []cone.Permission, encode func(seq uint32, p *cone.Permission)) {
	clear(m.errs[:len(ps)])
	transact(&m.batcher, ps, perElement, encode)
}

// add adds the address last: without it the other elements admit no child.
func (m *Map) add(seq uint32, p *cone.Permission) {
	if p.Mark != 0 {
		m.adding(MarksMap)(seq, p)
	}
	m.adding(PortMap)(seq+1, p)
	m.adding(PermissionMap)(seq+2, p)
}

// replaceAll replaces the elements of a permission, except its mark.
func (m *Map) replaceAll(seq uint32, p *cone.Permission) {
	m.replacing(PortMap)(seq, p)
	m.replacing(PermissionMap)(seq+2, p)
}

// adding, deleting and replacing return what appends messages about the element of a permission
// in one set.
func (m *Map) adding(set string) func(seq uint32, p *cone.Permission) {
	return func(seq uint32, p *cone.Permission) { m.element(seq, unix.NFT_MSG_NEWSETELEM, set, p) }
}

func (m *Map) deleting(set string) func(seq uint32, p *cone.Permission) {
	return func(seq uint32, p *cone.Permission) { m.element(seq, unix.NFT_MSG_DELSETELEM, set, p) }
}

func (m *Map) replacing(set string) func(seq uint32, p *cone.Permission) {
	return func(seq uint32, p *cone.Permission) {
		m.deleting(set)(seq, p)
		m.adding(set)(seq+1, p)
	}
}

// key writes the key of a permission into the open element.
func (m *Map) key(k *cone.Key) {
	var key [keyLen]byte
	copy(key[:], k.Peer[12:])
	putEndpoint(key[addressLen:], k.Ext)
	m.data(unix.NFTA_SET_ELEM_KEY, key[:])
}

// element appends a message about one element of a set. A new one lives as long as a permission.
func (m *Map) element(seq uint32, typ uint16, set string, p *cone.Permission) {
	list, element := m.openElement(set, seq, typ, 0)
	m.key(&p.Key)
	if typ == unix.NFT_MSG_NEWSETELEM {
		var value [4]byte
		switch set {
		case MarksMap:
			m.data(unix.NFTA_SET_ELEM_DATA, binary.NativeEndian.AppendUint32(value[:0], p.Mark))
		case PortMap:
			m.data(unix.NFTA_SET_ELEM_DATA, binary.BigEndian.AppendUint16(value[:0], p.Int.Port))
		default:
			m.data(unix.NFTA_SET_ELEM_DATA, p.Int.Addr[12:])
		}
	}
	m.closeElement(list, element, typ, m.lifetime)
}

// Lengths of the key, with each part padded to a register's 4 bytes, and of the values. See
// also addressLen and portLen.
const (
	keyLen  = 12
	markLen = 4
)
