package rules

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/google/nftables"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// A hostPool is a Pool, with what rules need to match its hosts.
type hostPool struct {
	ports   cone.PortRanges
	subnets *prefixes // nil if the pool is for all hosts with mappings
	suffix  string    // of the names of its chains
}

// makePools makes the pools that have ports.
func (m *mapper) makePools() {
	for _, c := range m.Pools {
		if len(c.Ports) == 0 {
			continue
		}
		p := &hostPool{ports: c.Ports}
		if n := len(m.pools) + 1; n > 1 {
			p.suffix = strconv.Itoa(n)
		}
		if !covers(c.Subnets, m.Subnets) {
			p.subnets = m.prefixes("pool_subnets"+p.suffix, c.Subnets)
		}
		m.pools = append(m.pools, p)
	}
}

// hosts matches the addresses of hosts of the pool. It is empty if the pool is for all
// hosts with mappings.
func (p *hostPool) hosts(addr operand) exprs {
	if p.subnets == nil {
		return nil
	}
	return p.subnets.has(addr)
}

// A chosen has the hosts for which the user's rules choose the ports on a link.
type chosen struct {
	hosts *prefixes // nil for all hosts with mappings
}

// chosenBy returns nil if there are no such hosts.
func (m *mapper) chosenBy(link string) *chosen {
	all := m.Choosers[link]
	switch {
	case len(all) == 0:
		return nil
	case covers(all, m.Subnets):
		return &chosen{}
	}
	return &chosen{m.prefixes("chosen_"+elements.Identifier(link), all)}
}

// leaves adds a rule that leaves these hosts to the user's rules with the statement end, if
// there are such hosts. It reports whether they are all hosts with mappings.
func (c *chosen) leaves(u *uplink, in *nftables.Chain, addr operand, end exprs) (all bool) {
	if c == nil {
		return false
	}
	var test exprs
	if c.hosts != nil {
		test = c.hosts.has(addr)
	}
	u.rule(in, "a rule of the user's chooses its port", test, end)
	return c.hosts == nil
}

// covers reports whether each of the subnets is in one of the prefixes.
func covers(prefixes, subnets []netip.Prefix) bool {
	return !slices.ContainsFunc(subnets, func(s netip.Prefix) bool {
		return !slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Bits() <= s.Bits() && p.Contains(s.Addr()) })
	})
}
