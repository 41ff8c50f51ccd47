package cone

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// SetTimeouts sets how long the kernel keeps flows. From these and what a flow has left the
// model computes when its last packet passed.
func (m *Model) SetTimeouts(t Timeouts) { m.timeouts = t }

// SetTopology sets the gateway's links and addresses. Permissions on an address that the
// gateway has lost end at once. For one lifetime flows with that address give none either,
// because their events may still be on the way.
//
// It reports whether flows that gave no permission because of the old links and addresses
// may give one now, or may be strays now: only a snapshot shows which.
func (m *Model) SetTopology(now time.Duration, t Topology) (misjudged bool) {
	old, wereOwn := m.topo, m.policy.own
	m.topo = compileTopology(t)
	m.policy.own = m.policy.ownOf(m.topo.local)
	m.strays = strays{flows: m.strays.flows}
	misjudged = m.unplaced && !old.outsideLinks.equal(m.topo.outsideLinks) ||
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

// SetRerouted sets which permissions are stale: their hosts' packets leave by another link now
// than the one that has the outside address. Stale permissions end, and no flow renews or gives
// one. stale may be nil.
func (m *Model) SetRerouted(now time.Duration, stale func(Permission) bool) {
	m.rerouted = stale
	if stale != nil {
		m.endWhere(now, ReasonRerouted, func(c *claim) bool { return stale(c.Permission) })
	}
}

// lost reports whether the gateway lost the outside address of p within the last lifetime.
func (m *Model) lost(now time.Duration, p *Permission) bool {
	until, lost := m.topo.lost[p.Ext.Addr]
	return lost && now < until && !p.Routed()
}

// SetForwards sets what the user's rules forward. f says where they may lead packets of a
// permission's peers; it may be nil. Where they may, the permission loses its expectation, and
// others may get one. If complete is false, f may not know all
// forwards; then forwards that flows show count too.
func (m *Model) SetForwards(now time.Duration, f func(Permission) Forwarding, complete bool) {
	m.BeginForwards(now, f, complete)
	for at := 0; at >= 0; {
		at = m.ReviewForwards(now, at, len(m.claims))
	}
}

// BeginForwards is SetForwards for decisions from now on. ReviewForwards applies it to what
// stands already.
func (m *Model) BeginForwards(now time.Duration, f func(Permission) Forwarding, complete bool) {
	m.older.changeForwards(now, m.forwards)
	m.forwards, m.forwardsUnknown = f, !complete
	m.explainForwards()
}

// ReviewForwards decides again, by the present forwards, what carries the n claims from at
// on, and returns where to continue, or -1 at the end. Start with 0.
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

// SetPolicy changes the policy. Permissions that it still allows stay untouched. The others
// end; if the new policy gives one for more peers instead, that one replaces it. The next
// snapshot finds flows that give a permission only now.
func (m *Model) SetPolicy(now time.Duration, p Policy) {
	shorter, sameLifetime := p.Lifetime < m.policy.Lifetime, p.Lifetime == m.policy.Lifetime
	learns, sameShut := !m.policy.Learned && p.Learned, slices.Equal(m.policy.Shut, p.Shut)
	sameMapping := func(a, b Subnet) bool { return a.Prefix == b.Prefix && a.Mapping == b.Mapping }
	if !slices.EqualFunc(m.policy.Subnets, p.Subnets, sameMapping) {
		m.last.recent, m.last.different = 0, 0 // they were of the old mapping
	}
	m.policy = compilePolicy(p, m.topo.local)
	m.wheel = newWheel(&m.claims, p.Lifetime)
	m.wheel.done = int64(now / m.wheel.grain)
	m.hosts = make(map[Addr]scope)
	m.subnets, m.carried = newScopes(len(p.Subnets)), make([]carriedOf, len(p.Subnets)+1)
	for i := range m.claims {
		c := &m.claims[i]
		c.slot, c.counted, c.listed = none, false, false
		if c.state == stateUnused {
			continue
		}
		c.subnet, c.ownAddress = m.policy.index(c.Int.Addr.Netip()), m.policy.isOwn(c.Int.Addr)
		m.updateScopes(int32(i))
		m.countCarried(c, 1)
		switch c.state {
		case StateStanding:
			c.renewal = min(c.renewal, now+p.Lifetime/2)
			c.adopted = c.adopted && sameLifetime
			if shorter { // what is in the kernel must not outlive the new lifetime
				c.renewal = now
			}
			m.wheel.schedule(int32(i), min(c.renewal, c.refreshed+p.Lifetime))
		case StateRefused:
			if learns { // if it is refused again, it is denied
				c.retry = now
			}
			m.wheel.schedule(int32(i), c.retry)
		}
	}
	var wider []timedPermission
	m.endWhere(now, ReasonPolicy, func(c *claim) bool {
		asked := c.outFlows > 0
		if m.allowed(c) {
			return false
		}
		if asked && c.isRevoked() {
			m.noteRevoked(now, revocation{c.Key, c.Int}, nil)
		}
		if x, ok := m.replacement(c); ok {
			wider = append(wider, x)
		}
		return true
	})
	for _, x := range wider {
		m.grantReplacement(now, x)
	}
	m.reconsiderAll(now)
	if !sameShut { // the firewall may drop now what a forward takes
		for i := range m.claims {
			m.retryForwarded(now, int32(i))
		}
	}
	if !learns {
		return
	}
	for i := range m.claims { // what the kernel may learn now must stand, or be denied
		if c := &m.claims[i]; c.state == StateRefused && !c.waitsForFlow() {
			m.grant(now, int32(i))
		}
	}
}

// allowed reports whether the policy allows c. It removes flows of c that no longer support
// it, such as those to excluded peer ports.
func (m *Model) allowed(c *claim) bool {
	_, s, ok := m.policy.subnet(c.Int.Addr.Netip())
	if !ok || c.Routed() && !s.Routed || s.Filtering == AddressAndPortDependent {
		return false
	}
	if m.widened(c).Key != c.Key {
		return false // the policy makes another permission of it now
	}
	had := c.outFlows > 0
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
	if had && c.outFlows == 0 {
		return false
	}
	if c.HostBits > 0 {
		return !m.policy.ports.has(c.Ext.Port)
	}
	// Port 1 stands for any port: the ports of the flows were checked above.
	peer := Endpoint{c.Peer, 1}
	r := m.policy.refusesEndpoint(c.Ext, peer, &m.topo)
	if r != ReasonPeerInside {
		return r == ReasonNone
	}
	_, _, inside := m.policy.subnet(c.Peer.Netip())
	return !inside && !m.topo.reached(c.Peer.Netip()) // no route: it may come back
}

// A timedPermission is a permission with the time of its last traffic from inside.
type timedPermission struct {
	Permission
	refreshed time.Duration
}

// widened returns the permission that the policy now makes of c. If c is for several peers,
// the first one counts.
func (m *Model) widened(c *claim) timedPermission {
	x := timedPermission{c.Permission, c.refreshed}
	x.HostBits = 0
	m.policy.widen(&x.Permission)
	return x
}

// replacement returns the permission for more peers that replaces c, which the policy ends. ok
// is false if there is none, or if the policy gives none for the contacts of c.
func (m *Model) replacement(c *claim) (x timedPermission, ok bool) {
	if x = m.widened(c); c.state != StateStanding || x.HostBits <= c.HostBits {
		return x, false
	}
	if c.HostBits == 0 && m.policy.refusesEndpoint(c.Ext, Endpoint{c.Peer, 1}, &m.topo) != ReasonNone {
		return x, false
	}
	ok = c.outFlows == 0
	for f := c.flows; f != none && !ok; f = m.flows.all[f].next {
		fl := &m.flows.all[f]
		ok = !fl.child && !m.policy.peerPorts.has(fl.port)
	}
	return x, ok
}

// grantReplacement grants x, which replaces a narrower permission that just ended, for that one's
// remaining lifetime. If x.Int has a claim on x.Key already, it only extends that claim.
func (m *Model) grantReplacement(now time.Duration, x timedPermission) {
	if o := m.owner(x.Key); o != none {
		if c := &m.claims[o]; c.Int == x.Int {
			c.refreshed = max(c.refreshed, x.refreshed)
		}
		return
	}
	i := m.claim(x.Permission, x.refreshed)
	if m.allowed(&m.claims[i]) {
		m.grant(now, i)
	}
	m.flowsChanged(now, i)
}

// supports reports whether a contact, maybe with another peer, gives c.
func (m *Model) supports(contact *Permission, c *claim) bool {
	if c.HostBits > 0 {
		return true
	}
	first, n := m.policy.expand(contact)
	for i := range n {
		if first.Plus(i) == c.Peer {
			return true
		}
	}
	return false
}

// Adopt takes over p, which the kernel carries from an earlier daemon. Unless flows hold p,
// it ends when it would have ended without a daemon, by the carrier that would have ended first.
// Nothing is renewed before traffic since the last write is seen, else a daemon that dies again
// and again would keep p up for ever. If the policy does not allow p, or if the user revoked it
// under that daemon (Model.Revoked), it is revoked.
func (m *Model) Adopt(now time.Duration, p Permission, by Carriers, ends time.Duration) {
	if p.MapTranslates { // the map says which host has it; the grant finds the expectation
		return
	}
	if _, revoked := m.revoked.at[revocation{Key: p.Key}]; revoked { // the kernel refused to end it
		m.op(Op{Kind: Revoke, Permission: p, By: by, Reason: ReasonRevoked})
		return
	}
	if o := m.owner(p.Key); o != none {
		c := &m.claims[o]
		if c.Int != p.Int || c.state != StateStanding {
			return
		}
		if c.adopted { // by another carrier
			c.refreshed = min(c.refreshed, ends-m.policy.Lifetime)
		}
		if c.placed.By&by == 0 {
			m.op(Op{Kind: Revoke, Permission: p, By: by, Reason: c.placed.Why})
		}
		return
	}
	i := m.claim(p, min(ends-m.policy.Lifetime, now))
	c := &m.claims[i]
	m.setState(i, StateStanding, ReasonNone)
	m.setPlacement(i, Placement{By: by})
	c.made, c.confirmed = now, true
	c.renewal = now
	c.adopted = ends <= now+m.policy.Lifetime // else the lifetime was longer
	m.wheel.schedule(i, min(c.renewal, c.refreshed+m.policy.Lifetime))
	if !m.allowed(c) {
		x, ok := m.replacement(c)
		m.end(now, i, ReasonPolicy)
		if _, revoked := m.revoked.at[revocation{Key: x.Key}]; ok && !revoked {
			m.grantReplacement(now, x)
		}
		return
	}
	// Limits do not count here: p stood before, and makes room when another claim needs it.
	m.reconsider(now, i)
}

// Revoke ends the permissions for which f returns true. The flows that hold them now do not
// bring them back; a new flow does. Other inside endpoints that waited for one of them get
// theirs. It returns how many stood.
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
	for _, i := range revoked { // only now the first claim of each Key is known
		if o := m.owner(m.claims[i].Key); m.claims[o].state == StateWaiting {
			m.grant(now, o)
		}
		m.keepDenied(now, i)
		m.flowsChanged(now, i)
	}
	return n
}

// endWhere ends the claims for which f returns true. It asks f about waiting claims too,
// since one of them may come to stand in place of another.
func (m *Model) endWhere(now time.Duration, r Reason, f func(*claim) bool) {
	var ends []int32
	for i := range m.claims {
		if c := &m.claims[i]; c.state != stateUnused && f(c) {
			ends = append(ends, int32(i))
		}
	}
	// End waiting claims first, so that none of them is granted for a moment.
	slices.SortStableFunc(ends, func(a, b int32) int {
		return int(m.claims[b].state) - int(m.claims[a].state)
	})
	for _, i := range ends {
		if m.claims[i].state != stateUnused { // else it was evicted meanwhile
			m.end(now, i, r)
		}
	}
}

func newScopes(n int) []scope {
	// One more for the gateway itself, and for claims whose subnet is no longer enabled.
	return slices.Repeat([]scope{emptyScope}, n+1)
}

// subnet returns the enabled subnet that holds a, and its index. For the gateway itself,
// and if no subnet holds a, the index is one past the last.
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
