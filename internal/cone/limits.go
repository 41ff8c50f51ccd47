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
}

func inHost(c *claim) *links   { return &c.inHost }
func inSubnet(c *claim) *links { return &c.inSubnet }

// account updates the scopes after any change of claim i.
func (m *Model) account(i int32) {
	c := &m.claims[i]
	stands := c.state == StateStanding
	idle := stands && c.isIdle()
	m.accountRoom(i)
	if stands == c.counted && idle == c.listed {
		return
	}
	host, ok := m.hosts[c.host()]
	if !ok {
		host = emptyScope
	}
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
	if c.self {
		return Addr{}
	}
	return c.Int.Addr
}

func full(n int32, limit int) bool { return limit > 0 && int(n) >= limit }

// evictedPart is the part of a limit that ends at once where idle claims make room: each end is a
// transaction of nftables, which must not come for each new flow.
const evictedPart = 64

// underLimits makes room for claim c to stand by ending idle claims, the oldest first, up to
// 1/evictedPart of the limit. If none is left, it returns the limit that was reached.
func (m *Model) underLimits(c *claim, end func(i int32)) Reason {
	l := &m.policy.Limits
	// A claim that ends may let another one of its Key stand, so do not try forever.
	for range 4 {
		host, known := m.hosts[c.host()]
		var oldest func() int32
		var reason Reason
		var limit int
		switch {
		case known && full(host.standing, l.PerHost):
			oldest, reason, limit = func() int32 { return m.oldestOf(c.host()) }, ReasonHostLimit, l.PerHost
		case full(m.subnets[c.subnet].standing, l.PerSubnet):
			oldest, reason, limit = func() int32 { return m.subnets[c.subnet].first }, ReasonSubnetLimit, l.PerSubnet
		case full(int32(m.stats.Standing), l.Total):
			oldest, reason, limit = m.oldest, ReasonLimit, l.Total
		default:
			return ReasonNone
		}
		// Before the first snapshot it is unknown which claims are idle.
		if !m.snap.complete || oldest() == none {
			return reason
		}
		for n := max(1, limit/evictedPart); n > 0; n-- {
			i := oldest()
			if i == none {
				break
			}
			end(i)
		}
	}
	return ReasonLimit
}

// oldestOf returns the claim of a host that has been idle longest.
func (m *Model) oldestOf(host Addr) int32 {
	if s, known := m.hosts[host]; known {
		return s.first
	}
	return none
}

// oldest returns the claim of any subnet that has been idle longest.
func (m *Model) oldest() int32 {
	oldest := none
	for s := range m.subnets {
		i := m.subnets[s].first
		if i != none && (oldest == none || m.claims[i].fed < m.claims[oldest].fed) {
			oldest = i
		}
	}
	return oldest
}
