package cone

import (
	"net/netip"
	"slices"
	"time"
)

// none ends the linked lists in slices.
const none = int32(-1)

// A State says how a claim on a permission fares.
type State uint8

// The states of a claim. At most one claim of a Key stands.
const (
	StateStanding State = iota // granted, as far as the model knows
	StateRefused               // wanted, but refused for a Reason; tried again
	StateWaiting               // another claim of the same Key comes first

	stateUnused // a free element of the slice of claims
)

func (s State) String() string {
	return [...]string{"standing", "refused", "waiting"}[s]
}

// A claim is one inside endpoint's request for a permission. Claims live in one slice and
// refer to each other by index.
type claim struct {
	Permission
	state      State
	reason     Reason
	placed     Placement
	superseded Carriers // to be revoked when the new carrier has it
	// Why the kernel refused the expectation, and the element of the map.
	noExpectation, noElement Reason

	confirmed   bool // the kernel confirmed that it stands
	adopted     bool // of an earlier daemon, and not refreshed since its last write to the kernel
	counted     bool // among the standing claims of its scopes
	listed      bool // in the lists of idle claims of its scopes
	ownAddress  bool // Int is an address of the gateway itself
	expectState expectState

	outFlows int32 // live flows that the inside host opened towards the peer
	children int32 // live children
	answered int32 // children that the inside host answered

	made, refreshed, renewal time.Duration // granted; last traffic from inside; next renewal in the kernel
	retry                    time.Duration // if refused: not tried again before
	expiry                   time.Duration // if its flows were queried: ends then, unless refreshed; else 0

	flows                int32 // first flow
	subnet               int32 // index in the policy
	inHost, inSubnet     links // in the lists of idle claims of host and subnet
	inRoom               links // in the list Model.expected[room]
	nextKey              int32 // next claim in the queue of its Key (queue.go)
	extPrev              int32 // neighbours in the list of its outside endpoint
	extNext              int32
	slot                 int32 // of the wheel
	wheelPrev, wheelNext int32
}

// extKey names an outside endpoint in a zone.
type extKey struct {
	ext  Endpoint
	zone uint16
}

func (k Key) extKey() extKey { return extKey{k.Ext, k.Zone} }

// A Model holds all claims and flows. It is not safe for concurrent use.
//
// Times are durations since any fixed start; they must not run backwards.
type Model struct {
	policy   policy
	topo     topology
	timeouts Timeouts

	claims          []claim
	free            []int32    // unused indexes of claims
	byKey           index[Key] // the first claim of each
	byExt           map[extKey]int32
	seenForwards    seenForwards // forwards that were seen in flows
	forwardsUnknown bool         // there may be forwards that the known rules do not show
	older           olderChildren
	pairs           map[pair]time.Duration // hosts that a helper works between: when last seen
	flows           *flowTable
	early           earlyIndex
	hosts           map[Addr]scope
	subnets         []scope     // by index in the policy
	carried         []carriedOf // by index in the policy
	room            Room
	bounded         bool                        // room limits the expectations
	expected        [busy + 1]scope             // standing expectations, by how they stand; the oldest first
	forwards        func(Permission) Forwarding // where rules may lead packets of its peers; may be nil
	connected       map[Key]struct{}            // Keys that connected sockets of the gateway use
	wheel           wheel
	snap            snapshot
	zones           Zones
	inZone          map[netip.Prefix]uint16 // the original zone in which each enabled subnet was first seen
	unplaced        bool                    // since the last snapshot the topology refused a flow
	last            lastMappings
	skips           skips
	// othersLabel says that flows have our label which our rules cannot have given them.
	othersLabel bool
	strays      strays
	rerouted    func(Permission) bool // see SetRerouted; may be nil
	revoked     revocations

	observer func(Event) // may be nil

	unreported unreported

	passes map[netip.Prefix]*Passed // by enabled subnet

	adopting bool // see SetAdopting
	stopped  bool
	ops      []Op
	spare    []Op // swapped with ops by Ops
	stats    Stats
}

// Stats counts what a Model holds and did.
type Stats struct {
	Standing, Refused, Waiting int // claims by state
	Flows                      int // flows that support or belong to claims
	Expected, Mapped           int // claims that stand, by carrier
	Helped                     int // pairs of hosts between which a conntrack helper was seen at work

	Decisions
	Skipped  [Reasons]uint64 // flows that gave no permission, by reason
	Refusals [Reasons]uint64 // permissions refused, by reason
	Revoked  [Reasons]uint64 // permissions ended, by reason
}

// Decisions count since New. Status shows them all, by a type with the same members.
type Decisions struct {
	Granted   uint64 // grants decided, retries included
	Conflicts uint64 // claims whose permission another claim owned
	// Where the kernel chooses the mapping: claims whose inside endpoint had a mapping a
	// while before, and those of them whose outside port differed.
	Compared, Remapped uint64
	Early              uint64 // flows of early packets that were to be deleted
	Crowded            uint64 // children beyond the limit, dropped
}

// New returns an empty Model. Until SetTopology no peer is outside, so nothing
// is granted.
func New(p Policy) *Model {
	m := &Model{
		policy:       compilePolicy(p, nil),
		byExt:        make(map[extKey]int32),
		seenForwards: newSeenForwards(),
		older:        newOlderChildren(),
		pairs:        make(map[pair]time.Duration),
		hosts:        make(map[Addr]scope),
		subnets:      newScopes(len(p.Subnets)),
		carried:      make([]carriedOf, len(p.Subnets)+1),
		passes:       make(map[netip.Prefix]*Passed),
		flows:        newFlowTable(),
		early:        newEarlyIndex(),
		expected:     [...]scope{emptyScope, emptyScope, emptyScope},
	}
	m.byKey = newIndex(func(i int32) Key { return m.claims[i].Key })
	m.wheel = newWheel(&m.claims, p.Lifetime)
	return m
}

// Stats returns the present counts.
func (m *Model) Stats() Stats { return m.stats }

// find returns the claim of in on k, or none.
func (m *Model) find(k Key, in Endpoint) int32 {
	i, ok := m.byKey.find(k)
	if !ok {
		return none
	}
	for ; i != none; i = m.claims[i].nextKey {
		if m.claims[i].Int == in {
			return i
		}
	}
	return none
}

// owner returns the claim of k that stands or comes first, or none.
func (m *Model) owner(k Key) int32 {
	if i, ok := m.byKey.find(k); ok {
		return i
	}
	return none
}

// claim makes a claim for p; refreshed is the time of the last traffic from inside.
func (m *Model) claim(p Permission, refreshed time.Duration) int32 {
	i := m.alloc()
	c := &m.claims[i]
	*c = claim{
		Permission: p, state: StateWaiting, refreshed: refreshed, subnet: m.policy.index(p.Int.Addr.Netip()),
		ownAddress: m.policy.isOwn(p.Int.Addr),
		flows:      none, nextKey: none, extPrev: none, extNext: none, slot: none,
	}
	m.stats.Waiting++

	m.enqueue(i)
	if h, ok := m.byExt[p.extKey()]; ok {
		c.extNext = h
		m.claims[h].extPrev = i
	}
	m.byExt[p.extKey()] = i
	return i
}

func (m *Model) alloc() int32 {
	if n := len(m.free); n > 0 {
		i := m.free[n-1]
		m.free = m.free[:n-1]
		return i
	}
	m.claims = append(m.claims, claim{})
	return int32(len(m.claims) - 1)
}

// setState changes the state of claim i and updates the counts.
func (m *Model) setState(i int32, s State, r Reason) {
	c := &m.claims[i]
	*m.stateCount(c.state)--
	*m.stateCount(s)++
	c.state, c.reason = s, r
	if s != StateStanding {
		c.expiry = 0
		m.setPlacement(i, placementOf(r))
	}
	if s == StateWaiting {
		m.wheel.remove(i)
	}
	m.updateScopes(i)
}

func (m *Model) stateCount(s State) *int {
	switch s {
	case StateStanding:
		return &m.stats.Standing
	case StateRefused:
		return &m.stats.Refused
	default:
		return &m.stats.Waiting
	}
}

// grant makes claim i stand. It must be the first of its Key. If it is overdue, another one may
// stand instead.
func (m *Model) grant(now time.Duration, i int32) {
	c := &m.claims[i]
	if m.stopped {
		m.refuse(now, i, ReasonStopped)
		return
	}
	if m.isOverdue(now, c) {
		m.skipOverdue(now, i)
		return
	}
	c.forgetRefusals()
	p := m.place(now, c)
	if m.bounded && p.Why == m.room.Lack && m.makeRoom(now) {
		p = m.place(now, c)
	}
	if p.By == 0 {
		m.refuse(now, i, p.Why)
		return
	}
	if r := m.underLimits(c, func(i int32) { m.end(now, i, ReasonEvicted) }); r != ReasonNone {
		m.refuse(now, i, r)
		return
	}
	m.setState(i, StateStanding, ReasonNone)
	m.setPlacement(i, p)
	c.made, c.confirmed, c.adopted = now, false, false
	c.renewal = now + m.policy.Lifetime/2
	if m.policy.Learned && m.snap.fromDump && !m.snap.first {
		// The map may have learned it any time since the last snapshot, and a grant does not
		// renew what exists.
		c.renewal = m.snap.before + m.policy.Lifetime/2
	}
	m.stats.Granted++
	m.op(Op{Kind: Grant, Permission: c.Permission, By: p.By})
	if m.adopting && !m.snap.fromDump {
		m.renew(now, i) // an earlier daemon may have left it
	}
	m.wheel.schedule(i, min(c.renewal, c.refreshed+m.policy.Lifetime))
}

// refuse notes that claim i does not stand, to be tried again later.
func (m *Model) refuse(now time.Duration, i int32, r Reason) {
	c := &m.claims[i]
	if c.retry == 0 {
		m.observe(Event{Kind: EventRefused, Permission: c.Permission, Reason: r})
	}
	m.setState(i, StateRefused, r)
	m.stats.Refusals[r]++
	c.retry = now + m.policy.Retry
	m.wheel.schedule(i, c.retry)
	m.deny(i)
}

// deny keeps a kernel that learns by itself from learning claim i, which is refused, if the
// reason denies it and an outbound flow could teach it. A denial is for all claims of the
// Key, so there is none while another one stands. A revocation is told to any kernel.
func (m *Model) deny(i int32) {
	c := &m.claims[i]
	if !m.policy.Learned && c.reason != ReasonRevoked || c.outFlows == 0 || !c.reason.denies() {
		return
	}
	if o := m.owner(c.Key); o != i && (m.claims[o].state == StateStanding || m.claims[o].reason.denies()) {
		return
	}
	var by Carriers
	if m.policy.Learned {
		by = ByMap
	}
	m.op(Op{Kind: Deny, Permission: c.Permission, By: by, Reason: c.reason})
}

// withdraw takes claim i out of the kernel, if it stands, with its unanswered
// children.
func (m *Model) withdraw(i int32, r Reason) { m.withdrawFrom(i, AllCarriers, r) } // all: the map may have learned it

// withdrawFrom is withdraw for some carriers. The caller handles the others.
func (m *Model) withdrawFrom(i int32, by Carriers, r Reason) {
	c := &m.claims[i]
	if c.state != StateStanding {
		return
	}
	m.stats.Revoked[r]++
	if c.confirmed {
		m.observe(Event{Kind: EventRevoked, Permission: c.Permission, By: c.placed.By, Reason: r})
	}
	if by != 0 {
		m.op(Op{Kind: Revoke, Permission: c.Permission, By: by, Reason: r})
	}
	m.dropChildren(c)
	m.wheel.remove(i)
}

// dropChildren drops the children that the inside host never answered: they would live as
// long as the peer keeps sending.
func (m *Model) dropChildren(c *claim) {
	for f := c.flows; f != none; f = m.flows.all[f].next {
		if fl := &m.flows.all[f]; fl.child && !fl.answered {
			m.op(Op{Kind: DropUnanswered, Permission: c.Permission, From: m.from(f), FromZone: fl.zone, ID: fl.id})
		}
	}
}

// end removes claim i with its flows and lets the next one of its Key stand.
func (m *Model) end(now time.Duration, i int32, r Reason) {
	c := &m.claims[i]
	p, stood := c.Permission, c.state == StateStanding
	if c.isRevoked() && c.outFlows > 0 {
		m.noteRevoked(now, revocation{p.Key, p.Int}, nil)
	}
	first := m.owner(c.Key) == i
	next := none
	if first {
		next = c.nextKey
	}
	inherits := next != none && (m.claims[next].state == StateWaiting || !m.claims[next].waitsForFlow())
	var replaced Carriers // by the grant of the next claim, so it is not revoked here
	if inherits && m.policy.Learned {
		replaced |= ByMap // it may have learned the Key for the next claim already
	}
	if inherits && c.MapTranslates && m.policy.mappable(&m.claims[next].Permission) {
		replaced |= ByExpectation & c.placed.By // it is for any host
	}
	m.withdrawFrom(i, AllCarriers&^replaced, r)
	m.wheel.remove(i)
	for c.flows != none {
		m.removeFlow(c.flows)
	}

	m.dequeue(i)
	switch {
	case c.extPrev != none:
		m.claims[c.extPrev].extNext = c.extNext
	case c.extNext != none:
		m.byExt[c.extKey()] = c.extNext
	default:
		delete(m.byExt, c.extKey())
	}
	if c.extNext != none {
		m.claims[c.extNext].extPrev = c.extPrev
	}

	*m.stateCount(c.state)--
	m.setPlacement(i, Placement{})
	c.state = stateUnused
	m.updateScopes(i)
	*c = claim{state: stateUnused}
	m.free = append(m.free, i)
	switch {
	case inherits:
		at := len(m.ops)
		m.grant(now, next)
		if left := replaced &^ m.claims[next].placed.By; stood && left != 0 {
			m.ops = slices.Insert(m.ops, at, Op{Kind: Revoke, Permission: p, By: left, Reason: r})
		}
	case next != none:
		m.deny(next)
	}
}

// Missing tells the model that some carriers no longer hold p. If they should, Missing grants
// p again and returns true. A permission without inside traffic for a lifetime has run out:
// it is not granted again before there is such traffic.
func (m *Model) Missing(now time.Duration, p Permission, by Carriers) bool {
	i := m.find(p.Key, p.Int)
	if i == none || m.claims[i].placed.By&by == 0 {
		return false
	}
	c := &m.claims[i]
	if m.isOverdue(now, c) {
		c.renewal = now
		return false
	}
	if c.adopted && m.isOverdue(now+m.timeoutResolution(), c) { // it ended by itself
		return false
	}
	c.confirmed = c.confirmed && c.placed.By&^by != 0
	m.op(Op{Kind: Grant, Permission: c.Permission, By: c.placed.By & by})
	return true
}

// Recheck tells the model that the permission k may be gone from the kernel. If it should
// stand, Recheck returns true and renews it now, which shows whether it is there. k.HostBits
// is ignored: the caller does not know it.
func (m *Model) Recheck(k Key) bool {
	for _, k.HostBits = range [...]uint8{0, groupBits(m.policy.groups, k.Peer)} {
		if i := m.owner(k); i != none && m.claims[i].state == StateStanding {
			m.op(Op{Kind: Renew, Permission: m.claims[i].Permission, By: m.claims[i].placed.By})
			return true
		}
	}
	return false
}

// Unexpected tells the model that some carriers hold p. If they should not hold its Key, p is
// revoked. If they should hold it for another inside endpoint, that one is granted instead
// and replaces p: a map knows a permission by its Key alone, so revoking p could end the
// other one.
func (m *Model) Unexpected(now time.Duration, p Permission, by Carriers) {
	switch o := m.owner(p.Key); {
	case o == none || m.claims[o].placed.By&by == 0:
		m.op(Op{Kind: Revoke, Permission: p, By: by, Reason: ReasonExpired})
	case m.claims[o].Int != p.Int:
		m.Missing(now, m.claims[o].Permission, by)
	}
}

// Review calls f for every standing permission, and withdraws the permission if f returns a
// reason. It is tried again later.
func (m *Model) Review(now time.Duration, f func(Permission) Reason) {
	for i := range m.claims {
		c := &m.claims[i]
		if c.state != StateStanding {
			continue
		}
		if r := f(c.Permission); r != ReasonNone {
			m.Refused(now, c.Permission, r, true)
		}
	}
}

// RevokeAll withdraws everything, for a clean stop. After it nothing is granted.
func (m *Model) RevokeAll() {
	m.stopped = true
	for i := range m.claims {
		if m.claims[i].state == StateStanding {
			m.withdraw(int32(i), ReasonStopped)
			m.setState(int32(i), StateRefused, ReasonStopped)
		}
	}
}
