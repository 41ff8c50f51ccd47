package userrules

import (
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A Blocker is a chain that lets nothing of a subnet out.
type Blocker struct {
	Chain   string // as in "ip filter FORWARD"; empty if there is none
	Forward bool   // it is a chain of the forward hook; else one of prerouting
}

// Blockers says which chain of the prerouting and forward hooks drops all that hosts of each of the
// subnets send by the links outside: the first packets of their UDP flows, to whatever address out
// of the subnets. There is none if a packet may pass by one of the links. inside and the order of
// the answers are as for Children; a subnet whose link is also one of outside has no answer.
func (rs *Ruleset) Blockers(outside, inside []Link, subnets []netip.Prefix) ([]Blocker, error) {
	all := make([]Blocker, len(subnets))
	chains, err := rs.path(subnets)
	if err != nil || len(outside) == 0 {
		return all, err
	}
	for i := range inside {
		in := &inside[i]
		if slices.ContainsFunc(outside, func(o Link) bool { return o.Index == in.Index }) {
			continue
		}
		if in.Name == "" {
			in = nil
		}
		for n := range outside {
			a, by, err := hookAnswer(chains, stagesOf(newDeparting(in, &outside[n], outside, subnets[i], subnets), netip.Addr{}, false), false)
			if err != nil {
				return nil, err
			}
			if a != Dropped {
				all[i] = Blocker{}
				break
			}
			at := slices.IndexFunc(chains, func(c baseChain) bool { return c.title+" "+c.base.name == by.Chain })
			all[i] = Blocker{by.Chain, chains[at].hook == unix.NF_INET_FORWARD}
		}
	}
	return all, nil
}

// newDeparting returns the first packets of the flows that hosts of a subnet begin, which come by the
// link in (nil for any that is not outside), leave by the link out and are for addresses in none of
// the subnets.
func newDeparting(in, out *Link, outside []Link, subnet netip.Prefix, subnets []netip.Prefix) *child {
	c := newChild(false, nil, nil, outside, subnet, subnets)
	c.state, c.status, c.labelled = expr.CtStateBitNEW, 0, false
	c.in, c.out = oneLink(in, outside), oneLink(out, nil)
	at := c.destination()
	from, to := slices.Clone(c.network[at:]), slices.Clone(c.source())
	copy(c.source(), from)
	copy(c.network[at:], to)
	return c
}
