package cone

// Limits bound how many permissions may stand. Zero is no limit.
type Limits struct {
	Total     int
	PerSubnet int
	PerHost   int // inside address
	// Children is how many live children a permission may have. A permitted peer, or an
	// attacker that spoofs it, must not fill the conntrack table from all its ports.
	Children int
}

// links make a claim a member of a list.
type links struct{ prev, next int32 }

// A scope is what a limit counts: one subnet, or one inside host. Its idle claims,
// which make way for others, are in a list, the oldest first.
type scope struct {
	standing    int32
	listed      int32 // idle claims in the list
	first, last int32
}

var emptyScope = scope{first: none, last: none}

// link and unlink keep the list of a scope; at picks the links of a claim.
func (m *Model) link(s *scope, i int32, at func(*claim) *links) {
	*at(&m.claims[i]) = links{prev: s.last, next: none}
	if s.last != none {
		at(&m.claims[s.last]).next = i
	} else {
		s.first = i
	}
	s.last = i
	s.listed++
}

func (m *Model) unlink(s *scope, i int32, at func(*claim) *links) {
	l := *at(&m.claims[i])
	if l.prev != none {
		at(&m.claims[l.prev]).next = l.next
	} else {
		s.first = l.next
	}
	if l.next != none {
		at(&m.claims[l.next]).prev = l.prev
	} else {
		s.last = l.prev
	}
	s.listed--
}

func inHost(c *claim) *links   { return &c.inHost }
func inSubnet(c *claim) *links { return &c.inSubnet }

// updateScopes updates the scopes after any change of claim i.
func (m *Model) updateScopes(i int32) {
	c := &m.claims[i]
	stands := c.state == StateStanding
	idle := stands && c.isIdle()
	m.updateExpected(i)
	if stands == c.counted && idle == c.listed {
		return
	}
	host := m.host(c)
	subnet := &m.subnets[c.subnet]
	if stands != c.counted {
		n := int32(1)
		if !stands {
			n = -1
		}
		host.standing += n
		subnet.standing += n
		c.counted = stands
	}
	if idle != c.listed {
		if idle {
			m.link(&host, i, inHost)
			m.link(subnet, i, inSubnet)
		} else {
			m.unlink(&host, i, inHost)
			m.unlink(subnet, i, inSubnet)
		}
		c.listed = idle
	}
	if host.standing == 0 {
		delete(m.hosts, c.host())
	} else {
		m.hosts[c.host()] = host
	}
}

// host returns the inside address to which the limit of a host applies. The gateway is one
// host, however many addresses it has.
func (c *claim) host() Addr {
	if c.ownAddress {
		return Addr{}
	}
	return c.Int.Addr
}

func full(n int32, limit int) bool { return limit > 0 && int(n) >= limit }

// evictedPart is the part of a limit that ends at once where idle claims make room, and
// mostEvicted bounds it: each end is a transaction of nftables, which must not come for each new
// flow.
const (
	evictedPart = 64
	mostEvicted = 256
)

func evicted(limit int) int { return min(max(limit/evictedPart, 1), mostEvicted) }

// underLimits makes room for claim c to stand by ending idle claims, the oldest first. It ends
// several at once, and if the limit was lowered, all that stand beyond it. While fewer than that are
// idle it ends none, and returns the limit that was reached: at a host whose flows end one by one,
// each end would make room for one other flow.
func (m *Model) underLimits(c *claim, end func(i int32)) (reached Reason) {
	l := &m.policy.Limits
	// A claim that ends may let another one of its Key stand, so do not try forever.
	for range 4 {
		var limit int
		var standing, listed int32
		var oldest func() int32
		host, subnet := m.host(c), &m.subnets[c.subnet]
		switch {
		case full(host.standing, l.PerHost):
			reached, limit, standing, listed = ReasonHostLimit, l.PerHost, host.standing, host.listed
			oldest = func() int32 { return m.host(c).first }
		case full(subnet.standing, l.PerSubnet):
			reached, limit, standing, listed = ReasonSubnetLimit, l.PerSubnet, subnet.standing, subnet.listed
			oldest = func() int32 { return subnet.first }
		case full(int32(m.stats.Standing), l.Total):
			reached, limit, standing, listed = ReasonLimit, l.Total, int32(m.stats.Standing), m.idle()
			oldest = m.oldest
		default:
			return ReasonNone
		}
		// Before the first snapshot it is unknown which claims are idle.
		n := max(evicted(limit), int(standing)-limit+1)
		if int(listed) < n || !m.snap.complete {
			return reached
		}
		for i := oldest(); i != none && n > 0; i, n = oldest(), n-1 {
			end(i)
		}
	}
	return reached
}

// host returns the scope of the host of c.
func (m *Model) host(c *claim) scope {
	if s, known := m.hosts[c.host()]; known {
		return s
	}
	return emptyScope
}

// idle returns how many claims are idle.
func (m *Model) idle() (n int32) {
	for s := range m.subnets {
		n += m.subnets[s].listed
	}
	return n
}

// oldest returns the claim of any subnet that has been idle longest.
func (m *Model) oldest() int32 {
	oldest := none
	for s := range m.subnets {
		i := m.subnets[s].first
		if i != none && (oldest == none || m.claims[i].refreshed < m.claims[oldest].refreshed) {
			oldest = i
		}
	}
	return oldest
}
