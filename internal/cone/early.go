package cone

// earlySize bounds the index of early packets' flows. It is a ring: a flood from outside
// overwrites the oldest, and their peers stay locked out until their flows end, as they
// would without repair.
const earlySize = 4096

// An earlyIndex remembers flows from outside that end on the gateway itself: a
// peer's packet that came before its permission stood. Once confirmed, such a
// flow takes every later packet of that peer's port, so it must go when the
// permission stands.
type earlyIndex struct {
	ring  []earlyFlow
	next  int           // next slot of ring to use
	byKey map[Key]int32 // first slot of each Key
}

type earlyFlow struct {
	Key
	id         uint32
	port       uint16
	zone       uint16 // of the packets from the peer
	used       bool
	prev, more int32 // neighbours of the same Key
}

func newEarlyIndex() earlyIndex { return earlyIndex{byKey: make(map[Key]int32)} }

func (x *earlyIndex) add(k Key, port, zone uint16, id uint32) {
	if i := x.find(k, port); i != none {
		x.ring[i].id, x.ring[i].zone = id, zone
		return
	}
	if len(x.ring) < earlySize {
		x.ring = append(x.ring, earlyFlow{})
	}
	x.drop(int32(x.next))
	head, ok := x.byKey[k]
	if !ok {
		head = none
	} else {
		x.ring[head].prev = int32(x.next)
	}
	x.ring[x.next] = earlyFlow{Key: k, id: id, port: port, zone: zone, used: true, prev: none, more: head}
	x.byKey[k] = int32(x.next)
	x.next = (x.next + 1) % earlySize
}

func (x *earlyIndex) find(k Key, port uint16) int32 {
	i, ok := x.byKey[k]
	for ok && i != none {
		if x.ring[i].port == port {
			return i
		}
		i = x.ring[i].more
	}
	return none
}

// remove forgets the flow id of k.
func (x *earlyIndex) remove(k Key, port uint16, id uint32) {
	if i := x.find(k, port); i != none && x.ring[i].id == id {
		x.drop(i)
	}
}

// drop frees slot i of the ring if it is in use.
func (x *earlyIndex) drop(i int32) {
	e := &x.ring[i]
	if !e.used {
		return
	}
	switch {
	case e.prev != none:
		x.ring[e.prev].more = e.more
	case e.more != none:
		x.byKey[e.Key] = e.more
	default:
		delete(x.byKey, e.Key)
	}
	if e.more != none {
		x.ring[e.more].prev = e.prev
	}
	*e = earlyFlow{}
}

// seeEarly handles a flow from outside that ends on the gateway.
func (m *Model) seeEarly(f *Flow, p Permission) {
	k := exact(p.Key, f.Src.Addr)
	if m.admits(k) {
		p.Key = k
		m.dropEarly(p, f.Src.Port, f.OrigZone, f.ID)
		return
	}
	m.early.add(k, f.Src.Port, f.OrigZone, f.ID)
}

// exact returns k for a single peer.
func exact(k Key, peer Addr) Key {
	k.Peer, k.HostBits = peer, 0
	return k
}

// admits reports whether a permission that the kernel has confirmed lets the peer of k in:
// its own permission, or that of its group or of everybody.
func (m *Model) admits(k Key) bool {
	confirmed := func(hostBits uint8) bool {
		k := k
		k.Peer, k.HostBits = k.Peer.WithoutLow(hostBits), hostBits
		o := m.owner(k)
		return o != none && m.claims[o].state == StateStanding && m.claims[o].confirmed
	}
	if confirmed(0) {
		return true
	}
	return m.policy.forGroups && (confirmed(groupBits(m.policy.groups, k.Peer)) || confirmed(uint8(k.Peer.Netip().BitLen())))
}

// Granted tells the model that the kernel carries p. It drops the flows of early packets
// that would hide p.
func (m *Model) Granted(p Permission) {
	o := m.find(p.Key, p.Int)
	if o == none || m.claims[o].state != StateStanding {
		return // it is about to be revoked
	}
	if c := &m.claims[o]; !c.confirmed {
		c.confirmed = true
		m.observe(Event{Kind: EventGranted, Permission: p, By: c.placed.By})
	}
	m.revokeSuperseded(o)
	if p.HostBits > 0 {
		m.dropAllEarly(p)
		return
	}
	for {
		i, ok := m.early.byKey[p.Key]
		if !ok {
			return
		}
		m.dropEarlyAt(p, i)
	}
}

// dropAllEarly drops the flows of early packets of all peers of p.
func (m *Model) dropAllEarly(p Permission) {
	peers := p.Peers()
	for i := range m.early.ring {
		e := &m.early.ring[i]
		if e.used && e.extKey() == p.extKey() && peers.Contains(e.Peer.Netip()) {
			m.dropEarlyAt(p, int32(i))
		}
	}
}

func (m *Model) dropEarlyAt(p Permission, i int32) {
	e := &m.early.ring[i]
	p.Key = e.Key
	m.dropEarly(p, e.port, e.zone, e.id)
	m.early.drop(i)
}

func (m *Model) dropEarly(p Permission, port, zone uint16, id uint32) {
	m.stats.Early++
	m.op(Op{Kind: DropEarly, Permission: p, From: Endpoint{p.Peer, port}, FromZone: zone, ID: id})
}
