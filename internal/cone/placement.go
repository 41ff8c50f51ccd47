package cone

import (
	"net/netip"
	"time"
)

// Carriers is a bit set of the ways in which a permission stands in the kernel.
type Carriers uint8

// The carriers.
const (
	ByExpectation Carriers = 1 << iota
	ByMap                  // an element of the map of an nftables rule

	AllCarriers = ByExpectation | ByMap
)

// String returns the identifier of c (docs/control.md).
func (c Carriers) String() string {
	return [...]string{"", "expect", "nft", "expect+nft"}[c&AllCarriers]
}

// A Choice says what to use for permissions of a subnet that both carriers can carry.
type Choice uint8

// The choices: the map alone, the map with an expectation that makes children RELATED, or an
// expectation alone, which translates before the user's rules that would drop what the map admits.
const (
	ChooseMap Choice = iota
	ChooseBoth
	ChooseExpectation
)

// A Placement says what carries a permission that stands.
type Placement struct {
	By Carriers
	// Why says why it has no expectation; it is ReasonNone if it has one or needs none.
	Why Reason
	// Hidden says that the user's forwards take all packets of its peers before they reach the map.
	Hidden bool
}

// placementOf is the placement of a claim that does not stand, for a reason: it keeps
// ReasonNoBackend, to be counted.
func placementOf(r Reason) (p Placement) {
	if r == ReasonNoBackend {
		p.Why = r
	}
	return p
}

// carriedOf counts the permissions of one subnet.
type carriedOf struct {
	mapAlone [Reasons]int // as MapAlone
	nothing  int          // refused, because no backend in use can carry them
}

// mappable reports whether a map can carry p. It cannot carry one of the gateway itself:
// DNAT leaves the packet NEW, and the input hook of the user's firewall drops it.
func (p *policy) mappable(x *Permission) bool {
	return p.Mapped && x.Ext.Addr.Is4() && x.Zone == 0 && !x.Routed() && !p.isOwn(x.Int.Addr) && p.choice(x.Int.Addr) != ChooseExpectation
}

// Expectable reports whether an expectation can be for the peers of p. One that translates is for
// a single peer (nat-follow-master makes the peer of its master the source of all children).
func (p *Permission) Expectable() bool {
	return p.HostBits == 0 || p.Routed() || p.MapTranslates && p.HostBits <= ExpandBits
}

// choice returns the carriers that are preferred for an inside address.
func (p *policy) choice(in Addr) Choice {
	_, s, _ := p.subnet(in.Netip())
	return s.Choice
}

// place decides what carries c, and whether the map translates. If nothing can carry it, Why says why.
func (m *Model) place(now time.Duration, c *claim) Placement {
	var can Carriers
	why := ReasonNone
	forwarded, shut := m.forwarded(now, &c.Permission)
	mappable := m.policy.mappable(&c.Permission)
	c.MapTranslates = mappable && !shut // the map comes after a forward
	switch {
	case forwarded != ReasonNone:
		why = forwarded // an expectation would override the user's rule; a map does not
	case !m.policy.Expected || !c.Expectable():
		why = ReasonNoBackend
	case m.isConnected(&c.Key) && !(c.ownAddress && c.Routed()):
		why = ReasonLocalSocket // the map's rules look for a socket packet by packet
	case m.helped(now, &c.Permission):
		why = ReasonHelper
	case c.noExpectation != ReasonNone:
		why = c.noExpectation
	default:
		can |= ByExpectation
	}
	unmapped := ReasonNoBackend
	if mappable {
		if unmapped = c.noElement; unmapped == ReasonNone {
			can |= ByMap
		} else if c.MapTranslates {
			can = 0 // an expectation would lead nowhere
		}
	}
	if can == 0 && (why == ReasonNone || why == ReasonNoBackend) {
		why = unmapped
	}
	by := can
	if can == AllCarriers && m.policy.choice(c.Int.Addr) == ChooseMap {
		by = ByMap
	}
	if shut {
		by |= can & ByExpectation
	}
	if why == ReasonNoBackend && by != 0 {
		why = ReasonNone
	}
	if by&ByExpectation != 0 && !m.hasRoom(c) {
		by, why = can&ByMap, m.room.Lack
	}
	hidden := why == ReasonForwarded && by != 0 && m.forwarding(c.Permission) == ForwardedAll
	return Placement{by, why, hidden}
}

// SetConnected sets the Keys that the gateway's connected sockets use. Conntrack may have
// forgotten their flows, and then an expectation with such a Key would take their packets.
func (m *Model) SetConnected(now time.Duration, keys map[Key]struct{}) {
	old := m.connected
	m.connected = keys
	for _, some := range []map[Key]struct{}{old, keys} {
		for k := range some {
			if i := m.owner(k); i != none {
				m.reconsider(now, i)
			}
		}
	}
}

func (m *Model) isConnected(k *Key) bool {
	_, connected := m.connected[*k]
	return connected
}

// setPlacement notes what carries claim i and keeps the counts.
func (m *Model) setPlacement(i int32, p Placement) {
	c := &m.claims[i]
	if p.By == 0 {
		c.superseded = 0
	}
	m.countPlacement(c, -1)
	c.placed = p
	m.countPlacement(c, 1)
	m.updateExpected(i)
}

// countPlacement adds n to the counts of what carries c.
func (m *Model) countPlacement(c *claim, n int) {
	if c.placed.By&ByExpectation != 0 {
		m.stats.Expected += n
	}
	if c.placed.By&ByMap != 0 {
		m.stats.Mapped += n
	}
	m.countCarried(c, n)
}

func (m *Model) countCarried(c *claim, n int) {
	switch of := &m.carried[c.subnet]; {
	case c.placed.By == ByMap && !c.placed.Hidden:
		of.mapAlone[c.placed.Why] += n
	case c.placed == Placement{Why: ReasonNoBackend}:
		of.nothing += n
	}
}

// MapAlone counts the permissions of an enabled subnet that only the map carries, by why they
// have no expectation. It leaves out those to which forwards of the user's leave no packet.
func (m *Model) MapAlone(subnet netip.Prefix) [Reasons]int { return m.carriedIn(subnet).mapAlone }

// Uncarried counts the permissions of an enabled subnet that are refused because no backend in use
// can carry them.
func (m *Model) Uncarried(subnet netip.Prefix) int { return m.carriedIn(subnet).nothing }

func (m *Model) carriedIn(subnet netip.Prefix) carriedOf {
	for i, s := range m.policy.Subnets {
		if s.Prefix == subnet {
			return m.carried[i]
		}
	}
	return carriedOf{}
}

// forgetRefusals clears what the kernel refused for c, which may have room by now. It keeps a
// refusal for a helper, which may want its own expectation again.
func (c *claim) forgetRefusals() {
	c.noElement = ReasonNone
	if c.noExpectation != ReasonHelper {
		c.noExpectation = ReasonNone
	}
}

// reconsider decides anew what carries claim i, if it stands.
func (m *Model) reconsider(now time.Duration, i int32) {
	c := &m.claims[i]
	if c.state != StateStanding {
		return
	}
	translated := c.MapTranslates
	p, was := m.place(now, c), c.placed
	if p.By == 0 {
		c.forgetRefusals()
		p = m.place(now, c)
	}
	switch {
	case p == was:
	case p.By == 0:
		m.Refused(now, c.Permission, p.Why, true)
	default:
		m.changeCarriers(i, p)
		if p.Why.isForward() && was.Why != p.Why {
			m.forwardBegan(now, i)
		}
	}
	c = &m.claims[i]
	if kept := was.By & c.placed.By &^ c.superseded; c.MapTranslates != translated && kept&ByExpectation != 0 {
		m.op(Op{Kind: Grant, Permission: c.Permission, By: ByExpectation}) // it has to translate now, or no longer
	}
}

// reconsiderAll reconsiders all claims.
func (m *Model) reconsiderAll(now time.Duration) {
	for i := range m.claims {
		m.reconsider(now, int32(i))
	}
}

// changeCarriers changes what carries claim i, which stands, to p. The old carrier is revoked when
// the new one has it, or at once if it is in the way of something else.
func (m *Model) changeCarriers(i int32, p Placement) {
	c := &m.claims[i]
	more, less := p.By&^c.placed.By, c.placed.By&^p.By
	if more != 0 {
		m.op(Op{Kind: Grant, Permission: c.Permission, By: more})
	}
	c.superseded = less
	p.By |= less
	m.setPlacement(i, p)
	if more == 0 || p.Why.isForward() || p.Why == ReasonHelper || m.bounded && p.Why == m.room.Lack {
		m.revokeSuperseded(i)
	}
}

// revokeSuperseded revokes the carriers that claim i no longer needs.
func (m *Model) revokeSuperseded(i int32) {
	c := &m.claims[i]
	if c.superseded == 0 {
		return
	}
	m.op(Op{Kind: Revoke, Permission: c.Permission, By: c.superseded, Reason: c.placed.Why})
	p := c.placed
	p.By &^= c.superseded
	c.superseded = 0
	m.setPlacement(i, p)
}

// Refused tells the model that the kernel or the gateway refuses p. If standing is set, p
// is in the kernel by an earlier grant, and is withdrawn.
func (m *Model) Refused(now time.Duration, p Permission, r Reason, standing bool) {
	i := m.find(p.Key, p.Int)
	if i == none || m.claims[i].state != StateStanding {
		return
	}
	c := &m.claims[i]
	expected := c.placed.By&ByExpectation != 0
	// A denial ends what the map has.
	denied := m.policy.Learned && r.denies() && c.outFlows > 0
	if standing || c.superseded != 0 || c.confirmed && (expected || !denied) { // it still stands, maybe by another carrier
		standing = true
		m.withdraw(i, r)
	} else { // the former owner's may stand
		var left Carriers
		if c.MapTranslates && expected {
			left |= ByExpectation
		}
		if m.policy.Learned && c.outFlows == 0 { // else it is denied, or a retry replaces it
			left |= ByMap
		}
		if left != 0 {
			m.op(Op{Kind: Revoke, Permission: c.Permission, By: left, Reason: r})
		}
	}
	m.refuse(now, i, r)
	if !standing && m.policy.Learned && r.denies() {
		m.dropChildren(&m.claims[i]) // the map had learned it, so it may have children
	}
	m.flowsChanged(now, i)
}

// Failed tells the model that the kernel refused to carry p by some carriers. Others carry
// it from now on, if they can.
func (m *Model) Failed(now time.Duration, p Permission, by Carriers, r Reason) {
	i := m.find(p.Key, p.Int)
	if i == none || m.claims[i].state != StateStanding {
		return
	}
	c := &m.claims[i]
	if by&ByExpectation != 0 {
		c.noExpectation = r
		if r == ReasonHelper {
			m.SeeHelper(now, p.Int.Addr, p.Peer)
		}
	}
	if by&ByMap != 0 {
		c.noElement = r
	}
	left := c.placed
	left.By &^= by
	c.superseded = 0
	m.setPlacement(i, left)
	next := m.place(now, c)
	if next.By == 0 && r == ReasonPeersOnPort && m.makeRoomOnPort(now, i) {
		c = &m.claims[i]
		c.noExpectation = ReasonNone
		next = m.place(now, c)
	}
	if next.By == 0 {
		m.Refused(now, p, r, left.By != 0)
		return
	}
	m.changeCarriers(i, next)
}

// makeRoomOnPort ends the permission that has been idle longest among those with an
// expectation on the outside port of claim i, and reports whether there was one.
func (m *Model) makeRoomOnPort(now time.Duration, i int32) bool {
	if !m.snap.complete { // it is unknown which claims are idle
		return false
	}
	oldest := none
	for o := m.byExt[m.claims[i].extKey()]; o != none; o = m.claims[o].extNext {
		c := &m.claims[o]
		if o != i && c.state == StateStanding && c.placed.By&ByExpectation != 0 && c.isIdle() &&
			(oldest == none || c.refreshed < m.claims[oldest].refreshed) {
			oldest = o
		}
	}
	if oldest == none {
		return false
	}
	m.end(now, oldest, ReasonYielded)
	return true
}

// Retry tells the model that the missing expectation of p may be possible now.
func (m *Model) Retry(now time.Duration, p Permission) {
	i := m.find(p.Key, p.Int)
	if i == none {
		return
	}
	if m.claims[i].noExpectation.passes() {
		m.claims[i].noExpectation = ReasonNone
	}
	m.reconsider(now, i)
}

// passes reports whether r, for which an expectation was refused, may be over without any
// notice.
func (r Reason) passes() bool {
	return r == ReasonPeersOnPort || r == ReasonTableFull || r == ReasonNoRoom || r == ReasonTaken || r == ReasonKernel
}
