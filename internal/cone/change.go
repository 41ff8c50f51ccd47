package cone

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// SetTimeouts tells how long the kernel keeps flows, from which the model tells when they
// had their last packet.
func (m *Model) SetTimeouts(t Timeouts) { m.timeouts = t }

// SetTopology tells the model the gateway's links and addresses. Permissions on
// an address that the gateway had and has no more end at once. For a lifetime flows
// with that address give none either: their events may still be on the way.
//
// It reports whether a flow that gave no permission, for what was known of links and
// addresses, may give one now, or may be a stray now: only a snapshot shows which.
func (m *Model) SetTopology(now time.Duration, t Topology) (misjudged bool) {
	old, wereOwn := m.topo, m.policy.own
	m.topo = compileTopology(t)
	m.policy.own = m.policy.ownOf(m.topo.local)
	m.strays = strays{flows: m.strays.flows}
	misjudged = m.unplaced && !old.peers.equal(m.topo.peers) ||
		m.topo.doubtful && (!old.doubtful || !maps.Equal(old.uplinks, m.topo.uplinks))
	for a, until := range old.lost {
		if _, back := m.topo.local[a]; !back && now < until {
			m.topo.lost[a] = until
		} else if back && m.unplaced {
			misjudged = true
		}
	}
	gone := false
	for a := range old.local {
		if _, ok := m.topo.local[a]; !ok {
			gone = true
			m.topo.lost[a] = now + m.policy.Lifetime
		}
	}
	if !gone {
		return misjudged
	}
	m.endWhere(now, ReasonAddressGone, func(c *claim) bool {
		_, had := old.local[c.Ext.Addr]
		_, has := m.topo.local[c.Ext.Addr]
		_, wasOwn := wereOwn[c.Int.Addr]
		return had && !has && (!c.Routed() || wasOwn)
	})
	return misjudged
}

// lost reports whether p is on an address that the gateway lost a while ago.
func (m *Model) lost(now time.Duration, p *Permission) bool {
	until, lost := m.topo.lost[p.Ext.Addr]
	return lost && now < until && !p.Routed()
}

// SetForwards tells what rules of the user's forward. f reports whether one may lead a
// peer of a permission elsewhere than the permission does; it may be nil. Such permissions
// have no expectation any more, and others may have one. If whole is false there may be
// other forwards, and flows are believed that show one.
func (m *Model) SetForwards(now time.Duration, f func(Permission) bool, whole bool) {
	m.BeginForwards(f, whole)
	for at := 0; at >= 0; {
		at = m.ReviewForwards(now, at, len(m.claims))
	}
}

// BeginForwards is SetForwards for what is decided from now on. What stands already
// is for ReviewForwards.
func (m *Model) BeginForwards(f func(Permission) bool, whole bool) {
	m.ruled, m.unread = f, !whole
	m.explainShown()
}

// ReviewForwards places the next n claims from at on anew, for what is forwarded now,
// and returns where to go on, or -1 at the end. It begins with 0.
func (m *Model) ReviewForwards(now time.Duration, at, n int) int {
	end := min(at+n, len(m.claims))
	for i := at; i < end; i++ {
		m.reconsider(now, int32(i))
		m.retryForwarded(now, int32(i))
	}
	if end >= len(m.claims) {
		return -1
	}
	return end
}

// SetPolicy changes the policy. Permissions that it still allows are not
// touched; the others end, each for one with more peers where the policy makes it
// that. Flows that give a permission only now are found by the next snapshot.
func (m *Model) SetPolicy(now time.Duration, p Policy) {
	shorter := p.Lifetime < m.policy.Lifetime
	learns := !m.policy.Learned && p.Learned
	m.policy = compilePolicy(p, m.topo.local)
	m.wheel = newWheel(&m.claims, p.Lifetime)
	m.wheel.done = int64(now / m.wheel.grain)
	m.hosts = make(map[Addr]scope)
	m.subnets = newScopes(len(p.Subnets))
	for i := range m.claims {
		c := &m.claims[i]
		c.slot, c.counted, c.listed = none, false, false
		if c.state == stateUnused {
			continue
		}
		c.subnet, c.self = m.policy.index(c.Int.Addr.Netip()), m.policy.isOwn(c.Int.Addr)
		m.account(int32(i))
		switch c.state {
		case StateStanding:
			c.refresh = min(c.refresh, now+p.Lifetime/2)
			if shorter { // what is in the kernel must not outlive it
				c.refresh = now
			}
			m.wheel.schedule(int32(i), min(c.refresh, c.fed+p.Lifetime))
		case StateRefused:
			if learns { // refused again, it is denied
				c.retry = now
			}
			m.wheel.schedule(int32(i), c.retry)
		}
	}
	var wider []fedPermission
	m.endWhere(now, ReasonPolicy, func(c *claim) bool {
		if m.allowed(c) {
			return false
		}
		if x, ok := m.goesOn(c); ok {
			wider = append(wider, x)
		}
		return true
	})
	for _, x := range wider {
		m.carryOn(now, x)
	}
	m.reconsiderAll(now)
	if !learns {
		return
	}
	for i := range m.claims { // what the kernel learns meanwhile should stand, or be denied
		if c := &m.claims[i]; c.state == StateRefused && !c.waitsForFlow() {
			m.grant(now, int32(i))
		}
	}
}

// allowed reports whether the policy allows c. Flows to excluded peer ports
// support it no more.
func (m *Model) allowed(c *claim) bool {
	_, s, ok := m.policy.subnet(c.Int.Addr.Netip())
	if !ok || c.Routed() && !s.Routed || s.Filtering == AddressAndPortDependent {
		return false
	}
	if m.widened(c).Key != c.Key {
		return false // it would be another one now
	}
	had := c.outs > 0
	for f := c.flows; f != none; {
		fl := &m.flows.all[f]
		next := fl.next
		contact := c.Permission
		contact.Peer = m.from(f).Addr
		if !fl.child && (m.policy.peerPorts.has(fl.port) || !m.supports(&contact, c)) {
			m.removeFlow(f)
		}
		f = next
	}
	if had && c.outs == 0 {
		return false
	}
	if c.Wild > 0 {
		return !m.policy.ports.has(c.Ext.Port)
	}
	// Any port that is not excluded will do: those of the flows were looked at.
	peer := Endpoint{c.Peer, 1}
	r := m.policy.refusesEndpoint(c.Ext, peer, &m.topo)
	if r != ReasonPeerInside {
		return r == ReasonNone
	}
	_, _, inside := m.policy.subnet(c.Peer.Netip())
	return !inside && !m.topo.reached(c.Peer.Netip()) // a route may come back
}

// A fedPermission is one that was last fed from inside at some time.
type fedPermission struct {
	Permission
	fed time.Duration
}

// widened returns what c would be by the policy. If c stands for several peers it is
// that of the first.
func (m *Model) widened(c *claim) fedPermission {
	x := fedPermission{c.Permission, c.fed}
	x.Wild = 0
	m.policy.widen(&x.Permission)
	return x
}

// goesOn returns what takes the place of c, which the policy ends: the same for more
// peers, unless the policy gives none for a contact with that of c.
func (m *Model) goesOn(c *claim) (x fedPermission, ok bool) {
	if x = m.widened(c); c.state != StateStanding || x.Wild <= c.Wild {
		return x, false
	}
	if c.Wild == 0 && m.policy.refusesEndpoint(c.Ext, Endpoint{c.Peer, 1}, &m.topo) != ReasonNone {
		return x, false
	}
	ok = c.outs == 0
	for f := c.flows; f != none && !ok; f = m.flows.all[f].next {
		fl := &m.flows.all[f]
		ok = !fl.child && !m.policy.peerPorts.has(fl.port)
	}
	return x, ok
}

// carryOn lets x stand in place of one for fewer peers that ended, for as long as
// that one would have, or as another one that came to be the same.
func (m *Model) carryOn(now time.Duration, x fedPermission) {
	if o := m.owner(x.Key); o != none {
		if c := &m.claims[o]; c.Int == x.Int {
			c.fed = max(c.fed, x.fed)
		}
		return
	}
	i := m.claim(x.Permission, x.fed)
	if m.allowed(&m.claims[i]) {
		m.grant(now, i)
	}
	m.settle(now, i)
}

// supports reports whether a contact with another peer may hold c.
func (m *Model) supports(contact *Permission, c *claim) bool {
	if c.Wild > 0 {
		return true
	}
	first, n := m.policy.spread(contact)
	for i := range n {
		if first.Plus(i) == c.Peer {
			return true
		}
	}
	return false
}

// Adopt takes over p, which the kernel carries from an earlier daemon. Unless
// flows hold it, it ends at the time at which it would have ended without a
// daemon. What the policy does not allow is revoked.
func (m *Model) Adopt(now time.Duration, p Permission, by Carriers, ends time.Duration) {
	if o := m.owner(p.Key); o != none {
		if c := &m.claims[o]; c.Int == p.Int && c.state == StateStanding && c.placed.By&by == 0 {
			m.op(Op{Kind: Revoke, Permission: p, By: by, Reason: c.placed.Why})
		}
		return
	}
	i := m.claim(p, min(ends-m.policy.Lifetime, now))
	c := &m.claims[i]
	m.setState(i, StateStanding, ReasonNone)
	m.setPlacement(i, Placement{By: by})
	c.made, c.certain = now, true
	c.refresh = now
	m.wheel.schedule(i, min(c.refresh, c.fed+m.policy.Lifetime))
	if !m.allowed(c) {
		x, ok := m.goesOn(c)
		m.end(now, i, ReasonPolicy)
		if ok {
			m.carryOn(now, x)
		}
		return
	}
	// No limit counts: it stood before, and makes room when another wants it.
	m.reconsider(now, i)
}

// Revoke ends the permissions for which f returns true, for good: the flows
// that hold them now do not bring them back, a new one does. Other inside endpoints that
// waited for one of them get theirs. It returns how many stood.
func (m *Model) Revoke(now time.Duration, f func(Permission) bool) (n int) {
	var revoked []int32
	for i := range m.claims {
		c := &m.claims[i]
		if c.state == stateUnused || !f(c.Permission) {
			continue
		}
		if c.state == StateStanding {
			n++
		}
		m.withdraw(int32(i), ReasonRevoked)
		m.wheel.remove(int32(i))
		m.markRevoked(int32(i))
		revoked = append(revoked, int32(i))
	}
	for _, i := range revoked { // only now it is known who is first
		if o := m.owner(m.claims[i].Key); m.claims[o].state == StateWaiting {
			m.grant(now, o)
		}
		m.keepDenied(now, i)
		m.settle(now, i)
	}
	return n
}

// endWhere ends the claims for which f returns true. One that comes to stand in
// place of another is asked about too.
func (m *Model) endWhere(now time.Duration, r Reason, f func(*claim) bool) {
	var ends []int32
	for i := range m.claims {
		if c := &m.claims[i]; c.state != stateUnused && f(c) {
			ends = append(ends, int32(i))
		}
	}
	// Those that wait go first, so that none of them is granted for a moment.
	slices.SortStableFunc(ends, func(a, b int32) int {
		return int(m.claims[b].state) - int(m.claims[a].state)
	})
	for _, i := range ends {
		if m.claims[i].state != stateUnused { // evicted meanwhile
			m.end(now, i, r)
		}
	}
}

func newScopes(n int) []scope {
	// One more for the gateway itself, and for claims whose subnet is not enabled any more.
	return slices.Repeat([]scope{emptyScope}, n+1)
}

// subnet returns the enabled subnet that holds a and its index; without one, and for the
// gateway itself, the index is past the last.
func (p *policy) subnet(a netip.Addr) (int, Subnet, bool) {
	if len(p.own) > 0 && p.isOwn(AddrFrom(a)) {
		return len(p.Subnets), selfSubnet, true
	}
	if i := p.subnets.Find(a); i >= 0 {
		return i, p.Subnets[i], true
	}
	return len(p.Subnets), Subnet{}, false
}

func (p *policy) index(a netip.Addr) int32 {
	i, _, _ := p.subnet(a)
	return int32(i)
}
