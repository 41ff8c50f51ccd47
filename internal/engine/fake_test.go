package engine

import (
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// A fakeKernel plays the part of Linux: it has a conntrack table, an expectation table and a
// table of nftables, with the limits, errors and timeouts of the kernel, on a clock of the
// test. What a backend of the daemon knows about it is in fakeExpectations and fakeMap, so
// that it is lost when a daemon dies.
type fakeKernel struct {
	now func() time.Duration
	rnd *rand.Rand

	flows        []*fakeFlow
	id           uint32
	anchors      map[anchor]time.Duration // until when they live
	expectations map[cone.Key]*expectation
	expectMax    int // the size of the expectation table (EMFILE)
	anchorMax    int // how many anchors conntrack has room for (ENOMEM)

	table    bool // ours exists (ENOENT)
	elements map[cone.Key]*element
	mapSize  int  // ENFILE
	renews   bool // a granted element that exists gets a new timeout: Linux 6.12
	denied   map[cone.Key]time.Duration
	full     map[cone.Addr]time.Duration // hosts for which it learns nothing
	revoked  map[cone.Key]bool

	sockets  map[cone.Endpoint]bool
	forwards map[cone.Endpoint]cone.Endpoint // the user's

	expired time.Duration // when expire was called last

	failing int // how many of 100 requests fail with EPERM
	fickle  int // how many of 100 entries an interrupted list misses
}

// A fakeFlow is an entry of the conntrack table.
type fakeFlow struct {
	cone.Flow
	last    time.Duration // when its last packet passed
	sent    time.Duration // when its last packet from inside passed
	revoked bool          // the user revoked its permission while it was there
}

// An anchor is the entry that an expectation hangs on.
type anchor struct {
	in   cone.Addr
	peer cone.Addr
	port uint16
}

func anchorOf(p *cone.Permission) anchor { return anchor{p.Int.Addr, p.Peer, p.Ext.Port} }

type expectation struct {
	in     cone.Endpoint
	mapped bool   // the map says where children go
	master anchor // zero if it is somebody else's
	until  time.Duration
}

func (x *expectation) ours() bool { return x.master != anchor{} }

type element struct {
	in      cone.Endpoint
	until   time.Duration
	learned bool // and not granted since
}

func newFakeKernel(now func() time.Duration, rnd *rand.Rand) *fakeKernel {
	return &fakeKernel{
		now: now, rnd: rnd,
		anchors: map[anchor]time.Duration{}, expectations: map[cone.Key]*expectation{}, elements: map[cone.Key]*element{},
		denied: map[cone.Key]time.Duration{}, full: map[cone.Addr]time.Duration{}, revoked: map[cone.Key]bool{},
		sockets: map[cone.Endpoint]bool{}, forwards: map[cone.Endpoint]cone.Endpoint{},
		expectMax: 1000, anchorMax: 1000, mapSize: 1000, table: true, expired: -1,
	}
}

// expire ends what has run out. An expectation ends with its anchor.
func (k *fakeKernel) expire() {
	if k.expired == k.now() {
		return
	}
	k.expired = k.now()
	maps.DeleteFunc(k.anchors, func(_ anchor, until time.Duration) bool { return k.now() >= until })
	maps.DeleteFunc(k.expectations, func(_ cone.Key, x *expectation) bool {
		_, stands := k.anchors[x.master]
		return k.now() >= x.until || x.ours() && !stands
	})
	maps.DeleteFunc(k.elements, func(_ cone.Key, e *element) bool { return k.now() >= e.until })
	maps.DeleteFunc(k.denied, func(_ cone.Key, until time.Duration) bool { return k.now() >= until })
	maps.DeleteFunc(k.full, func(_ cone.Addr, until time.Duration) bool { return k.now() >= until })
}

// fail returns EPERM for some requests, as for a daemon that lost its privilege.
func (k *fakeKernel) fail() error {
	if k.rnd.IntN(100) < k.failing {
		return unix.EPERM
	}
	return nil
}

// Messages of ctnetlink.

func (k *fakeKernel) newAnchor(a anchor, timeout time.Duration) error {
	k.expire()
	if _, there := k.anchors[a]; there {
		return unix.EEXIST
	}
	if len(k.anchors) >= k.anchorMax {
		return unix.ENOMEM
	}
	k.anchors[a] = k.now() + timeout
	return nil
}

func (k *fakeKernel) newExpectation(p *cone.Permission, a anchor, timeout time.Duration) error {
	x, there := k.expectations[p.Key]
	switch {
	case k.anchors[a] == 0:
		return unix.ENOENT
	case there && x.master == a:
		return unix.EEXIST
	case there:
		return unix.EBUSY
	case len(k.expectations) >= k.expectMax:
		return unix.EMFILE
	}
	k.expectations[p.Key] = &expectation{p.Int, p.MapTranslates, a, k.now() + timeout}
	return nil
}

// renewExpectation renews any expectation with the tuple, somebody else's too.
func (k *fakeKernel) renewExpectation(p *cone.Permission, a anchor, timeout time.Duration) error {
	x := k.expectations[p.Key]
	if k.anchors[a] == 0 || x == nil {
		return unix.ENOENT
	}
	x.until = k.now() + timeout
	return nil
}

func (k *fakeKernel) deleteAnchor(a anchor) {
	delete(k.anchors, a)
	maps.DeleteFunc(k.expectations, func(_ cone.Key, x *expectation) bool { return x.master == a })
}

// Packets.

// find returns the index of the flow of packets from src to dst in their original direction, or -1.
func (k *fakeKernel) find(src, dst cone.Endpoint) int {
	return slices.IndexFunc(k.flows, func(f *fakeFlow) bool { return f.Src == src && f.Dst == dst })
}

// add confirms a flow.
func (k *fakeKernel) add(f cone.Flow) *fakeFlow {
	k.id++
	f.ID, f.HasCounters, f.OrigPackets = k.id, true, 1
	x := &fakeFlow{Flow: f, last: k.now()}
	k.flows = append(k.flows, x)
	return x
}

// shown is f as the kernel shows it.
func (k *fakeKernel) shown(f *fakeFlow) cone.Flow {
	x := f.Flow
	x.Left = max(0, udpTime-(k.now()-f.last)).Truncate(time.Second)
	return x
}

// learn is the rule that learns, which sees the packets of a flow without an answer. It reports
// whether it added an element.
func (k *fakeKernel) learn(p *cone.Permission, timeout time.Duration) bool {
	k.expire()
	key := elementKey(&p.Key)
	if _, full := k.full[p.Int.Addr]; full {
		return false
	}
	if _, denied := k.denied[key]; denied || !k.table || len(k.elements) >= k.mapSize {
		return false
	}
	if _, there := k.elements[key]; there {
		return false
	}
	k.elements[key] = &element{in: p.Int, until: k.now() + timeout, learned: true}
	return true
}

// receive passes a packet of a peer that belongs to no flow, and returns the flow that it makes.
func (k *fakeKernel) receive(from, ext cone.Endpoint) (f *fakeFlow, by cone.Carriers) {
	k.expire()
	x := k.expectations[cone.Key{Ext: ext, Peer: from.Addr}]
	if group := (cone.Key{Ext: ext, Peer: from.Addr.WithoutLow(groupOf.HostBits), HostBits: groupOf.HostBits}); x == nil {
		x = k.expectations[group]
	}
	if x != nil && !x.ours() {
		return k.add(cone.Flow{
			Status: cone.StatusExpected | cone.StatusDstNAT | cone.StatusConfirmed, Src: from, Dst: ext, ReplySrc: x.in, ReplyDst: from,
			MasterSrc: x.in, MasterDst: cone.Endpoint{Addr: from.Addr, Port: 5060},
		}), 0
	} else if x != nil {
		in := x.in
		if x.mapped {
			e := k.admits(from.Addr, ext)
			if e == nil || !k.table {
				return nil, 0 // the chain own_child drops it
			}
			in = e.in
		}
		return k.add(cone.Flow{
			Status: cone.StatusExpected | cone.StatusDstNAT | cone.StatusConfirmed, Src: from, Dst: ext, ReplySrc: in, ReplyDst: from,
			MasterSrc: cone.Endpoint{Addr: x.master.in}, MasterDst: cone.Endpoint{Addr: x.master.peer, Port: ext.Port}, Labelled: x.mapped,
		}), cone.ByExpectation
	}
	if in, forwarded := k.forwards[ext]; forwarded {
		return k.add(cone.Flow{Status: cone.StatusDstNAT | cone.StatusConfirmed, Src: from, Dst: ext, ReplySrc: in, ReplyDst: from}), 0
	}
	if e := k.admits(from.Addr, ext); e != nil && k.table && !k.sockets[ext] {
		return k.add(cone.Flow{
			Status: cone.StatusDstNAT | cone.StatusConfirmed, Labelled: true, Src: from, Dst: ext, ReplySrc: e.in, ReplyDst: from,
		}), cone.ByMap
	}
	return k.add(cone.Flow{Status: cone.StatusConfirmed, Src: from, Dst: ext, ReplySrc: ext, ReplyDst: from}), 0
}

// admits returns the element that lets a peer in.
func (k *fakeKernel) admits(peer cone.Addr, ext cone.Endpoint) *element {
	for _, low := range []uint8{0, 1, 2, 32} {
		if e := k.elements[cone.Key{Ext: ext, Peer: peer.WithoutLow(low)}]; e != nil && (low == 0 || k.isGroup(peer.WithoutLow(low), low)) {
			return e
		}
	}
	return nil
}

// isGroup reports whether our rules look up peers with so many bits cleared, too.
func (k *fakeKernel) isGroup(first cone.Addr, low uint8) bool {
	return low == 32 || low == 1 && first == groupOf.Peer
}

// groupOf is the group of peers that policies of tests have.
var groupOf = cone.Key{Peer: cone.AddrFrom4([4]byte{203, 0, 113, 6}), HostBits: 1}

func elementKey(k *cone.Key) cone.Key { return cone.Key{Ext: k.Ext, Peer: k.Peer} }

// Flows of the engine.

func (k *fakeKernel) Get(src, dst cone.Endpoint, _ uint16) (cone.Flow, bool, error) {
	if err := k.fail(); err != nil {
		return cone.Flow{}, false, err
	}
	i := slices.IndexFunc(k.flows, func(f *fakeFlow) bool {
		return f.Src == src && f.Dst == dst || f.ReplySrc == src && f.ReplyDst == dst
	})
	if i < 0 {
		return cone.Flow{}, false, nil
	}
	return k.shown(k.flows[i]), true, nil
}

func (k *fakeKernel) Delete(src, dst cone.Endpoint, _ uint16, id uint32) (bool, error) {
	if err := k.fail(); err != nil {
		return false, err
	}
	i := k.find(src, dst)
	if i < 0 || k.flows[i].ID != id {
		return false, nil
	}
	k.flows = slices.Delete(k.flows, i, i+1)
	return true, nil
}

// Sockets of the engine, and Ports.

func (k *fakeKernel) Serves(ext cone.Endpoint, _ cone.Addr) (bool, error) {
	return k.sockets[ext], k.fail()
}

func (k *fakeKernel) Takes(ext, in cone.Endpoint, _ cone.Addr) (bool, error) {
	return ext != in && k.sockets[ext], k.fail()
}

type fakePorts map[cone.Endpoint]bool

func (p fakePorts) Serves(ext cone.Endpoint) bool    { return p[ext] }
func (p fakePorts) Takes(ext, in cone.Endpoint) bool { return ext != in && p[ext] }
func (p fakePorts) Connected() map[cone.Key]struct{} { return nil }

// Revoked of the engine.

func (k *fakeKernel) Add(ks []cone.Key) error {
	for _, key := range ks {
		k.revoked[key] = true
	}
	return k.fail()
}

func (k *fakeKernel) Has(key cone.Key) bool { return k.revoked[key] }

func (k *fakeKernel) Drop(ks []cone.Key) error {
	for _, key := range ks {
		delete(k.revoked, key)
	}
	return nil
}
