package daemon

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A childQuestion asks what the user's chains do with children of some subnets.
type childQuestion struct {
	*userrules.Ruleset
	outside, inside []userrules.Link
	subnets         []netip.Prefix
}

// children returns the question about these subnets.
func (f *firewall) children(network gateway.Network, subnets []netip.Prefix) (q childQuestion, err error) {
	q = childQuestion{f.user, arrivingBy(network), nil, subnets}
	if len(q.outside) == 0 {
		return q, nil
	}
	if f.unread != nil {
		return q, f.unread
	}
	to, err := network.LinksTo(0, subnets)
	for _, l := range to {
		q.inside = append(q.inside, flows.LinkOf(l))
	}
	return q, err
}

// same reports whether the answers to both questions are the same: about the same reading of rules.
func (q childQuestion) same(as childQuestion) bool {
	return q.Ruleset != nil && q.Ruleset == as.Ruleset && slices.Equal(q.subnets, as.subnets) &&
		slices.EqualFunc(q.outside, as.outside, userrules.Link.Equal) && slices.EqualFunc(q.inside, as.inside, userrules.Link.Equal)
}

// arrivingBy returns the outside links, with the addresses for which packets arrive by them.
func arrivingBy(network gateway.Network) []userrules.Link {
	links, own := outsideLinks(network), ownAddrs(network)
	for i := range links {
		links[i].Masquerade = own[links[i].Name]
	}
	return links
}

// only returns the question about one of the subnets.
func (q childQuestion) only(i int) childQuestion {
	q.inside, q.subnets = q.inside[i:i+1], q.subnets[i:i+1]
	return q
}

// of answers for peers in a prefix, or for all peers if it is invalid.
func (q childQuestion) of(peers netip.Prefix) ([]userrules.ChildVerdicts, error) {
	return q.ChildrenOf(peers, q.outside, q.inside, q.subnets)
}

// blockers returns what keeps the hosts of each of the subnets from sending outside.
func (q childQuestion) blockers() ([]userrules.Blocker, error) {
	return q.Blockers(q.outside, q.inside, q.subnets)
}

// mostGroupsAsked is about how many peer groups the rules are asked: each question goes through
// all rules, which takes tens of milliseconds if there are thousands.
const mostGroupsAsked = 8

// spared returns the IPv4 groups whose children in the map pass the user's chains, or may pass
// them. most is what these do with those of most peers, and these are dropped, by the rules or as
// evidence shows.
func (q childQuestion) spared(groups []netip.Prefix, most userrules.Answer) (all []netip.Prefix) {
	for _, g := range groups[:min(len(groups), mostGroupsAsked)] {
		if of, err := q.of(g); err == nil && of[0].MostDNATed != userrules.Dropped && of[0].MostDNATed != most {
			all = append(all, g)
		}
	}
	return all
}

// passes says what the user's chains do with the first packet of a child to a host: by the
// rules, or if these do not tell by what became of other children.
func passes(rs *userrules.Ruleset, outside []userrules.Link, n gateway.Network, x decision, host netip.Addr, related bool) (userrules.Answer, string) {
	one := []netip.Prefix{netip.PrefixFrom(host, host.BitLen())}
	a, all, dropper := userrules.Unknown, userrules.Unknown, ""
	if links, err := n.LinksTo(0, one); err == nil {
		inside := []userrules.Link{flows.LinkOf(links[0])}
		if v, err := rs.Children(outside, inside, one); err == nil {
			if a, all, dropper = v[0].MostDNATed, v[0].DNATed, v[0].DNATedBy.Chain; related {
				a, all, dropper = v[0].MostRelated, v[0].Related, v[0].RelatedBy.Chain
			}
		}
	}
	if a == userrules.Unknown || x.elsewhere {
		a, dropper = x.MostDNATed, x.DNATedBy.Chain
		if related {
			a, dropper = x.MostRelated, x.RelatedBy.Chain
		}
		dropper = cmp.Or(dropper, "a chain of another hook than prerouting and forward")
	} else if all != a { // a rule for some peers or ports decides otherwise
		return userrules.Unknown, ""
	}
	return a, dropper
}
