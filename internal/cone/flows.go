package cone

import (
	"encoding/binary"
	"time"
)

// A flow is a live conntrack entry that belongs to a claim: the inside host opened it, or
// it is a child.
type flow struct {
	claim      int32
	next, prev int32
	id         uint32
	packets    uint32 // from inside, when last seen; wraps
	host       uint32 // see flowKey.host
	port       uint16 // the peer's
	zone       uint16 // of the packets from the peer
	gen        uint8  // generation of the snapshot that saw it last
	child      bool
	answered   bool
}

// flowKey names a flow. With the claim it gives the whole tuple, except that for IPv6 peers
// in a group host is only a hash.
type flowKey struct {
	claim int32
	host  uint32 // which peer, if it is not the claim's; else 0
	port  uint16
	child bool
}

func (f *flow) key() flowKey { return flowKey{f.claim, f.host, f.port, f.child} }

// A flowTable holds the flows of all claims in one slice.
type flowTable struct {
	all   []flow
	free  []int32
	byKey index[flowKey]
	peers map[int32]Addr // by flow, if the peer is not the claim's
}

func newFlowTable() *flowTable {
	t := &flowTable{peers: make(map[int32]Addr)}
	t.byKey = newIndex(func(i int32) flowKey { return t.all[i].key() })
	return t
}

// flowKey returns the key of the flow between e and the inside host of claim i.
func (m *Model) flowKey(i int32, e Endpoint, child bool) flowKey {
	k := flowKey{claim: i, port: e.Port, child: child}
	if c := &m.claims[i]; c.HostBits > 0 || c.Peer != e.Addr {
		for b := 0; b < len(e.Addr); b += 4 {
			k.host = k.host*31 + binary.BigEndian.Uint32(e.Addr[b:])
		}
	}
	return k
}

// flowOf returns the flow with an ID between e and the inside host of claim i, or none.
func (m *Model) flowOf(i int32, e Endpoint, child bool, id uint32) int32 {
	if n, ok := m.flows.byKey.find(m.flowKey(i, e, child)); ok && m.flows.all[n].id == id {
		return n
	}
	return none
}

// from returns the peer's endpoint of flow n.
func (m *Model) from(n int32) Endpoint {
	fl := &m.flows.all[n]
	peer, ok := m.flows.peers[n]
	if !ok {
		peer = m.claims[fl.claim].Peer
	}
	return Endpoint{peer, fl.port}
}

// A role is what a flow is to the model.
type role uint8

const (
	roleOther role = iota // nothing to do with permissions
	roleOut               // an enabled inside host opened it towards a peer
	roleChild             // a permission admitted it
	roleDNAT              // came in by a user's port forward: supports nothing
	roleEarly             // came in and ends on the gateway
)

// role returns what f is, and which permission it would belong to.
func (m *Model) role(f *Flow) (role, Permission, Subnet) {
	inbound := Permission{
		Key:  Key{Ext: f.Dst, Peer: f.Src.Addr, Zone: f.ReplyZone},
		Int:  f.ReplySrc,
		Mark: f.Mark,
	}
	m.policy.widen(&inbound)
	expected := f.Status.Has(StatusExpected)
	if expected && IsAnchor(f.MasterSrc, f.MasterDst) {
		return roleChild, inbound, Subnet{}
	}
	if _, s, ok := m.policy.subnet(f.Src.Addr.Netip()); ok {
		out := Permission{
			Key:  Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr, Zone: f.ReplyZone},
			Int:  f.Src,
			Mark: f.Mark,
		}
		m.policy.widen(&out)
		return roleOut, out, s
	}
	_, local := m.topo.local[f.Dst.Addr]
	switch {
	case f.Status.Has(StatusDstNAT) && !expected:
		if labels := m.labels(); labels && f.Labelled || !labels && m.find(inbound.Key, inbound.Int) != none {
			return roleChild, inbound, Subnet{}
		}
		return roleDNAT, inbound, Subnet{}
	case !f.Status.Has(StatusDstNAT) && !f.Status.Has(StatusSrcNAT) && local && !expected:
		return roleEarly, inbound, Subnet{}
	}
	return roleOther, inbound, Subnet{}
}

// IsAnchor reports whether an entry with this original direction looks like one of our
// anchors: one of its ports is 0, which real packets do not use.
func IsAnchor(src, dst Endpoint) bool {
	return (src.Port == 0) != (dst.Port == 0)
}

// FlowSeen handles a flow that is alive: a new one, or one seen again with its present
// status and counters.
func (m *Model) FlowSeen(now time.Duration, f *Flow) {
	m.seeHelped(now, f)
	m.noteZones(f)
	m.noteLabel(f)
	switch role, p, subnet := m.role(f); role {
	case roleOut:
		if !m.answersInterim(now, f, &p) {
			m.seeOut(now, f, p, subnet)
		}
	case roleChild:
		m.seeChild(now, f, p)
	case roleDNAT:
		if m.forwardsUnknown {
			m.seeForward(now, f, p.extKey())
		}
	case roleEarly:
		m.seeEarly(f, p)
	case roleOther:
		// Flows that end on the gateway do not pass the forward hook.
		_, ends := m.topo.local[f.ReplySrc.Addr]
		if f.Status.Has(StatusExpected) && !ends && m.snap.complete && !m.snap.fromDump && m.topo.outside(f.Src.Addr.Netip()) {
			m.passed(f).Expected++
		}
	}
}

func (m *Model) seeOut(now time.Duration, f *Flow, p Permission, s Subnet) {
	if !f.Status.Has(StatusSrcNAT) && (!s.Routed || !p.Routed()) {
		m.seeUntranslated(f, s)
		return
	}
	if f.Status.Has(StatusSrcNAT) {
		m.noteSubnetZone(f, s)
	}
	r := m.policy.refuses(f.ReplyDst, f.ReplySrc, &m.topo)
	if r != ReasonPeerInside && f.Status.Has(StatusSrcNAT) {
		m.seeTranslated(f, s)
	}
	if s.Filtering == AddressAndPortDependent {
		r = ReasonFiltering
	}
	if r == ReasonNone && m.lost(now, &p) {
		r = ReasonAddressGone
		if m.policy.Learned && !m.snap.fromDump { // the kernel could learn it while the address was there
			m.Unexpected(now, p, ByMap)
		}
	}
	if r == ReasonNone && m.rerouted != nil && m.rerouted(p) {
		r = ReasonRerouted
	}
	behind := r != ReasonPeerInside || m.topo.outside(f.ReplySrc.Addr.Netip())
	if !behind || m.topo.doubts(f.ReplyDst.Addr) {
		m.stray(f)
	}
	if r != ReasonNone {
		m.unplaced = m.unplaced || r == ReasonAddressGone || !behind
		m.skip(f, r)
		return
	}
	first, n := m.policy.expand(&p)
	for i := range n {
		p.Peer = first.Plus(i)
		if m.gives(f, &p) {
			m.claimOut(now, f, p, s)
		}
	}
}

// gives reports whether f gives p, one of the permissions into which its group is expanded.
func (m *Model) gives(f *Flow, p *Permission) bool {
	return p.HostBits > 0 || p.Peer == f.ReplySrc.Addr ||
		m.policy.refusesEndpoint(p.Ext, Endpoint{p.Peer, 1}, &m.topo) == ReasonNone
}

func (m *Model) claimOut(now time.Duration, f *Flow, p Permission, s Subnet) {
	if i := m.find(p.Key, p.Int); i != none {
		known := m.addFlow(now, i, f, false)
		c := &m.claims[i]
		c.Mark = p.Mark // the mark of the newest flow
		asks := c.isRevoked() && !known && (!m.snap.fromDump || m.begunSince(f, &p))
		if asks {
			m.setState(i, StateWaiting, ReasonConflict)
			m.requeue(i)
		}
		switch o := m.owner(p.Key); {
		case o != i && m.yields(o, i) && !m.isOverdue(now, c):
			m.preempt(now, i)
		case known:
		case o != i:
			m.grantInMap(o)
		case asks:
			m.grant(now, i)
		}
		return
	}
	i := m.claim(p, m.lastPacket(now, f))
	m.addFlow(now, i, f, false)
	if m.revokedBefore(now, f, &p) {
		m.keepRevoked(now, i)
		return
	}
	if !s.Mapping && f.Status.Has(StatusSrcNAT) && (p.HostBits > 0 || p.Peer == f.ReplySrc.Addr) {
		m.compare(f.Src, f.ReplyDst)
	}
	over := m.isOverdue(now, &m.claims[i])
	switch o := m.owner(p.Key); {
	case o == i && over:
		m.setState(i, StateRefused, ReasonIdle)
	case o == i:
		m.grant(now, i)
	case !over && m.yields(o, i):
		m.preempt(now, i)
	default:
		m.claims[i].reason = ReasonConflict
		m.stats.Conflicts++
		m.grantInMap(o)
	}
}

// grantInMap grants claim i, which keeps its Key, in the map again. The kernel gives a port to
// a new flow of another host once a flow with the same reply tuple has ended, and the map
// may have learned that host.
func (m *Model) grantInMap(i int32) {
	c := &m.claims[i]
	if m.policy.Learned && c.state == StateStanding && c.placed.By&ByMap != 0 {
		m.op(Op{Kind: Grant, Permission: c.Permission, By: ByMap})
	}
}

func (m *Model) seeChild(now time.Duration, f *Flow, p Permission) {
	i := m.find(p.Key, p.Int)
	m.notePassed(f, i)
	if i == none || m.claims[i].state != StateStanding && !f.Status.Has(StatusSeenReply) {
		switch {
		case f.Labelled && m.labels():
			// The map may have learned a permission of which no event came yet. So drop the
			// child only if there is a claim of its Key, or at the end of a snapshot.
			switch {
			case i != none && m.claims[i].isRevoked(): // the kernel has not learned it again
				m.orphan(f, p)
			case m.unreported.possible:
				if m.staysUnclaimed(f) {
					m.orphan(f, p)
				}
			case i != none || m.owner(p.Key) != none || m.snap.fromDump:
				m.orphan(f, p)
			case m.snap.running: // it may still show that permission's flow
				m.snap.inbound = append(m.snap.inbound, *f)
			}
		case f.Status.Has(StatusExpected):
			m.orphan(f, p)
		case i != none && !m.isForwarded(p.extKey(), f.Src.Addr) && !(m.forwardsUnknown && m.seenForwards.has(now, p.extKey())):
			m.orphan(f, p)
		}
		return
	}
	if _, known := m.flows.byKey.find(m.flowKey(i, f.Src, true)); !known {
		crowded := full(m.claims[i].children, m.policy.children(&p.Key))
		if crowded {
			m.stats.Crowded++
		}
		if crowded || m.isOlder(now, f, &m.claims[i]) {
			m.op(Op{Kind: DropUnanswered, Permission: p, From: f.Src, FromZone: f.OrigZone, ID: f.ID})
			return
		}
	}
	m.addFlow(now, i, f, true)
}

// orphan drops a child whose permission is gone, unless the inside host answered it. A
// daemon that died may have left it, or its first packet came just as the permission ended.
// Before the first snapshot, and while permissions are adopted, it is not known what is gone.
func (m *Model) orphan(f *Flow, p Permission) {
	if m.snap.complete && !m.adopting && !f.Status.Has(StatusSeenReply) {
		m.op(Op{Kind: DropUnanswered, Permission: p, From: f.Src, FromZone: f.OrigZone, ID: f.ID})
	}
}

// addFlow notes that f belongs to claim i and is alive. It refreshes the claim if f had
// packets from inside since it was last seen. Without counters that count, it refreshes the claim
// if f is the inside host's own flow or a child that it answered. It returns whether the
// flow was known.
func (m *Model) addFlow(now time.Duration, i int32, f *Flow, child bool) (known bool) {
	peer, zone, packets := f.ReplySrc, f.ReplyZone, f.OrigPackets
	if child {
		peer, zone, packets = f.Src, f.OrigZone, f.ReplyPackets
	}
	k := m.flowKey(i, peer, child)
	t := m.flows
	n, ok := t.byKey.find(k)
	known = ok && t.all[n].id == f.ID
	if !ok {
		n = m.newFlow(k, peer.Addr)
	}
	m.observeChild(EventChild, i, peer, child && !known)
	if !known && !child && !f.HasCounters {
		packets = 1 // the packet that made it
	}
	fl := &t.all[n]
	last := m.lastPacket(now, f)
	refreshes := !child || f.Status.Has(StatusSeenReply)
	// The counters of a flow in a flowtable stand still. Such a flow has packets, though
	// from which side is not known: after 30 s without any the flowtable lets it go.
	if refreshes && known && f.HasCounters && !f.Status.Has(StatusOffload) {
		refreshes = packets != 0 && uint32(packets) != fl.packets // 0 if somebody zeroed them
		last = max(last, m.snap.before)                           // the count at that time is known
	}
	fl.id, fl.zone, fl.gen = f.ID, zone, m.snap.gen
	if !known || f.HasCounters { // else what a dump counted is still the latest
		fl.packets = uint32(packets)
	}
	if !known && f.Late > 0 {
		fl.packets-- // the next look finds a change, and when the last packet passed
	}
	if child {
		m.setAnswered(fl, f.Status.Has(StatusSeenReply))
		if !known {
			m.noteInterim(now, n)
		}
	}
	if refreshes {
		m.refresh(now, i, last)
	}
	return known
}

func (m *Model) newFlow(k flowKey, peer Addr) int32 {
	t := m.flows
	var n int32
	if l := len(t.free); l > 0 {
		n = t.free[l-1]
		t.free = t.free[:l-1]
	} else {
		t.all = append(t.all, flow{})
		n = int32(len(t.all) - 1)
	}
	c := &m.claims[k.claim]
	t.all[n] = flow{claim: k.claim, host: k.host, port: k.port, child: k.child, next: c.flows, prev: none}
	if c.HostBits > 0 || c.Peer != peer {
		t.peers[n] = peer
	}
	if c.flows != none {
		t.all[c.flows].prev = n
	}
	c.flows = n
	t.byKey.set(k, n)
	m.stats.Flows++
	if k.child {
		c.children++
	} else {
		c.outFlows++
	}
	m.updateScopes(k.claim)
	return n
}

func (m *Model) setAnswered(fl *flow, answered bool) {
	if fl.answered == answered {
		return
	}
	fl.answered = answered
	if answered {
		m.claims[fl.claim].answered++
	} else {
		m.claims[fl.claim].answered--
	}
	m.updateScopes(fl.claim)
}

// removeFlow forgets flow n. The caller must call flowsChanged.
func (m *Model) removeFlow(n int32) {
	t := m.flows
	fl := &t.all[n]
	c := &m.claims[fl.claim]
	if fl.prev != none {
		t.all[fl.prev].next = fl.next
	} else {
		c.flows = fl.next
	}
	if fl.next != none {
		t.all[fl.next].prev = fl.prev
	}
	m.observeChild(EventChildGone, fl.claim, m.from(n), fl.child)
	if fl.child {
		delete(m.older.interim, n)
		m.setAnswered(fl, false)
		c.children--
	} else {
		c.outFlows--
	}
	m.updateScopes(fl.claim)
	t.byKey.remove(fl.key())
	delete(t.peers, n)
	fl.claim = none
	t.free = append(t.free, n)
	m.stats.Flows--
}

// FlowGone handles the end of a flow. Its last status and counters tell whether the inside host
// sent to the end.
func (m *Model) FlowGone(now time.Duration, f *Flow) {
	m.snap.noteEnded(f.ID)
	role, p, _ := m.role(f)
	if role == roleDNAT {
		m.seenForwards.ruled.drop(f.ID) // another flow may get this ID
	}
	// A DESTROY event names neither the master nor the labels of a child. flowGone knows
	// our children by their ID.
	if role == roleOther && f.Status.Has(StatusExpected) && f.MasterSrc == (Endpoint{}) && f.MasterDst == (Endpoint{}) || role == roleDNAT {
		role = roleChild
	}
	switch role {
	case roleOut, roleChild:
	case roleEarly:
		m.early.remove(exact(p.Key, f.Src.Addr), f.Src.Port, f.ID)
		return
	default:
		return
	}
	if role == roleChild {
		m.flowGone(now, f, p, f.Src, true)
		return
	}
	if m.unreported.possible && !m.holds(f, p) {
		m.unreported.noteEnded(now, f)
		return
	}
	m.outGone(now, f, p)
}

// outGone handles the end of f, an outbound flow that gives p.
func (m *Model) outGone(now time.Duration, f *Flow, p Permission) {
	if m.policy.Learned && m.lost(now, &p) { // one of its last packets may have taught the kernel
		m.Unexpected(now, p, ByMap)
	}
	first, n := m.policy.expand(&p)
	for i := range n {
		p.Peer = first.Plus(i)
		m.flowGone(now, f, p, f.ReplySrc, false)
	}
}

// flowGone handles the end of a flow with the given peer that belonged to p.
func (m *Model) flowGone(now time.Duration, f *Flow, p Permission, peer Endpoint, child bool) {
	i := m.find(p.Key, p.Int)
	if i == none {
		return
	}
	n := m.flowOf(i, peer, child, f.ID)
	if n == none {
		return
	}
	if !m.isOverdue(now, &m.claims[i]) { // else the flow ended long ago, and its event is late
		m.addFlow(now, i, f, child)
	}
	m.removeFlow(n)
	m.flowsChanged(now, i)
}
