package cone

import "time"

// selfSubnet is the subnet of the gateway's own addresses.
var selfSubnet = Subnet{Routed: true, Choice: ChooseBoth}

// ownOf returns the addresses of the gateway that are inside hosts too.
func (p *Policy) ownOf(local map[Addr]struct{}) map[Addr]struct{} {
	if !p.Self4 && !p.Self6 {
		return nil
	}
	own := make(map[Addr]struct{}, len(local))
	for a := range local {
		if a.Is4() && p.Self4 || !a.Is4() && p.Self6 {
			own[a] = struct{}{}
		}
	}
	return own
}

func (p *policy) isOwn(a Addr) bool {
	_, own := p.own[a]
	return own
}

// forSocket reports whether x admits packets to the gateway port that they are sent to. x
// may lead them from one address to another: the socket with that port may be bound to all.
func (p *policy) forSocket(x *Permission) bool {
	return x.Ext.Port == x.Int.Port && p.isOwn(x.Int.Addr)
}

// IsSelf reports whether p is one of the gateway itself.
func (m *Model) IsSelf(p *Permission) bool { return m.policy.isOwn(p.Int.Addr) }

// yields reports whether claim o, the first of its Key, makes way for claim i of the same
// Key. While a gateway socket's claim stands, no inside host's claim replaces it: the
// latter would be refused for the socket. An inside host's claim that was refused for the
// socket makes way at once for the socket's own. No claim makes way for a revoked one.
func (m *Model) yields(o, i int32) bool {
	if m.claims[i].isRevoked() {
		return false
	}
	c := &m.claims[o]
	first, next := m.policy.forSocket(&c.Permission), m.policy.forSocket(&m.claims[i].Permission)
	switch {
	case first && !next:
		return c.state == StateRefused && c.isIdle()
	case next && !first && c.state == StateRefused && c.reason == ReasonLocalSocket:
		return true
	}
	return c.isIdle()
}

// preempt ends the claims that come before claim i of the same Key and yield to it.
func (m *Model) preempt(now time.Duration, i int32) {
	k := m.claims[i].Key
	for o := m.owner(k); o != i && m.yields(o, i); o = m.owner(k) {
		m.end(now, o, ReasonYielded)
	}
}
